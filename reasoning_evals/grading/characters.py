"""Characters beyond ASCII as LaTeX: by what Unicode says of each, and by a table where LaTeX has a word of its own; how TeX writes what
separates digits, and the modulus behind a residue; numbers in words, and what a sentence says of its numbers: which one is its result, and whether it is in doubt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction
from itertools import groupby

_WORDS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": "/",
    "∕": "/", "⁄": "/", "≈": r"\approx ", "≃": r"\approx ", "≅": r"\approx ", "∼": r"\sim ", "≤": r"\leq ", "≥": r"\geq ",
    "≠": r"\neq ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∖": r"\setminus ", "∈": r"\in ", "⇒": r"\Rightarrow ",
    "∴": r"\Rightarrow ", "′": "'", "’": "'", "‘": "'", "″": "''", "”": "''", "⟨": r"\langle ", "⟩": r"\rangle ",
    "ℏ": r"\hbar ", "ħ": r"\hbar ", "µ": r"\mu ", "Å": r"\AA ", "。": ". ", "、": ", ", "٫": ".", "٬": ",", "✓": "", "✔": "", "✅": "", "∎": "", "■": "", "□": "", "\ufe0f": "",
}  # fmt: skip
_GREEK = (
    "alpha beta gamma delta epsilon epsilon zeta eta theta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
)
_WORDS |= {
    sign: f"\\{name} " for sign, name in zip("αβγδεϵζηθϑικλμνξπρστυφϕχψωΓΔΘΛΞΠΣΥΦΨΩ", _GREEK.split(), strict=True)
}
_HAT = re.compile("([A-Za-z])\u0302")


def in_latex(text: str) -> str:
    """The text in ASCII where that says the same: 42 in full width or Arabic digits, ½, ｘ, 𝑖, î, ℤ, ²; signs of money left out.
    Letters of other scripts stay."""
    if text.isascii():
        return text
    runs = []
    for mark, run in groupby(text, _raised):  # aₙ is not an, eⁱˣ is e^{ix}
        inside = "".join(char if char.isascii() else _one(char) for char in run)
        runs.append(f"{mark}{{{inside}}}" if mark else inside)
    return _HAT.sub(r"\\hat{\1}", "".join(runs))


def _raised(char: str) -> str:
    """^ for a superscript, _ for a subscript, but nothing for ™, and for the ordinals ª and º."""
    if char.isascii() or char in "ªº" or len(unicodedata.normalize("NFKC", char)) > 1:
        return ""
    return {"<super>": "^", "<sub>": "_"}.get(unicodedata.decomposition(char).partition(" ")[0], "")


def _one(char: str) -> str:
    if char in _WORDS:
        return _WORDS[char]
    kind, plain = unicodedata.category(char), unicodedata.normalize("NFKC", char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind == "Nl":  # one sign for VII; of several, each is its own number
        return f" {unicodedata.numeric(char):g} "
    if kind in ("Zs", "Cf", "Me"):
        return " " * (kind == "Zs")
    if (kind == "Sc" and char != "¢") or (kind == "So" and char > "\u26ff"):  # 75¢ are not 75; pictures say nothing
        return ""
    if unicodedata.name(char, "").startswith("DOUBLE-STRUCK CAPITAL"):
        return rf"\mathbb{{{plain}}}"
    if "⁄" in plain and len(plain) > 2:
        above, below = plain.split("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    if plain != char:
        return "".join(_WORDS.get(part, part) for part in plain)
    bare = unicodedata.normalize("NFD", char)
    return bare if bare.endswith("\u0302") else char


def separators(text: str) -> str:
    r"""1{,}000 is 1000, and 3{,}14 is 3.14: TeX needs the braces in neither list nor tuple. A tie behind something is a blank."""
    text = re.sub(r"(?<=[\w)}\].])~|(?<=\d)\{ \}(?=\d)", " ", text)
    text = re.sub(r"(?<![\d.])0\{,\}(?=\d)", "0.", re.sub(r"\{\s*([-+:.])\s*\}", r"\1", text))
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3}(?!\d)|\d\d\{,\})", "", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text).replace("{,}", ",")
    if "dot" in text or ".." in text:
        text = _ENDLESS.sub(r"\1\\bar{\2}", _DOTTED.sub(r"\\bar{\1\2\3}", text))
    return _MORE_DIGITS.sub(r"\1", text)


_DOTTED = re.compile(r"(?<=[\d.])\\dot\s*\{?\s*(\d+)\s*\}?(?:(\d*)\\dot\s*\{?\s*(\d)\s*\}?)?")
_ENDLESS = re.compile(r"(\d\.\d{0,30}?)(\d{1,6}?)\2{2,}\s*(?:\\[lc]?dots(?![a-zA-Z])|\.{2,})(?!\s*\d)")
_MORE_DIGITS = re.compile(r"(\d\.\d+)\s*\\[lc]?dots(?=[\s)}]*$)")
"""0.1\\dot{6}, 0.1666... (three times or more), and 2.71828..., which says only that digits follow."""
_SIGN_IN_WORDS = re.compile(
    r"^\s*(?:\\text\s*\{\s*(?:negative|minus)\s*\}|(\\text\s*\{\s*)?(?:negative|minus)(?=\s))\s*(?=[\d.]|infinity|\\(?:frac|sqrt|pi|infty)(?![a-zA-Z]))",
    re.IGNORECASE,
)


def sign_in_words(text: str) -> str:
    r"""``\text{negative } 3`` is -3."""
    return _SIGN_IN_WORDS.sub(lambda match: f"{match[1] or ''}-", text)


_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_VALUES = {word: value for value, word in enumerate(_UNITS.split())}
_VALUES |= {
    word: 10 * value
    for value, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_PARTS = {"half": 2, "halve": 2, "quarter": 4} | {
    word: below
    for below, word in enumerate(["third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"], 3)
}
_PART = re.compile(rf"(?:(.+) and )?(?:(?:an?|(\w+))[ -])?(?:(?<![a-z])(?=hal)|(?<=[ -]))({'|'.join(_PARTS)})s?")
_GROUPS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


_NUMBER_WORD = "|".join([word for word, value in _VALUES.items() if value > 1] + ["hundred", *_GROUPS])
NUMBER_IN_WORDS = re.compile(
    rf"(?i)\b(?:(?:one |a )(?=hundred|thousand|million))?(?:{_NUMBER_WORD})(?:[ -](?:one\b(?! of)|{_NUMBER_WORD}|and(?= (?:{_NUMBER_WORD})\b)))*+\b(?![ -](?:and|half|halves|thirds?|quarters?|[a-z]+ths?)\b)"
)


def number_in_words(text: str) -> str:
    r"""The digits of a text that is a number in English words, alone or beside its digits: \text{forty-two}, seven (7), 7 (seven),
    one half; or one below a hundred in Chinese."""
    if han := re.fullmatch(r"(?=.)([二三四五六七八九]?十)?([零一二三四五六七八九]?)", text):
        tens = (unicodedata.numeric(han[1][0]) if len(han[1]) > 1 else 1) * 10 if han[1] else 0
        return f"{tens + (unicodedata.numeric(han[2]) if han[2] else 0):g}"
    if not re.search("[a-z]{3}", text, re.IGNORECASE) or len(text) > 150:
        return text
    pieces = [piece.strip() for piece in re.split(r"[()]", re.sub(r"\\text(?![a-z])|[{}]", " ", text)) if piece.strip()]
    values = {int(piece) if re.fullmatch(r"-?\d{1,15}", piece) else _worded(piece.lower()) for piece in pieces[:3]}
    return str(values.pop()) if len(pieces) < 3 and len(values) == 1 and None not in values else text


def _worded(text: str) -> Fraction | int | None:
    """Two hundred and five as 205, one and three quarters as 7/4; None for words in another order, and for other words."""
    if part := _PART.fullmatch(text):
        whole, above = _worded(part[1]) if part[1] else 0, _worded(part[2]) if part[2] else 1
        return None if whole is None or above is None else whole + Fraction(above, _PARTS[part[3]])
    if below_zero := re.match(r"(?:minus|negative) ", text):
        return -size if (size := _worded(text[below_zero.end() :]) or 0) > 0 else None
    text = re.sub(r"^a (?=hundred|thousand|million)", "one ", text)
    total, group, room, below = 0, 0, 100, 10**15
    words = re.split(r"[\s-]+", re.sub(r"(?<=hundred) and |(?<=thousand) and ", " ", text))
    for word in words:
        value = _VALUES.get(word)
        if value is not None and room >= (100 if value > 9 else 10) and (value or len(words) == 1):
            group, room = group + value, 10 if value > 19 else 0
        elif word == "hundred" and 0 < group < 100:
            group, room = group * 100, 100
        elif group and _GROUPS.get(word, below) < below:
            below = _GROUPS[word]
            total, group, room = total + group * below, 0, 100
        else:
            return None
    return total + group


_RESIDUE = re.compile(
    r"(?<=[\d}])\s*(?:\\[pb]?mod(?![a-zA-Z])\s*(?:\{\s*\d+\s*\}|\d+)|\(?\s*\\text\s*\{\s*\(?\s*mod\s*\}\s*\d+\s*\)?|\(\s*\\?mod\s*\d+\s*\))$"
)
"""Behind a number, of what it is the residue (or to be reduced by: 12 mod 7)."""


def without_modulus(text: str) -> str:
    """A residue alone: 5 of 5 mod 7. A number that is not below its modulus is none, and keeps it: 3 mod 2 is not the number 3."""
    if not (found := _RESIDUE.search(text)):
        return text
    *_, number = "", *(digits.lstrip("0") for digits in re.findall(r"\d+", text[: found.start()]))
    *_, modulus = (digits.lstrip("0") for digits in re.findall(r"\d+", found[0]))
    return text[: found.start()] if (len(number), number) < (len(modulus), modulus) else text


SENTENCE_STOP = re.compile(r"[.!?;](?=\s|$)|\n|[。；]")
"""The end of a sentence."""
_RESULT = re.compile(r"[\d)]\s*(?:[a-z]+\s+)?=[\s$]*\Z")
_NEW_CLAUSE = re.compile(
    r"[,;:.=\n]|\b(?:is|are|was|were|can|could|(?<!to )be|so|then|gives?|ma(?:kes?|king)|gets?|leav(?:es?|ing)|has|have|totals?|equals?|means)\b"
)
_SIDE_CLAUSE = re.compile(
    r"[,;]?\s*(?:\b(?:because|since|where|when|if|unless|while|whereas|given|although|(?:down|up)\s+from|instead\s+of|rather\s+than|compared|as\s+opposed)"
    r"|(?<=,\s)(?:as|with|saving|using|including|having|attained|reached|of\s+which|who(?:se|m)?|in(?!\s+(?:total|all)\b)|on|after|for(?!\s+a\b))(?!.*=)|(?:is|was)\s+(?:attained|reached|achieved|obtained))\b(?!.*(?:[,;:.]\s|\b(?:so|then|which|leaving|making|giving)\b|[=-]>|→))"
    r"|\s\((?:[^()]*[^()\s$-])?[\s$-]*$|\b(?:out\s+of|of\s+(?:the|all|those|his|her|their|its))\s+\$?$"
    r"|\b(?:for|at|with|from)\s+\$?\\?[a-zA-Z](?:_\{?\w+\}?|\d)?\s*=\s*$"
)
"""Behind a number, a clause that only says more of it: 14 buses, since 13 are too few."""
SAID_OF = re.compile(
    r"\b(?:(?:after|before)(?!\s+and\b)|(?:in|ex)cluding|below|under|above|within|over|during|across|into|on|at(?=\s+[a-z]{3})|by(?=\s+[a-z])|from(?=\s+(?:the|his|her|their|these|those)\b)|(?<!up )(?<!ends )(?<!ended )(?<!left )(?<!left him )(?<!left her )(?<!left them )with|per|among|for|between|from\s+\S+\s+(?:to|through)|up\s+to|(?<=[a-z]\s)(?:less|fewer|smaller|greater|larger)\s+than"
    r"|(?<=[a-z]\s)of|of(?=\s+[a-z])"
    r"|(?<!results )(?<!result )in(?!\s+(?:total|all)\b)|to\s+(?!(?:get|give|make|obtain|find|yield|become|have|total|about|only)\b)[a-z]{3,})\b"
    r"(?!.*\ban?\s+(?:\w+\s+){1,2}of[\s$]*$)"
)
"""Between two numbers, what makes the second a circumstance of the first: 15 hours to clean 45 rooms, 27 years old in 5 years."""
GIVEN = re.compile(
    r"(?i)\b(?:the|these|those|all|both|his|her|their|its|our|each|every|other|next|first|last|than|by|with|for|in|after|from|per"
    r"|add\w*|subtract\w*|multipl\w+|divid\w+|plus|minus|times)\s+\$?$"
)
"""Before a number that the sentence does not state as its result."""
_TOTAL = re.compile(
    r"(?:\s+\w+){0,2}?\s+(?:in\s+(?:total|all)|altogether|together|left|remain\w*|each(?!\s+[a-z])|apiece|dollars|cents|euros|ways)\b|\s*\)"
)
"""Behind a number that is a result of its own."""
_MORE_THAN = re.compile(r"\s*(?:[a-z]+\s+)?(?:more|\w+er)\s+than\b")


def main_number(text: str, numbers: list[re.Match[str]]) -> re.Match[str]:
    """The last number, or the one before it of which it is only said: the result in 60/4 = 15 hours for 45 rooms."""
    last = final = numbers[-1]
    own = _TOTAL.match(text, final.end())
    for match in numbers[-2:-12:-1]:
        between = text[match.end() : final.start()]
        if len(between) > 400 or SENTENCE_STOP.search(between):
            break
        side = _SIDE_CLAUSE.search(between)
        more = _MORE_THAN.match(text, final.end()) and re.fullmatch(r"[^,]{0,20},\s+(?:which\s+is\s+)?", between)
        if not more and _NEW_CLAUSE.search(between, 0, side.start() if side else len(between)):
            continue
        paid = own or (final[0][:1] == "$" != match[0][:1] and between.endswith("for "))  # 5 tickets for $75
        said = (side and not (paid and between.endswith("("))) or (
            not paid and SAID_OF.search(text, match.end(), last.start())
        )
        given = GIVEN.search(text, max(0, match.start() - 30), match.start())
        if _RESULT.search(text, 0, match.start()) or ((said or more) and not given):
            last = match
    return last


_GIVING_UP = (
    r"(?:\b(?:I|we|it|one|this|(?:answer|value|result|number)s?)\s+(?:can(?:not|\s+not|'t)|do(?:es)?(?:\s+not|n't)"
    r"|(?:am|are|is)\s+(?:unable|impossible)\s+to)|\bimpossible\s+to)\s+(?:be\s+)?(?:\w+\s+)?"
    r"(?:determined?|say|answer(?:ed)?|solved?|tell|know|decided?|concluded?)\b"
)
GIVES_UP = re.compile(_GIVING_UP, re.IGNORECASE)
_GAVE_UP = re.compile(
    rf"(?i)(?:不知道|不能?确定|无法)[^。！？\n]*$|{_GIVING_UP}(?:\s+(?:whether|if|that|from|with|by|the)\b[^.!?;:,\n]*|(?:\s+(?:it|this|that|the\s+\w+))?[.!]\s[^.!?\n]*)$"
)
"""Before a number: in its clause, or as the whole sentence before it."""
BOUND = re.compile(
    r"(?i)(?<!no )(?<!not )(?:\b(?:(?:more|less|\w+er)\s+than|twice|double|triple|between\s+\S+\s+and|half(?:\s+of)?(?:\s+the)?|(?:square|cube|root|third|quarter)\s+of)|(?:is|are|be|was)\s+(?:below|above|under|over)|exceeds?|(?:mehr|weniger)\s+als|(?:plus|moins|más|menos|mais)\s+de|(?:più|meno)\s+di|больше|меньше|более|менее|\d[$%\s]*(?:,\s*)?\bor(?:\s+else)?(?:[\s$]*[a-z]\s*=)?|\b(?:values|solutions|roots|answers)\s+are\s[^.\n]{0,40}\band|(?<=[\w)}] )[<>]|(?<=\w)<|[≤≥]|(?<![\w<]\w)(?<=\w)>|[≠]|!=|\\(?:leq?|geq?|[lg]t|neq?|not\s*(?:=|\\[a-z]+))(?![a-zA-Z])|[大小少]于|超过)[\s($*]*$"
)


def is_doubted(text: str, match: re.Match[str]) -> bool:
    """Whether the text gives up around a number ("I cannot say whether it is 5"), or states only a bound."""
    before, behind = text[max(0, match.start() - 100) : match.start()], text[match.end() :]
    sentence = behind[: end.start()] if (end := SENTENCE_STOP.search(behind)) else behind
    asked = end and end[0] == "?"
    return bool(asked or BOUND.search(before) or _GAVE_UP.search(before) or GIVES_UP.search(sentence))


_DENIED = re.compile(
    r"(?i)(?:(?:(?:\b|can)not|n't)(?:\s+(?:be|choose|pick|select|even))?|\b(?:nor|neither|(?:never|hardly|nobody|no\s+one)(?:\s+(?:would|could|can|should))?(?:\s+(?:be|choose|pick|select))?|rul(?:e|es|ed|ing)\s+out|eliminat\w+|exclud\w+|discard\w*|reject\w*"
    r"|nicht|niet|pas|não(?:\s+é)?|non(?:\s+è)?|no\s+es|y\s+no|(?:не|nie)(?:\s+(?:равно|равен|равна|jest|wynosi))?|není|inte|ikke|ei\s+ole|nem|nu\s+este|δεν\s+είναι|אינ[הו]|ليست|ไม่ใช่|bukan|would\s+have\s+been|ليس|không\s+phải(?:\s+là)?)"
    r"|(?:(?:n't|not)\s+(?:think|believe)|doubt)\s[\w\s]{0,30}|不[是能会应该可以要选]*|非|排除|除了)"
    r"[\s($*]*(?:(?:and|or|options?|choices?|the|both|[A-J])[\s()*,]+)*$"
)
"""Before a letter or number, what says that it is not the answer."""


def is_stated(text: str, match: re.Match[str]) -> bool:
    """Whether a letter or number is not denied in front: neither B, I rule out 5."""
    return not _DENIED.search(text[max(0, match.start() - 60) : match.start()])


_ASSUMED = re.compile(
    r"(?i)\b(?:let|suppos\w+|assum\w+|consider\w*|using|given\s+that|try(?:ing)?|if|unless|whether)\b[^.,;:\n\d]{0,30}$"
)
ALL_BUT = re.compile(
    r"(?i)(?:\b(?:all|any|every|each)(?:one|thing)?\b[^.,;:\n]{0,40}?\b(?:but|save)|(?<!no )(?<!none )(?<!nothing )(?<!no option )(?<!no choice )\b(?:except|besides|apart from|other than|excluding))"
    r"(?:\s+(?:for|the|option|choice|letter|answer))*[\s(*$]*$"
)
REFUTED = re.compile(
    r"[)*$}\s]*\s(?:\w+n't|(?:(?:does|do|did|will|could)\s+)?(?:not|cannot)|(?:is|was|are|were|seems?|looks?|appears?|turns\s+out|has|have|can|must|should|would)\s+(?:(?:to|be|been|also|just|far|\w+ly)\s+)*(?:not|wrong|incorrect|false|impossible|absurd|nonsense|implausible|unlikely|excluded|ruled|eliminated|rejected|dismissed|discarded|out|off|worse|less\s+\w+|too|(?:an?|the)\s+(?:distractor|trap)|an?\s+(?:upper|lower)\s+bound)"
    r"|may|might|could|fail(?:s|ed)?|(?:would\s+)?(?:violate|contradict)s?|has\s+the\s+wrong|değil\w*)\b|\s*नहीं|\s*(?:では|じゃ)(?:な|あり)|\s*[이가]?\s*아[니닙닌]"
)
"""Behind a letter or number that is not the answer."""
_NOT_IT = re.compile(
    rf"{REFUTED.pattern}|\?|\s+of\s+which\b|(?:(?<=the \d)|(?<=the \d\d)|(?<=the \d\d\d))(?:st|nd|rd|th)\b|\s*(?:s\.\s?f|sig(?:nificant)?\b|d\.\s?p|decimal)"
)
_NUMBERED = re.compile(
    r"(?i)\b(?:step|question|problem|equation|eq|figure|fig|section|example|chapter|page|table|theorem|lemma|exercise|version|reference|ref|aufgabe|problem[ae]|problème|задач\w|ejercicio|exercice)\.?[\s(#]*$|\\?p?mod(?:ulo)?[\s{]*$"
)


def stated_numbers(text: str, found: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """Those of the numbers found in a text that it neither denies, supposes nor counts its parts by: not "if n = 5", not "step 5"."""
    return [
        match
        for match in found
        if is_stated(text, match)
        and not _NOT_IT.match(text, match.end())
        and not any(
            before.search(text, max(0, match.start() - 60), match.start()) for before in (_ASSUMED, ALL_BUT, _NUMBERED)
        )
    ]
