r"""Finds the final answer in the answer part of a response (never in its thought).

In order: the last balanced ``\boxed{...}`` or ``\fbox{...}``, unless it is taken back at once and another answer given;
``"answer": X`` in JSON; ``#### X``; "the answer is X"; the whole text, if it is nothing but an answer; and as a last resort,
which the grade's reason mentions, the last number, option letter or formula.
Every search is linear in the text, or runs on its last few thousand characters.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from reasoning_evals.grading.characters import (
    ALL_BUT,
    BOUND,
    GIVEN,
    GIVES_UP,
    NUMBER_IN_WORDS,
    REFUTED,
    SAID_OF,
    SENTENCE_STOP,
    is_doubted,
    is_stated,
    main_number,
    stated_numbers,
)
from reasoning_evals.grading.records import BOX, boxes, closing_braces, last_box, without_mentions

MAX_TEXT = 200_000
"""Only so many characters at the end of the answer part are searched."""
TAIL = 4_000
"""Answers without a box are searched in so many characters at the end."""

_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_PHRASE = re.compile(
    r"(?i)(?:(?m:^[#>*_ ]*(?:(?:final|correct) )?answer[*_ \t]*$)|(?:\b(?:answers?|réponse|antwort|respuesta|resposta|risposta|ответ)\b|答案|答え|正解|정답|답)(?:[ \t]+to[^.\n\x22]{0,80}?(?:\x22[^\x22\n]{0,200}\x22)?)?[ \t]*(?:\([^()\n]{0,40}\))?"
    r"[*_ \t]*(?:\b(?:is|are|(?:would|must|should|has to) be|equals|est|ist|es|é|è)\b|=>|[:：=是为は은])[ \t]*[:：]?)[*_\s]*(?:(?<=\n)(?:[-•>]\s+|=+\s*\n))?(?:(?:\$\$|\\\[)\s*\n\s*)?(?=([^\n]+))"
)
_SUPPOSED = re.compile(
    r"(?i)\b(?:if|whether|suppos\w+|assum\w+|unless|when)\s[^.,;:\n]{0,30}$|(?:不知道|不能?确定|无法)[^。！？\n]{0,20}$"
)
_NOUN_BEFORE = re.compile(
    r"(?i)\b(?:the\s+(?!(?:option|choice|answer|letter|statement|alternative|only|best|right|correct|one)\b)[a-z]+|let|point|angle|triangle|line|plan|grade|section|part|class|type|group|vitamin"
    r"|matrix|set|event|vertex|constant|figure|table|appendix|units?\s+of|cross(?:ed)?\s+out|remov\w+|skip|ignore|forget|avoid|drop|tempt\w+\s+to\s+\w+|(?<!other )than|instead\s+of|over|beats?|beware\s+of|unlike|although|though|(?:programming|written)\s+in)\s+$|(?:^|[^A-Za-z])[A-Za-z]{1,2}\s*[<>=]\s*$"
)
"""Before a letter that names something else than an option."""
_ON_CONDITION = re.compile(
    r"[)*]*\s+(?:(?!(?:as|was|has|does|this|thus|always|fits|matches|works|holds|remains|agrees|satisfies|gives|wins|beats|seems|looks|appears|turns|shows|states|says|describes|represents|explains|corresponds|follows|stands)\b)[a-z]{2,}s\b|(?:would\s+be\s+\w+\s+)?(?:only\s+)?(?:if|unless)\b|would\s+have\s+been\b|[^.;\n]{0,40}?,\s+(?:which|and\s+th(?:is|at))\s+is\s+(?:wrong|incorrect|impossible|too)\b)"
)
_LEFT_OUT = re.compile(
    r"(?i)[^.;\n]{0,60}?\b(?:not|wrong|incorrect|false|impossible|excluded|eliminated|ruled|fail\w*|violat\w+|contradict\w*)\b|[^.;\n]{0,60}?n't\b"
)
"""All options but this one are wrong: that one is right."""
_SENTENCE = re.compile(
    r"(?!.*(?<!\\)\b(?i:not|multiple|divisor|factor|power|root|square|at\s+least|at\s+most|between|either|or|plus|minus|times|twice|half|less|more|than)\b)(?:[A-Z][a-z]*|there|we|it|s?he|they),?(?:\s+[^\W\d_]+,?)+\b"
)
"""The beginning of a whole sentence behind "Answer:", which has its number later on."""
_LEAD_WORDS = re.compile(r"(?i)(?:(?:therefore|thus|simply|then|that|about|approx\w*|option|choice|ca)\b\.?[\s,:]*)+")
_SENTENCE_END = re.compile(
    r"[。；]|です|입니다|이다|(?<!\bresp)(?<!\bapprox)(?<!\bca)(?<!\bvs)\.(?=\s|$)|;\s|,\s+(?=(?:so|which|as|where|for\s+(?:all|any|every)|porque|ya que|car|da|denn|weil|perché|pois|puisque|так как|and\s+(?:so|we|the))\b)|[(（,，]\s*(?:因为|因為|而?不是|而非)|!(?=\s+[A-Z\u2600-\U0001ffff])|\s+[—–]\s+(?=[a-z])"
    r"|[\s,(]+(?:because|since|check|i\.\s?e\.|as opposed to|compared (?:to|with)|with (?=\d+\s?\\?% (?:conf|cert))|(?:(?:and|but)\s+)?(?:not|rather\s+than|instead\s+of)\s+(?=\S*\d|[^\s\w]))|(?<=\*\*)\s+\(|\s\((?:\d+\s[a-z]{3}|(?:we|as|to|see|using|after|rounded|the)\s)"
)
_NUMBER = re.compile(
    r"(?<![^\W\u3040-\u9fff\uac00-\ud7a3])(?<![.^_{/√])(?<![\^_{][-+\u2212])[-+\u2212]?\$?(?:\d{1,3}(?:(?:,|\u066c|\{,\})\d{3})+(?:[.\u066b]\d+)?(?!\d)|\d{1,3}(?:(?:[^\S\n]|\\,)\d{3})+(?!\d)|\d+(?:(?:[.,\u066b]|\{,\})\d+)?|\.\d+)"
    r"(?:\s?(?:\\times|\\cdot|\u00d7|\*|[xX])\s?10\s?(?:(?:\^|\*\*)\s?[({]?\s?[-+\u2212]?\d+\s?[)}]?|[\u207b\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+)"
    r"|[eE][-+]?\d+)?(?:\s?/\s?\d+(?!\d|\.\d))?(?:\^(?:\{[^{}\\]{1,20}\}|[-+]?\d+)|[\u207b\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+)?(?:\s?\\?%|\s?(?:(?:[万萬億亿百만억천]|千(?![克米瓦卡]))|(?:dozen|hundred|thousand|million|billion|trillion)\b(?!-)))?"
)
_WITHIN = re.compile(r"\\(?:[dt]?frac|sqrt|[dt]?binom)(?![a-zA-Z])")  # the numbers in it are no answers
_UNIT_AFTER = re.compile(r"[ \t~]*(?:[A-Za-z\u00b0\u00b5\u03bc\u03a9\u00c5%\\][^\n,;()$]{0,40})?")
_LETTER = re.compile(
    r"(?<![\w\\'°^])(?<!\d )(?<!circ )(?:\(([A-J])\)|\*\*([A-J])\*\*|([B-HJ])|((?<=[a-z] )A|[AI](?=[.):,]|\s*$)))(?![\w'])"
    r"(?:(?<=but [A-J])|(?<=except [A-J])|(?!(?:\s*(?:,|and|or|&)\s*\(?[A-J]\)?)*\s+(?:is|was|are|were)\s*(?:not|n't|wrong|incorrect|false|excluded|eliminated|ruled|impossible)\b|\s+(?:no|não|non|nie|не)\s+\w|\s*[<>=]\s*[\w\\]|\s+is\s+(?:the|an?)\s+\w+\s+of\b))"
)
_LINKED_LETTER = re.compile(
    r"(?<![\w'])(?<!\d )([A-Z])[)*\s\x22']*(?:[,/&、和或与–→-]|(?:[,;]\s*)?(?:and|or|to|as\s+well\s+as|maybe|perhaps|possibly|vs\.?|versus)\b)?[\s(*\x22']*$"
)
"""Before a letter, another one that is named with it: either B or C."""
_STATED_LETTER = re.compile(
    r"(?:\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+(?:is|would be|must be)|\s*:)|选[择项]*是?[ :：]*)[\s:*_(]*(?:\\text\s*\{\s*\(?)?"
    r"([A-HJ])(?![a-zA-Z0-9_']|\s*是?(?:[错不非误]|被?排除))"
    r"|(?<![a-zA-Z0-9_\\'])([A-HJ])[)}*_$]*(?:\s+(?:is|must be|would be)\s+(?:the\s+)?(?:correct|right|best|true|answer|only)\b|(?:选?项)?是?正确|が正)"
)
_AS_ANSWER = re.compile(r"(?i)[)*$}\s]*\s(?:is|as)\s+(?:the|my|our)\s+(?:final\s+|correct\s+)?answer\b")
_RETRACTED = re.compile(
    r"(?i)\W*?(?:\b(?:wait|hold on|no|hmm+|oops|actually|sorry|rather|or|alternatively|maybe|perhaps|let me re\w+|(?:which|that) (?:makes?|gives?|totals|comes to|adds up to)|(?:i|we) (?:forgot|missed|made|miscounted)\b[^.!?\n]{0,50}?|but (?:it )?(?:may|might|could))\b\W*?){1,6}(?:\b(?:or|so|it|is|be|it's|maybe|perhaps|possibly|should|may|might|could)\b\W*?){0,6}"
    r"(?<![\w.])([-\u2212$]*\d(?:[\d.,/]*\d)?|\(?[A-J]\b)[)$*}]*\s*(?:[.?!]|\n|$)"
)
"""Behind an answer, another in its place: 7. No, 8. That makes two of it, which no grader takes for one."""
_WRONG_BOX = re.compile(r"(?i)\}[^\w}]*(?:wait|correction|no(?=[,.:])|actually|hmm+|that(?:'s| is) (?:wrong|incor))")
_EITHER_BOX = re.compile(r"\}[$\s)*\\]*,?\s*\bor\s+[$*(]*$")
_TRUTH = re.compile(
    r"(?i)\b(?:statement|claim|assertion|proposition|conjecture|it|this|that)\s+is\s+((?:not\s+)?(?:true|false|correct|incorrect))\b"
    r"|^\W*(?:(?:therefore|thus|so|hence),?\s+)?(yes|no|true|false)\s*[.,!:;*]"
)
_TAG = re.compile(r"<answer>(.{1,2000}?)</answer>", re.DOTALL)
_FIELD = re.compile(
    r'(?i)"(?:final[_ ]?)?answer"\s*:\s*(?:"((?:[^"\\]|\\.){1,500})"|(\{[^{}]{0,500}\}|[^",{}\s][^"{}\n]{0,500}?)(?=\s*(?:[}\n]|,\s*")))'
)
"""The answer in JSON, beside other fields."""
_MARKUP = re.compile(
    r"</?(?:b|strong|em|i|u|span|code|pre|center|font|mark)\b[^<>]{0,80}>|\\(?:underline|textbf|mathbf|textit|emph|text|mathrm)\s*\{((?:[^{}a-zA-Z\\]|\{,\})*\d(?:[^{}a-zA-Z\\]|\{,\})*)\}"
)
"""Marks of pages, and of LaTeX around a numeral."""
_BLOCK = re.compile(r"</?(?:p|div|h[1-6]|li|ul|ol|td|th|tr|table|tbody|br|hr)\b[^<>]{0,80}>|&nbsp;")
_WIDE = {ord(char): ord(char) - 0xFEE0 for char in "ＡＢＣＤＥＦＧＨＩＪ"}
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(((?:(?!\\\)).){1,400})\\\)|\\\[((?:(?!\\\]).){1,400})\\\]", re.DOTALL
)
_STOP_TOKEN = re.compile(
    r"<[|\uff5c][\w\u2581]{2,30}[|\uff5c]>|</s>|<eos>|<end_of_turn>|\[EOS\]|</?(?i:response|solution|conclusion|final_answer)>|\[(?:BEGIN|END) FINAL RESPONSE\]"
)
"""What is no text: stop tokens that an engine left in, and marks around a whole answer (Granite, Apriel)."""
_TURN_END = re.compile(r"<\|(?:im_end|eot_id|endoftext|eot)\|>|<end_of_turn>")
_OF_FORM = re.compile(
    r"(?i)(?:\b(?:templates?|formats?|form|syntax|commands?|notation|latex|macro|example|placeholder|instructions?)\b[^.!?\n]*"
    r"|\b(?:in|inside|within|with|using|use|like)\s*[`'\"$]*)$"
)
"""Before a box of which the text only speaks."""
_WORD = re.compile(r"(?i)(?<![\\a-z])(?:[a-z]{3,}|(?:is|it|so|we|of|to|in|be|an|no|if|as|at|by|on|or|do|he)(?![a-z]))")
_BARE_CHOICE = re.compile(
    r"[*(\s]*(?:[A-Ja-j](?:[).:*]|\s*$|,\s+(?:because|since|as)\b)|(?:true|false|yes|no)\b[.*\s]*$)", re.I
)
_BARE_NUMBER = re.compile(
    r"(?:\\?[a-zA-Z][\w{}\\']{0,15}\s*(?:=|\\approx|≈)\s*)?[-+\u2212~≈$.(\s]*(?:\d|\.\d|\\(?!text|mathrm)|π)"
)
_SENTENCE_WITH = re.compile(
    rf"\banswer\b|\d\D*{SAID_OF.pattern}\D*\d|\d.*\b(?:is|are|gives?|costs?|makes?|equals?|but|hence)\b.*\d|\d\s+[a-z]{{3,}}\s+(?!and\b|or\b)[a-z]{{3,}}\s+\$?\d|^\W*(?i:let|suppose|assume|consider|if|unless|does|is|trying)\b"
)
"""A short text that is a sentence: 60 pencils in 5 boxes."""
_OR = re.compile(r"\s*,?\s*\bor\s+")
_LINK = re.compile(r"\s*(?:,\s*)?(?:\b(?:or|and|und|oder|et|ou|y)\s+|,\s+|[或和、]\s*)")
_OF_SYMBOL = re.compile(
    r"\b(?:for\s+(?:all|any|every|each)|where|in\s+terms\s+of|with\s+respect\s+to)\b[^.$]{0,25}[$\s(\\]*$"
)
"""Before a formula that only says for what the one before it holds."""
_NAMED_LIST = re.compile(
    r"(?i)\b(?:solutions|roots|zeros|values|numbers)\b[^.\n:]{0,40}?(?:\bare:?|:)\s+([^\n]{1,200}?)(?:\.(?=\s|$)|\n|$)"
)
_NUMERIC = ("integer", "number", "quantity")
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
    answer = without_mentions(_STOP_TOKEN.sub("\n", answer[-MAX_TEXT:]))
    box = last_box(answer) if boxed and not _is_cut(answer) else None
    if box is not None:
        behind = answer[max(answer.rfind("\\boxed"), 0) :][:TAIL]
        better = _WRONG_BOX.search(behind) and _phrase(behind)
        if better and re.search(r"[\d\\$]|^\W*[A-J]\b", better):  # not "the number of edges"
            return Extraction(better, "phrase")
        if _EITHER_BOX.search(answer, max(0, answer.rfind("\\boxed") - 20), answer.rfind("\\boxed")):
            box = " or ".join(boxes(answer)[-2:])
        return Extraction(box, "box")
    if boxed and BOX.search(answer):
        return None  # cut off inside a box: the content may be half a number
    tags = _TAG.findall(answer[-TAIL:])
    tail = _BLOCK.sub("\n", tags[-1] if tags else answer[-TAIL:])
    tail = _MARKUP.sub(r"\1", tail).strip().translate(_WIDE)
    if fields := _FIELD.findall(re.sub(r"(?<=[{,:\s])'([^'\n]{0,200})'(?=\s*[:,}])", r'"\1"', tail)):
        return Extraction((fields[-1][0].replace("\\\\", "\\") or fields[-1][1]).strip(), "phrase")
    if hashes := _HASHES.findall(tail):
        return Extraction(hashes[-1].strip(), "hashes")
    if phrase := _phrase(tail):
        told = _last_number(phrase, answer_type) if answer_type in _NUMERIC and _SENTENCE.match(phrase) else None
        return told or Extraction(phrase, "phrase")
    if _is_bare(tail, answer_type):
        end = _SENTENCE_END.search(tail) if answer_type in _NUMERIC else None
        return Extraction(
            tail[: end.start()] if end and not re.match(r";\s*[-$]?\d", end[0] + tail[end.end() :]) else tail, "whole"
        )
    return _last_resort(tail, answer_type) or (Extraction(tail, "whole") if tags and tail else None)


def first_turn(answer: str) -> str:
    """An answer without what follows its stop token: an engine that did not stop let the model write the next question, and its answer."""
    return next(filter(str.strip, _TURN_END.split(answer)), "")


def _is_cut(text: str) -> bool:
    """Whether the text ends inside a last box that is not the mention of one: an earlier box is not the answer."""
    last = text.rfind("\\boxed")
    match = BOX.match(text, last) if last >= 0 else None
    if not match or not text.startswith("{", match.end()) or match.end() in closing_braces(text, last):
        return False
    return not SENTENCE_STOP.search(text, match.end()) and not _OF_FORM.search(text, max(0, last - TAIL // 40), last)


def _phrase(tail: str) -> str | None:
    """The text after the last "answer is", up to the end of its sentence, with what is put in its place there."""
    said = [one for one in _PHRASE.finditer(tail) if not _SUPPOSED.search(tail, max(0, one.start() - 40), one.start())]
    if not said:
        return None
    last = said[-1]
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
    if answer_type in _NUMERIC:
        if _SENTENCE_WITH.search(tail):
            return False
        return len(words) <= 3 and bool(_BARE_NUMBER.match(tail)) and not tail.endswith("?")
    return not words and not ("$" in tail and re.search(r"[^\W\d_]{2}", _FORMULA.sub("", tail)))


def _is_chosen(text: str, match: re.Match[str]) -> bool:
    """Whether a letter is neither denied, nor supposed ("if the answer is C"), nor what all the others are without ("all but C")."""
    before = text[max(0, match.start() - 60) : match.start()]
    if all_but := ALL_BUT.search(before):
        ruled_out = re.search(r"rul\w+\s+out|eliminat|exclud|reject", before[: all_but.start()])
        return bool(ruled_out or _LEFT_OUT.match(text, match.end()))
    end = SENTENCE_STOP.search(text, match.end())
    other = any(pattern.search(before) for pattern in (_SUPPOSED, _NOUN_BEFORE)) or (
        end and end[0] == "?" and match.re is _STATED_LETTER
    )
    other = other or any(pattern.match(text, match.end()) for pattern in (REFUTED, _ON_CONDITION))
    return is_stated(text, match) and not other


def _last_resort(tail: str, answer_type: str) -> Extraction | None:
    if answer_type in _NUMERIC:
        return _last_number(tail, answer_type)
    if answer_type == "choice":
        if stated := [match for match in _STATED_LETTER.finditer(tail) if _is_chosen(tail, match)]:
            return Extraction(stated[-1][1] or stated[-1][2], "stated letter")
        if letters := [match for match in _LETTER.finditer(tail) if _is_chosen(tail, match)]:
            letter, start = next(filter(None, letters[-1].groups())), letters[-1].start()
            other = _LINKED_LETTER.search(tail, max(0, start - 20), start)
            end = SENTENCE_STOP.search(tail, letters[-1].end())
            unsure = (end and end[0] == "?") or (other and other[1] != letter and is_stated(tail, other))
            return None if unsure else Extraction(letter, "last letter")
        words = {(said or first).lower() for said, first in _TRUTH.findall(tail)}
        return Extraction(words.pop(), "stated word") if len(words) == 1 else None
    return _last_formula(tail, answer_type)


def _last_number(tail: str, answer_type: str) -> Extraction | None:
    tail = re.sub(r"(\\(?:equiv|approx|simeq|to|Rightarrow|implies))(?=-?\d)", r"\1 ", tail)
    numbers = stated_numbers(tail, _NUMBER.finditer(tail))
    if _WITHIN.search(tail, numbers[-1].end() if numbers else 0):
        formula = None if GIVES_UP.search(tail) else _last_formula(tail, answer_type)
        return formula if formula and _WITHIN.search(formula.text) else None
    if not re.search(r"\d", tail):
        words = stated_numbers(tail, NUMBER_IN_WORDS.finditer(tail))
        words = [word for word in words if not GIVEN.search(tail, max(0, word.start() - 30), word.start())]
        numbers = words if len(words) == 1 else []
    named = [match for match in numbers if _AS_ANSWER.match(tail, match.end())]
    last = named[-1] if named else main_number(tail, numbers) if numbers else None
    if last is None or is_doubted(tail, last):
        return None
    text = last.group()
    if answer_type == "quantity":
        unit = _UNIT_AFTER.match(tail, last.end())
        rest = unit.group() if unit else ""
        end = _SENTENCE_END.search(rest) or (last is not numbers[-1] and SAID_OF.search(rest))
        text += rest[: end.start()] if end else rest
    return Extraction(text.strip(), "last number")


def _last_formula(tail: str, answer_type: str) -> Extraction | None:
    """The last formula that is neither denied nor only compared with, and those that are joined to it: $x<1$ or $x>3$."""
    found: list[tuple[str, int]] = []
    for match in _FORMULA.finditer(tail):
        text = next(filter(None, match.groups()))
        link = tail[found[-1][1] : match.start()] if found else ""
        if found and (_LINK if answer_type == "list" else _OR).fullmatch(link):
            found[-1] = (f"{found[-1][0]}{', ' if answer_type == 'list' else link}{text}", match.end())
        elif found and _OF_SYMBOL.search(tail, max(0, match.start() - 40), match.start()):
            continue
        elif is_stated(tail, match) and not BOUND.search(tail, max(0, match.start() - 40), match.start()):
            found.append((text, match.end()))
    if answer_type == "list" and not found and (named := _NAMED_LIST.findall(tail)):
        return Extraction(named[-1], "phrase")
    return Extraction(found[-1][0].strip(), "last formula") if found else None
