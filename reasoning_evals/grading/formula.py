r"""Reads a formula, LaTeX or plain, into a tree. Linear in the text, no evaluation, no names looked up in Python.

Grammar: sums of products of powers; ``\frac``, ``\sqrt[n]{}``, ``\binom``, ``|x|``, factorials, elementary functions with
or without brackets, Greek and subscripted symbols, implicit products (``2\pi r``), mixed fractions (``2\frac{3}{4}``),
numerals such as ``1,234.5``, ``1.6e-19``, ``0.\overline{3}``. ``records`` describes the tree.

The grammar is written by hand rather than with a LaTeX library because answers are untrusted: it is bounded in length,
depth and number size, never evaluates Python, and refuses what it does not know instead of guessing. An implicit product
binds tighter than a slash in handwriting but not in calculators, so ``1/2x`` keeps both readings (``Reading.slash``) and
``identity`` accepts either.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from reasoning_evals.grading.latex import Commands
from reasoning_evals.grading.records import DEGREE, TooLarge, Tree, Unreadable, check_size, signed
from reasoning_evals.grading.scanner import ALIASES, GREEK

_OPEN = {"(": ")", "[": "]", "{": "}"}
_ROUNDED = {"lfloor": r"\rfloor", "lceil": r"\rceil"}


class Reading(NamedTuple):
    """A formula as a tree, with the features of its notation that make it ambiguous."""

    tree: Tree
    end: int
    """Position where reading stopped; the length of the text when all of it was read."""
    decimals: bool
    """A numeral with a decimal point or an exponent occurs."""
    percent: bool
    slash: bool
    """A slash is followed by an implicit product, so ``1/2x`` has two readings."""
    bare_log: bool
    r"""``\log`` occurs without a base."""
    bars: bool
    """``|x|`` occurs."""


def read(text: str, tight: bool = False, log_base: int | None = None) -> Reading:
    """The tree of a whole formula with symbols; ``text`` comes from ``clean``.

    ``tight`` reads ``1/2x`` as 1/(2x) instead of (1/2)x. ``log_base`` is the base of a bare ``log``, None the natural one.
    Raises Unreadable for a text that is not a formula, TooLarge beyond the limits.
    """
    reading = _Reader(check_size(text), True, tight, log_base).run()
    if reading.end != len(text):
        raise Unreadable(f"cannot read {text[reading.end : reading.end + 30]!r}")
    return reading


def read_number(text: str, log_base: int | None = None) -> Reading:
    """The tree of the longest number at the start of the text: no symbols but pi, so that a unit may follow."""
    return _Reader(check_size(text), False, False, log_base).run()


class _Reader(Commands):
    def __init__(self, text: str, symbols: bool, tight: bool, log_base: int | None) -> None:
        super().__init__(text, symbols, log_base)
        self.tight = tight

    def run(self) -> Reading:
        tree = self.sum()
        self.blanks()
        return Reading(tree, self.position, self.decimals, self.percent, self.slash, self.bare_log, self.bars)

    def sum(self) -> Tree:
        self.enter()
        terms = [(self.sign(), self.product())]
        while self.peek() and self.peek() in "+-":
            mark, nesting = self.position, self.nesting
            try:
                terms.append((self.sign(), self.product()))
            except Unreadable as error:
                if not self.may_stop(error, nesting):
                    raise
                self.position = mark  # "5 - not more": the number ends before the dash
                break
        self.nesting -= 1
        return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else ("sum", tuple(terms))

    def may_stop(self, error: Unreadable, nesting: int) -> bool:
        """Whether a number may end where reading failed: only outside all brackets, and only if other text may follow."""
        if self.symbols or nesting > 1 or isinstance(error, TooLarge):
            return False
        self.nesting, self.in_bars, self.in_function = nesting, 0, 0
        return True

    def product(self) -> Tree:
        factors = [(1, self.power())]
        while True:
            mark, nesting = self.position, self.nesting
            try:
                factor = self.next_factor()
            except Unreadable as error:
                if not self.may_stop(error, nesting):
                    raise
                factor = None  # "5/s", "5 * m": the unit begins with the operator
            if factor is None:
                self.position = mark
                break
            factors.append(factor)
        return factors[0][1] if len(factors) == 1 else ("prod", tuple(factors))

    def next_factor(self) -> tuple[int, Tree] | None:
        """(power, tree) of the next factor, None where the product ends."""
        if self.take("/"):
            sign, factor = self.sign(), self.power()
            if self.starts_factor():
                self.slash = True
                factor = self.implicit_tail(factor) if self.tight else factor
            return -1, signed(sign, factor)
        if self.command() in ("cdot", "times"):
            self.skip_command()
            return 1, signed(self.sign(), self.power())
        if self.take("*"):
            return 1, signed(self.sign(), self.power())
        return (1, self.power()) if self.starts_factor() else None

    def implicit_tail(self, first: Tree) -> Tree:
        factors = [(1, first)]
        while self.starts_factor():
            factors.append((1, self.power()))
        return ("prod", tuple(factors))

    def power(self) -> Tree:
        base = self.postfix(self.atom())
        nesting = self.nesting
        while self.peek() == "^":
            self.enter()
            if sign := self.degree_sign():
                if not self.symbols and not self.in_function:
                    break  # a unit
                self.position = sign.end()
                base = ("prod", ((1, base), (1, DEGREE)))
                continue
            self.position += 1
            base = ("pow", base, self.exponent())
        self.nesting = nesting
        return base

    def exponent(self) -> Tree:
        self.enter()
        if self.peek() == "{":
            tree = self.group()
        else:
            sign = self.sign()
            tree = self.postfix(self.atom())
            if self.peek() == "^" and not self.degree_sign():
                self.position += 1
                tree = ("pow", tree, self.exponent())
            tree = signed(sign, tree)
        self.nesting -= 1
        return tree

    def postfix(self, tree: Tree) -> Tree:
        nesting = self.nesting
        while True:
            self.enter()
            if self.peek() == "!" and not self.text.startswith("!=", self.position):
                self.position += 1
                tree = ("call", "factorial", tree)
            elif self.symbols and (self.take("%") or self.take("\\%")):
                self.percent = True
                tree = ("prod", ((1, tree), (-1, ("num", Fraction(100)))))
            else:
                self.nesting = nesting
                return tree

    def atom(self) -> Tree:
        char = self.peek()
        if (char.isdigit() and char.isascii()) or char == ".":
            start = self.position
            value = self.numeral()
            if self.symbols and self.peek() == "_":  # a number in another base, 52_8
                return ("sym", self.symbol(self.text[start : self.position]))
            return ("num", value)
        if char in _OPEN:
            tree = self.group()
            # a styled symbol takes its subscript behind its braces: \mathbf{E}_0
            return ("sym", self.symbol(tree[1])) if tree[0] == "sym" and char == "{" else tree
        if char == "|":
            return self.absolute()
        if char == "\\":
            if rounded := _ROUNDED.get(self.command()):
                return ("call", self.command(), self.group(rf"\{self.command()}", rounded))
            return self.group("\\{", "\\}") if self.text.startswith("\\{", self.position) else self.commanded()
        word = self.plain_word()
        if word in GREEK:
            self.position += len(word)
            return ("sym", self.symbol(word))
        if word:
            self.position += len(word)
            return self.root() if word == "sqrt" else self.call(ALIASES.get(word, word))
        if self.symbols and char.isalpha() and char.isascii():
            self.position += 1
            return ("sym", self.symbol(char))
        raise self.unreadable()

    def group(self, opening: str = "", closing: str = "") -> Tree:
        """The content of the bracket that opens here."""
        opening = opening or self.peek()
        closing = closing or _OPEN[opening]
        self.position += len(opening)
        bars, self.in_bars = self.in_bars, 0
        tree = self.sum()
        self.in_bars = bars
        if not self.take(closing):
            raise Unreadable(f"{closing!r} is missing")
        return tree

    def absolute(self) -> Tree:
        self.position += 1
        self.bars = True
        self.in_bars += 1
        tree = self.sum()
        self.in_bars -= 1
        if not self.take("|"):
            raise Unreadable("'|' is missing")
        return ("call", "abs", tree)


def free_constant(target: str, given: str) -> str:
    """The answer with its constant of integration, the last term, under the target's name for it: + C, + c, + C_1."""
    found = re.fullmatch(r"([^C]*[xytuz][^C]*\+\s*)(?:([ck])|C_\s*\{?\s*\d\s*\}?)", given)
    if not found or not re.fullmatch(r"[^C]*\+\s*C", target):
        return given
    elsewhere = found[2] and found[2] in re.sub(r"\\[a-zA-Z]+|[a-zA-Z]{3,}", "", found[1] + target)
    return given if elsewhere else f"{found[1]}C"
