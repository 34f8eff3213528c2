"""Where a step of reasoning ends, token by token: sentences, lines, paragraphs; and where a word does.

Most full stops are seen at once: ".\n" or "?" ends a sentence by its own text, and so does "." after a word. A "." after a
digit or a single letter may go on ("3.14", "e.g."), and so may "...": there the next token is needed, and the sentence ends
at that next token, if it begins with white space. No sentence ends after an abbreviation ("approx.", "i.e."), or after the
number or letter of a list ("2.", "B." at the start of a line). LaTeX's and Markdown's closers may stand behind the stop (".$",
".}", ".**"). Whether a single capital ends a sentence ("at the point B. Then") or is an initial ("R. Feynman"), that next token
decides too, by its word: a sentence begins with one of a few hundred words (those below open 98% of the sentences of recorded
DeepSeek-R1 traces), a name with any other. So a capital that goes on with such a word, a digit or a sign ends its sentence, and one
that goes on with another word is an initial. A letter behind a digit or a sign of a formula ("5 N. Energy", "E = F. Current") is a
unit or a variable, whatever follows.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_LETTERS = frozenset(string.ascii_letters)
_SPACES = str.maketrans(
    {"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"}
)  # the characters with which vocabularies write white space
_OPENERS = frozenset(
    """
    According Actually Adding Additionally After Again All Alright Also Although Alternative Alternatively An And Angular Another
    Any Anyway Applying Approximately Are As Ask Assume Assuming At Based Because Before Besides Between Both But By Calculate
    Calculating Can Case Charge Check Choose Choosing Clearly Combine Combining Compare Compared Comparing Compute Computing
    Consequently Consider Considering Conservation Conversely Convert Converting Correct Could Current Define Denominator
    Depending Determine Did Differentiating Direction Divide Dividing Does Done Double Due During Each Earlier Either Electric
    Energy Equating Equation Even Every Exactly Expand Expanding Express Expressed Expressing Factor Final Finally Find Finding
    First For Force From Further Furthermore Given Going Good Got Has Have Hence Here His Hmm Hold How However I If Imagine
    Important In Indeed Initially Inside Instead Integrate Integrating Interesting Is Isn It Its Just Knowing Last Later Left Let
    Like Likewise Looking Magnetic Many Mass Maybe Meanwhile Moreover Most Moving Multiply Multiplying My Near Need Neither Next
    No Nor Normally Not Note Nothing Notice Now Numerator Numerically Of Okay On Once One Only Option Or Original Other
    Otherwise Our Outside Over Part Perhaps Please Plug Plugging Potential Power Presumably Previously Probably Putting Question
    Rather Really Rearranging Recall Remember Right Rounding Same Say Second See Seems Set Setting She Should Show Similar
    Similarly Simplify Simplifying Since So Solve Solving Some Specifically Starting Step Still Substitute Substituting Subtract
    Subtracting Such Summing Suppose Surface Sure Surely Take Taking Than That The Their Then There Therefore These They Third
    This Those Though Three Thus Time To Together Total Try Two Typically Under Unless Until Upon Use Using Usually Very Wait
    Was We Well Were What When Whenever Where Whereas Wherever Whether Which While Who Why With Without Would Write
    Writing Yeah Yep Yes Yet You Your
    """.split()  # noqa: SIM905 -- a column of words would take three hundred lines
)
_LONG = 5
"""Letters by which the first token of a longer word is known for the beginning of an opener ("Subst" of "Substituting")."""
_FIRST_PIECES = frozenset(word[:length] for word in _OPENERS for length in range(_LONG, len(word)))
_CAPITAL = re.compile(r"[(\"'\u2018\u201c*_ ]*[A-Z\u00c0-\u00de]\.?\Z")
_NAME = re.compile(r" ([A-Z\u00c0-\u00de][^\W\d_]*|[a-z\u00df-\u00ff]{2,})")
_FORMULA = re.compile(r"[^\w\s.,;:!?()\"'\u2018\u2019\u201c\u201d]\Z|[\d_]\Z")


def is_capital(text: str) -> bool:
    """Whether a token is one capital letter; blanks, quotes and marks may stand before it, a full stop after it.

    >>> is_capital(" J"), is_capital("(J"), is_capital("J."), is_capital(" Jo")
    (True, True, True, False)
    """
    return _CAPITAL.match(text) is not None


def goes_on_a_name(text: str) -> bool:
    """Whether a token after "J." shows that it is an initial: a word in the same line that opens no sentence.

    >>> goes_on_a_name(" Thomson"), goes_on_a_name(" von"), goes_on_a_name(" Then"), goes_on_a_name(" x"), goes_on_a_name(" 5")
    (True, True, False, False, False)
    """
    found = _NAME.match(text)
    return found is not None and found[1] not in _OPENERS and found[1] not in _FIRST_PIECES


def ends_in_formula(text: str) -> bool:
    """Whether a token ends in a digit or in a sign of a formula, after which a capital is a unit or a variable."""
    return _FORMULA.search(text) is not None


SENTENCE, LINE, BLANK_LINE, ONLY_SPACE = 1, 2, 4, 8
"""Bits of a token's class. SENTENCE: it ends a sentence by itself. BLANK_LINE: it contains a whole blank line. ONLY_SPACE: it is
white space only."""
STOP, ELLIPSIS, SPACE_FIRST, DIGIT_LAST, LETTER, NUMBER, SHORT, MARKUP = 16, 32, 64, 128, 256, 512, 1024, 2048
"""STOP: its text ends in a bare full stop. ELLIPSIS: in several. SPACE_FIRST: it begins with white space. DIGIT_LAST: it ends in a
digit. LETTER: it is one letter. NUMBER: it is digits alone. SHORT: a full stop after it is an abbreviation's. MARKUP: Markdown's
marks or blanks, which may stand before the number of a list."""
ANY_STOP = 16384
"""Its text ends in a full stop, question or exclamation mark, whatever stands before and after it."""
CAPITAL, FORMULA, NAME, LETTER_LAST = 32768, 65536, 131072, 1048576
"""CAPITAL: it is one capital letter, a full stop may follow. FORMULA: it ends in a digit or sign, after which a capital is no
initial. NAME: its word goes on a name after an initial. LETTER_LAST: it ends in a letter."""
AT_START, WAITS, INITIAL, LABEL = 4096, 8192, 262144, 524288
"""Bits of a row's last token, from those before it. AT_START: only marks and digits stand between it and the start of its line.
WAITS: it ends in a full stop, and the next token decides. INITIAL: it is a capital that may be an initial, or the stop after
it. LABEL: it is one letter at the start of its line."""

_CLOSERS = r"[\"'\u2019\u201d)\]*}$|]|\\\)|\\\]"
_ENDS_SENTENCE = re.compile(rf"(?:(?:(?<!\\)!|[?\u3002\uff01\uff1f])(?:{_CLOSERS})*\s*|\.(?:{_CLOSERS})+\s*|\.\s+)\Z")
_ENDS_IN_STOP = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u2019\u201d)\]*]*\s*\Z")
_WORD_AND_STOP = re.compile(r"([^\W\d_]+)\.\s*\Z")
_ENDS_LINE = re.compile(r"\n[ \t\r]*\Z")
_ENDS_BLANK_LINE = re.compile(r"\n[ \t\r]*\n[ \t\r]*\Z")
_MARKUP = re.compile(r"[\s#*>_(-]+\Z")
_ABBREVIATIONS = frozenset(
    [
        "approx",
        "eq",
        "eqs",
        "eqn",
        "fig",
        "figs",
        "vs",
        "cf",
        "ref",
        "refs",
        "ch",
        "vol",
        "pp",
        "resp",
        "ca",
        "incl",
        "dept",
    ]
)
_TITLES = frozenset(
    ["Dr", "Mr", "Mrs", "Ms", "Prof", "St", "Jr", "Sr", "Inc", "Ltd"]
)  # in small letters dr is a differential, sr a steradian


def token_class(text: str) -> int:
    """The bits of one token's text.

    >>> token_class('so."') == SENTENCE | ANY_STOP, token_class(".") == STOP | ANY_STOP
    (True, True)
    """
    bits = LINE if _ENDS_LINE.search(text) else 0
    bits |= BLANK_LINE if _ENDS_BLANK_LINE.search(text) else 0
    bits |= ONLY_SPACE if text.isspace() else 0
    bits |= ANY_STOP if _ENDS_IN_STOP.search(text) else 0
    bits |= SPACE_FIRST if text[:1].isspace() else 0
    word = text.strip()
    letters = word.lstrip("(\"'*$")
    bits |= DIGIT_LAST if text[-1:].isdigit() else 0
    bits |= LETTER_LAST if text[-1:].isalpha() else 0
    bits |= NUMBER if word.isdigit() else 0
    bits |= LETTER if len(letters) == 1 and letters.isalpha() else 0
    bits |= MARKUP if _MARKUP.match(text) else 0
    bits |= CAPITAL if is_capital(text) else 0
    bits |= FORMULA if ends_in_formula(text) else 0
    bits |= NAME if goes_on_a_name(text) else 0
    short = _is_abbreviation(letters) or re.fullmatch(r"\.[A-Za-z]", word) is not None
    bits |= SHORT if short else 0
    found = _WORD_AND_STOP.search(text)
    if bits & CAPITAL and found:
        return bits | STOP
    if found and (len(found[1]) == 1 or _is_abbreviation(found[1])):
        return bits  # an abbreviation in one token
    if _ENDS_SENTENCE.search(text):
        return bits | SENTENCE
    if text.endswith(("..", "\u2026")):
        return bits | STOP | ELLIPSIS
    if text.endswith("."):
        return bits | (SENTENCE if found else STOP | (ELLIPSIS if len(word) > 1 and word[-2].isdigit() else 0))
    return bits


def _is_abbreviation(word: str) -> bool:
    return word in _TITLES or word.lower() in _ABBREVIATIONS


Carry = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


class StepEnds(NamedTuple):
    """The sentence ends of S tokens a row."""

    sentence_BS: Tensor
    bits_BT: Tensor
    """T = 1 + S columns: the bits of the last real token before these, then the last real one up to each of them."""


def sentence_ends(before_B: Tensor, bits_BS: Tensor, real_BS: Tensor, carried: Carry) -> StepEnds:
    """Which tokens end a sentence.

    ``before_B``: the bits of each row's last real token before these (0: none). ``bits_BS``: classes of the tokens. ``real_BS``:
    False for padding. ``carried``: (before_B, value_BS, counts_BS) -> [B, 1 + S], the value of the latest token that counts.
    """
    import torch  # classes of tokens are read where no model is

    neutral_BS = _has(bits_BS, MARKUP | NUMBER) & ~_has(bits_BS, LINE)
    starts_BS = carried(before_B & AT_START, torch.where(_has(bits_BS, LINE), AT_START, 0), real_BS & ~neutral_BS)[
        :, 1:
    ]
    bits_BS = bits_BS | starts_BS
    last_BS = carried(before_B, bits_BS, real_BS)[:, :-1]
    at_start_BS = _has(last_BS, AT_START)
    bits_BS = bits_BS | torch.where(_has(bits_BS, LETTER) & at_start_BS, LABEL, 0)
    glued_BS = _has(last_BS, LETTER_LAST) & ~_has(bits_BS, SPACE_FIRST)  # the V of MeV
    free_BS = at_start_BS | ~(_has(last_BS, FORMULA) | glued_BS)
    bits_BS = bits_BS | torch.where(_has(bits_BS, CAPITAL) & free_BS, INITIAL, 0)
    last_BS = carried(before_B, bits_BS, real_BS)[:, :-1]
    number_of_list_BS = _has(last_BS, NUMBER) & _has(last_BS, AT_START)
    no_end_BS = ~_has(bits_BS, ELLIPSIS) & (_has(last_BS, SHORT | LABEL) | number_of_list_BS)
    stop_BS = _has(bits_BS, STOP) & ~no_end_BS
    waits_BS = stop_BS & (_has(bits_BS, ELLIPSIS | CAPITAL) | _has(last_BS, DIGIT_LAST | LETTER))
    bits_BS = bits_BS | torch.where(waits_BS, WAITS | (last_BS & INITIAL), 0)
    carried_BT = carried(before_B, bits_BS, real_BS)
    last_BS = carried_BT[:, :-1]
    name_BS = _has(last_BS, INITIAL) & _has(bits_BS, NAME)
    waited_BS = _has(last_BS, WAITS) & _has(bits_BS, SPACE_FIRST) & ~name_BS
    return StepEnds(_has(bits_BS, SENTENCE) | (stop_BS & ~waits_BS) | waited_BS, carried_BT)


def _has(bits: Tensor, any_of: int) -> Tensor:
    return (bits & any_of) > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WordEdges:
    """Tokens that continue a word and tokens that can be continued, so that "Wait" is not found in "Waiting" or "await"."""

    starts_with_letter: frozenset[int]
    """Tokens that join the token before them without a space, letter to letter."""
    ends_with_letter: frozenset[int]


def word_edges(tokenizer: Any) -> WordEdges | None:
    """Which tokens continue a word; None for a tokenizer whose tokens are always whole words."""
    texts = {token_id: token.translate(_SPACES) for token, token_id in tokenizer.get_vocab().items() if token}
    words = sorted((token_id, text) for token_id, text in texts.items() if set(text) <= _LETTERS)
    if words and not _joins(tokenizer, *words[0]):
        # Tokens are separated on decoding (WordPiece, word-level): only the marked continuations join a word.
        starts = {token_id for token_id, text in texts.items() if text[:2] == "##" and text[2:3] in _LETTERS}
    else:
        starts = {token_id for token_id, text in texts.items() if text[0] in _LETTERS}
    ends = {token_id for token_id, text in texts.items() if text[-1] in _LETTERS}
    return WordEdges(starts_with_letter=frozenset(starts), ends_with_letter=frozenset(ends)) if starts else None


def inside_a_word(ids_T: np.ndarray[Any, Any], start: int, stop: int, edges: WordEdges | None) -> bool:
    if edges is None:
        return False
    joined_left = start > 0 and _joined(int(ids_T[start - 1]), int(ids_T[start]), edges)
    joined_right = stop < len(ids_T) and _joined(int(ids_T[stop - 1]), int(ids_T[stop]), edges)
    return joined_left or joined_right


def _joined(left: int, right: int, edges: WordEdges) -> bool:
    return left in edges.ends_with_letter and right in edges.starts_with_letter


def _joins(tokenizer: Any, token_id: int, text: str) -> bool:
    pair = tokenizer.decode([token_id, token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text + text in pair
