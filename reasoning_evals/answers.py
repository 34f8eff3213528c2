r"""Finds the final answer in the answer part of a response (never in its thought).

In order: the last balanced ``\boxed{...}`` or ``\fbox{...}``, unless it is taken back at once and another answer given;
``"answer": X`` in JSON; ``#### X``; "the answer is X"; the whole text, if it is nothing but an answer; and as a last resort,
which the grade's reason mentions, the last number, option letter or formula.
Every search is linear in the text, or runs on its last few thousand characters.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_TEXT = 200_000
"""Only so many characters at the end of the answer part are searched."""
TAIL = 4_000
"""Answers without a box are searched in so many characters at the end."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"[^\s${}\\,;]+|\\[a-zA-Z]+[^\s$]*")
_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_PHRASE = re.compile(
    r"(?i)(?:(?m:^[#>*_ ]*(?:(?:final|correct) )?answer[*_ \t]*$)|(?:\b(?:answers?|réponse|antwort|respuesta|resposta|risposta|ответ)\b|答案|答え|정답|답)(?:[ \t]+to[^.\n]{0,80}?)?[ \t]*(?:\([^()\n]{0,40}\))?"
    r"[*_ \t]*(?:\b(?:is|are|equals|est|ist|es|é|è)\b|=>|[:：=是为は은])[ \t]*[:：]?)[*_\s]*(?=([^\n]+))"
)
_LEAD_WORDS = re.compile(r"(?i)(?:(?:therefore|thus|simply|then|that|about|approx\w*|option|choice|ca)\b\.?[\s,:]*)+")
_SENTENCE_END = re.compile(
    r"[。；]|です|입니다|이다|(?<!\bresp)(?<!\bapprox)(?<!\bca)(?<!\bvs)\.(?=\s|$)|;\s|,\s+(?=so\b|which\b|because\b|since\b|and\s+(?:so|we|the)\b)|\s+(?:because|since)\b"
)
_NUMBER = re.compile(
    r"(?<![^\W\u3040-\u9fff\uac00-\ud7a3])(?<![.^_{/])(?<![\^_{][-+\u2212])[-+\u2212]?\$?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?(?!\d)|\d{1,3}(?:(?:[^\S\n]|\\,)\d{3})+(?!\d)|\d+(?:(?:\.|,|\{,\})\d+)?|\.\d+)"
    r"(?:\s?(?:\\times|\\cdot|\u00d7|\*|[xX])\s?10\s?(?:(?:\^|\*\*)\s?[({]?\s?[-+\u2212]?\d+\s?[)}]?|[\u207b\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+)"
    r"|[eE][-+]?\d+)?(?:\s?/\s?\d+(?!\d|\.\d))?(?:\^(?:\{[^{}\\]{1,20}\}|[-+]?\d+)|[\u207b\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+)?(?:\s?\\?%|\s?(?:(?:[万萬億亿百만억천]|千(?![克米瓦卡]))|(?:dozen|hundred|thousand|million|billion|trillion)\b(?!-)))?"
)
_WITHIN = re.compile(r"\\(?:[dt]?frac|sqrt|[dt]?binom)(?![a-zA-Z])")  # the numbers in it are no answers
_UNIT_AFTER = re.compile(r"[ \t~]*(?:[A-Za-z\u00b0\u00b5\u03bc\u03a9\u00c5%\\][^\n,;()$]{0,40})?")
_LETTER = re.compile(
    r"(?<![\w\\'])(?<!\d )(?:\(([A-J])\)|\*\*([A-J])\*\*|([B-HJ])|(A|I)(?=[.):,]|\s*$))(?![\w'])"
    r"(?:(?<=but [A-J])|(?<=except [A-J])|(?!(?:\s*(?:,|and|or|&)\s*\(?[A-J]\)?)*\s+(?:is|was|are|were)\s*(?:not|n't|wrong|incorrect|false|excluded|eliminated|ruled|impossible)\b))"
)
_LINKED_LETTER = re.compile(r"(?<![\w'])([A-J])[)*\s]*(?:[,/&、和或与]|(?:,\s*)?(?:and|or)\b)?[\s(*]*$")
"""Before a letter, another one that is named with it: either B or C."""
_STATED_LETTER = re.compile(
    r"(?:\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+(?:is|would be|must be)|\s*:)|选[择项]*[ :：]*)[\s:*_(]*(?:\\text\s*\{\s*\(?)?"
    r"([A-HJ])(?![a-zA-Z0-9_']|\s*是?(?:[错不非误]|被?排除))"
    r"|(?<![\w\\'])([A-HJ])[)}*_$]*\s+(?:is|must be|would be)\s+(?:the\s+)?(?:correct|right|best|true|answer|only)\b"
)
_DENIED = re.compile(
    r"(?i)(?:(?:\b|can)not(?:\s+(?:be|choose|pick|select))?|\b(?:nor|neither|rul(?:e|es|ed|ing)\s+out|eliminat\w+|exclud\w+|discard\w*|reject\w*|nicht|pas)|n't|(?:n't|not)\s+(?:think|believe)\s[\w\s]{0,30}|不[是能会应该可以要选]*|非|排除|除了)"
    r"[\s($*]*(?:(?:and|or|options?|choices?|the|both|[A-J])[\s()*,]+)*$"
)
"""Before a letter or number, what says that it is not the answer."""
_GIVING_UP = (
    r"(?:\b(?:I|we|it|one|this|(?:answer|value|result|number)s?)\s+(?:can(?:not|\s+not|'t)|do(?:es)?(?:\s+not|n't)"
    r"|(?:am|are|is)\s+(?:unable|impossible)\s+to)|\bimpossible\s+to)\s+(?:be\s+)?(?:\w+\s+)?"
    r"(?:determined?|say|answer(?:ed)?|solved?|tell|know|decided?|concluded?)\b"
)
_GIVES_UP = re.compile(_GIVING_UP, re.IGNORECASE)
_GAVE_UP = re.compile(
    rf"(?i){_GIVING_UP}(?:\s+(?:whether|if|that)\b[^.!?;:,\n]*|(?:\s+(?:it|this|that|the\s+\w+))?[.!]\s[^.!?\n]*)$"
)
"""Before a number: in its clause, or as the whole sentence before it."""
_BOUND = re.compile(r"(?i)(?<!no )(?<!not )(?:\b(?:more|less|\w+er)\s+than|exceeds?|[大小少]于|超过)[\s($*]*$")
_RETRACTED = re.compile(
    r"(?i)\W*?(?:\b(?:wait|no|hmm+|oops|actually|sorry|rather|or|alternatively|maybe|perhaps|but (?:it )?(?:may|might|could))\b\W*?){1,6}(?:\b(?:or|it|is|be|it's|maybe|perhaps|possibly|should|may|might|could)\b\W*?){0,6}"
    r"(?<![\w.])([-\u2212$]*\d(?:[\d.,/]*\d)?|\(?[A-J]\b)[)$*}]*\s*(?:[.?!]|\n|$)"
)
"""Behind an answer, another in its place: 7. No, 8. That makes two of it, which no grader takes for one."""
_WRONG_BOX = re.compile(r"(?i)\}[^\w}]*(?:wait|correction|no(?=[,.:])|actually|hmm+|that(?:'s| is) (?:wrong|incor))")
_TRUTH = re.compile(
    r"(?i)\b(?:statement|claim|assertion|proposition|conjecture|it|this|that)\s+is\s+((?:not\s+)?(?:true|false|correct|incorrect))\b"
    r"|^\W*(yes|no|true|false)\s*[.,!:;*]"
)
_TAG = re.compile(r"<answer>(.{1,2000}?)</answer>", re.DOTALL)
_FIELD = re.compile(
    r'(?i)"(?:final[_ ]?)?answer"\s*:\s*(?:"((?:[^"\\]|\\.){1,500})"|(\{[^{}]{0,500}\}|[^",{}\s][^"{}\n]{0,500}?)(?=\s*(?:[}\n]|,\s*")))'
)
"""The answer in JSON, beside other fields."""
_MARKUP = re.compile(r"</?(?:b|strong|em|i|u|p|div|span|code|pre|center|font|h[1-6])>")
_NUMBERED = re.compile(r"(?i)\b(?:step|question|problem|equation|eq|figure|fig|section|example|chapter)\.?[\s(#]*$")
_WIDE = {ord(char): ord(char) - 0xFEE0 for char in "ＡＢＣＤＥＦＧＨＩＪ"}
_BARE_WORD = re.compile(r"(?:\x08|(?<![\\a-zA-Z])b)oxed(?=\s*\{)")
"""A box whose backslash was eaten on the way."""
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(((?:(?!\\\)).){1,400})\\\)|\\\[((?:(?!\\\]).){1,400})\\\]", re.DOTALL
)
_MENTION = re.compile(
    r"(\\(?:boxed|fbox))(?![a-zA-Z])(?:\s*\{([^{}]{0,60}(?:\{[^{}]{0,40}\})?\s{0,9})\}|(?=\s*(?:[.,;:!?)`'\"](?!\d)|[a-zA-Z]{2,})))(?:[.,:;](?=\s|$))?"
)
"""A box without an answer: the bare word in prose, or a box that may be a placeholder."""
_STOP_TOKEN = re.compile(
    r"<[|\uff5c][\w\u2581]{2,30}[|\uff5c]>|</s>|<eos>|<end_of_turn>|\[EOS\]|</?(?i:response|solution|conclusion|final_answer)>|\[(?:BEGIN|END) FINAL RESPONSE\]"
)
"""What is no text: stop tokens that an engine left in, and marks around a whole answer (Granite, Apriel)."""
_PLACEHOLDER = re.compile(
    r"(?i)(?:(?:the|your|my|final|numerical|correct) )*(?:answer|result|solution|number|value|letter|option|expression|choice)?(?: here)?"
    r" ?(?:\.{2,}|\u2026|\\[lc]?dots|\?|_+)?"
)
_STOP = re.compile(r"[.!?;](?=\s|$)|\n|[。；]")
"""The end of a sentence."""
_OF_FORM = re.compile(
    r"(?i)(?:\b(?:templates?|formats?|form|syntax|commands?|notation|latex|macro|example|placeholder|instructions?)\b[^.!?\n]*"
    r"|\b(?:in|inside|within|with|using|use|like)\s*[`'\"$]*)$"
)
"""Before a box of which the text only speaks."""
_WORD = re.compile(r"(?i)(?<![\\a-z])(?:[a-z]{3,}|(?:is|it|so|we|of|to|in|be|an|no|if|as|at|by|on|or|do|he)(?![a-z]))")
_BARE_CHOICE = re.compile(r"[*(\s]*(?:[A-Ja-j](?:[).:*]|\s*$)|(?:true|false|yes|no)\b[.*\s]*$)", re.I)
_BARE_NUMBER = re.compile(
    r"(?:\\?[a-zA-Z][\w{}\\']{0,15}\s*(?:=|\\approx|≈)\s*)?[-+\u2212~≈$.(\s]*(?:\d|\.\d|\\(?!text|mathrm)|π)"
)
_MATH_WORD = re.compile(r"(?i)(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|exp|sqrt|frac|ln|pi|and|or")


class Extraction(NamedTuple):
    """A final answer as written, and how it was found: box, hashes, phrase, whole, last number, last letter or last formula."""

    text: str
    method: str


def extract_answer(answer: str, answer_type: str, boxed: bool = True) -> Extraction | None:
    """The final answer of an answer part, or None. ``boxed``: look at boxes.

    ``answer_type`` decides what counts without a box: a last number for integer, number and quantity, an option letter
    for choice, a formula between dollar signs for expression and list.
    """
    answer = _without_mentions(_STOP_TOKEN.sub("\n", answer[-MAX_TEXT:]))
    box = last_box(answer) if boxed and not _is_cut(answer) else None
    if box is not None:
        behind = answer[max(answer.rfind("\\boxed"), answer.rfind("\\fbox"), 0) :][:TAIL]
        better = _WRONG_BOX.search(behind) and _phrase(behind)
        return Extraction(better, "phrase") if better else Extraction(box, "box")
    if boxed and _BOX.search(answer):
        return None  # cut off inside a box: the content may be half a number
    tags = _TAG.findall(answer[-TAIL:])
    tail = _MARKUP.sub("", tags[-1] if tags else answer[-TAIL:]).strip().translate(_WIDE)
    if fields := _FIELD.findall(tail):
        return Extraction((fields[-1][0].replace("\\\\", "\\") or fields[-1][1]).strip(), "phrase")
    if hashes := _HASHES.findall(tail):
        return Extraction(hashes[-1].strip(), "hashes")
    if phrase := _phrase(tail):
        return Extraction(phrase, "phrase")
    if _is_bare(tail, answer_type):
        return Extraction(tail, "whole")
    return _last_resort(tail, answer_type) or (Extraction(tail, "whole") if tags and tail else None)


def boxes(text: str) -> list[str]:
    r"""Contents of all balanced boxes in order of their closing, inner boxes unwrapped, without empty ones.

    >>> boxes(r"\boxed{1} or \boxed{\frac{1}{2}} or \boxed{3")
    ['1', '\\frac{1}{2}']
    """
    text = _BARE_WORD.sub(r"\\boxed", _without_mentions(text))
    starts = list(_BOX.finditer(text))
    if not starts:
        return []
    closing = _closing_braces(text, starts[0].start())
    found = []
    outer_end = -1
    for start in starts:
        position = start.end()
        if position < outer_end:
            continue  # a box inside a box is part of it
        if text.startswith("{", position):
            end = closing.get(position)
            if end is None:
                continue
            content, outer_end = text[position + 1 : end], end
        else:
            bare = _BARE_BOX.match(text, position)
            content = bare.group() if bare else ""
        content = _unwrap(content.strip())
        if content:
            found.append(content)
    return found


def _without_mentions(text: str) -> str:
    r"""The text without boxes that hold no answer: "put it in \boxed", "in \boxed{...}"."""

    def kept(match: re.Match[str]) -> str:
        inside = match[2]
        words = None if inside is None else " ".join(re.sub(r"\\text|[{}]", " ", inside).split())
        return "" if words is None or _PLACEHOLDER.fullmatch(words) else match[0]

    return _MENTION.sub(kept, text) if "\\boxed" in text or "\\fbox" in text else text


def last_box(text: str) -> str | None:
    """The content of the last balanced box that is not empty."""
    found = boxes(text) if "boxed" in text or "\\fbox" in text or "\x08oxed" in text else []
    return found[-1] if found else None


def _closing_braces(text: str, start: int) -> dict[int, int]:
    """Position of each opening brace from ``start`` on -> position of its closing brace; escaped braces do not count."""
    stack: list[int] = []
    closing: dict[int, int] = {}
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            closing[stack.pop()] = match.start()
    return closing


def _is_cut(text: str) -> bool:
    """Whether the text ends inside a last box that is not the mention of one: an earlier box is not the answer."""
    last = text.rfind("\\boxed")
    match = _BOX.match(text, last) if last >= 0 else None
    if not match or not text.startswith("{", match.end()) or match.end() in _closing_braces(text, last):
        return False
    return not _STOP.search(text, match.end()) and not _OF_FORM.search(text, max(0, last - TAIL // 40), last)


def _unwrap(content: str) -> str:
    """The content of boxes that contain only another box."""
    for _ in range(4):
        match = _BOX.match(content)
        if not match or not content.startswith("{", match.end()):
            break
        if _closing_braces(content, match.end()).get(match.end()) != len(content) - 1:
            break
        content = content[match.end() + 1 : -1].strip()
    return content


def _phrase(tail: str) -> str | None:
    """The text after the last "answer is", up to the end of its sentence, with what is put in its place there."""
    *_, last = None, *_PHRASE.finditer(tail)
    if last is None:
        return None
    start = last.end() + (len(lead[0]) if (lead := _LEAD_WORDS.match(last[1])) else 0)
    end = _SENTENCE_END.search(tail, start, last.end(1))
    stop = end.start() if end else last.end(1)
    text = tail[start:stop].strip().strip("*_ ").lstrip("} ")
    text = text[:-1] if text.endswith("}") and text.count("{") < text.count("}") else text  # \\textbf{Answer: 5}
    other = _RETRACTED.match(tail, stop)
    return (f"{text} or {other[1]}" if other and other[1] != text else text) or None


def _is_bare(tail: str, answer_type: str) -> bool:
    """Whether the text is only an answer: one short line that is not a sentence."""
    if not tail or len(tail) > 200 or "\n" in tail:
        return False
    if answer_type == "choice":
        return bool(_BARE_CHOICE.match(tail))
    words = [word for word in _WORD.findall(tail) if not _MATH_WORD.fullmatch(word)]
    if answer_type in ("integer", "number", "quantity"):
        return len(words) <= 3 and bool(_BARE_NUMBER.match(tail)) and not tail.endswith("?")
    return not words and not ("$" in tail and re.search(r"[a-zA-Z]{2}", _FORMULA.sub("", tail)))


def _is_stated(text: str, match: re.Match[str]) -> bool:
    return not _DENIED.search(text[max(0, match.start() - 60) : match.start()])


def _is_doubted(text: str, match: re.Match[str]) -> bool:
    """Whether the text gives up around a number ("I cannot say whether it is 5"), or states only a bound."""
    before, behind = text[max(0, match.start() - TAIL // 40) : match.start()], text[match.end() :]
    sentence = behind[: end.start()] if (end := _STOP.search(behind)) else behind
    return bool(_BOUND.search(before) or _GAVE_UP.search(before) or _GIVES_UP.search(sentence))


def _last_resort(tail: str, answer_type: str) -> Extraction | None:
    if answer_type in ("integer", "number", "quantity"):
        numbers = [
            match
            for match in _NUMBER.finditer(tail)
            if _is_stated(tail, match)
            and tail[match.end() : match.end() + 1] != "?"
            and not _NUMBERED.search(tail, max(0, match.start() - 20), match.start())
        ]
        if _WITHIN.search(tail, numbers[-1].end() if numbers else 0):
            formula = ([""] + [next(filter(None, groups)) for groups in _FORMULA.findall(tail)])[-1]
            given = _WITHIN.search(formula) and not _GIVES_UP.search(tail)
            return Extraction(formula.strip(), "last formula") if given else None
        if not numbers or _is_doubted(tail, numbers[-1]):
            return None
        text = numbers[-1].group()
        if answer_type == "quantity":
            unit = _UNIT_AFTER.match(tail, numbers[-1].end())
            rest = unit.group() if unit else ""
            end = _SENTENCE_END.search(rest)
            text += rest[: end.start()] if end else rest
        return Extraction(text.strip(), "last number")
    if answer_type == "choice":
        if stated := [match for match in _STATED_LETTER.finditer(tail) if _is_stated(tail, match)]:
            return Extraction(stated[-1][1] or stated[-1][2], "stated letter")
        if letters := [match for match in _LETTER.finditer(tail) if _is_stated(tail, match)]:
            letter, start = next(filter(None, letters[-1].groups())), letters[-1].start()
            other = _LINKED_LETTER.search(tail, max(0, start - 20), start)
            unsure = other and other[1] != letter and _is_stated(tail, other)
            return None if unsure else Extraction(letter, "last letter")
        words = {(said or first).lower() for said, first in _TRUTH.findall(tail)}
        return Extraction(words.pop(), "stated word") if len(words) == 1 else None
    formulas = [next(filter(None, groups)) for groups in _FORMULA.findall(tail)]
    return Extraction(formulas[-1].strip(), "last formula") if formulas else None
