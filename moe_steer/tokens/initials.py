"""Initials of names ("R. Feynman", "J. J. Thomson") against letters that end a sentence ("at the point B. Then").

A capital and a full stop look the same in both; the token after them tells them apart. A sentence begins with one of a few
hundred words (those below open 98% of the sentences of recorded DeepSeek-R1 traces), a name with any other: so a capital that
goes on with such a word, a digit or a sign ends its sentence, and one that goes on with another word is an initial. A letter
behind a digit or a sign of a formula ("5 N. Energy", "E = F. Current") is a unit or a variable, whatever follows.
"""

from __future__ import annotations

import re

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
