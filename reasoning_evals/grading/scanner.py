"""The scanner of the formula grammar: a position in the text, and the tokens that are recognised there.

One pass from left to right, without going back, so the time is linear in the text. There is no token list, because the same
characters mean different things in different places: in "2 m" the m is a unit where a number with a unit is read, and a symbol
where a formula is read."""

from __future__ import annotations

import re
from fractions import Fraction

from reasoning_evals.grading.records import MAX_NESTING, TooLarge, Unreadable

GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "pi",
    "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma",
    "Upsilon", "Phi", "Psi", "Omega", "hbar", "ell", "nabla", "infty",
}  # fmt: skip
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "coth",
    "arcsinh", "arccosh", "arctanh", "exp", "ln", "log", "lg",
}  # fmt: skip
ALIASES = {f"a{name}": f"arc{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
DECORATIONS = {"hat", "dot", "ddot", "bar", "tilde", "underline", "check"}
OF_SEVERAL = {"max", "min", "gcd", "lcm"}
_WORDS = tuple(sorted(FUNCTIONS | set(ALIASES) | {"sqrt"}, key=len, reverse=True))

_NUMERAL = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d.])|\d+)(?:\.\d*)?|\.\d+")
_WITHOUT_COMMAS = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_EXPONENT = re.compile(r"[eE][+-]?\d+(?![\d.])")
_REPEATING = re.compile(r"\\bar\s*\{(\d+)\}")
_MIXED = re.compile(r"\s*(?:\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))|(?<=\s)(\d+)/(\d+)(?![\d.]))")
_COMMAND = re.compile(r"\\([a-zA-Z]+)\s*")
_LETTERS = re.compile(r"[a-zA-Z]+")
_SUBSCRIPT = re.compile(r"\s*_\s*(?:([\w+-])|(\\[a-zA-Z]+(?:\s*\{[^{}]*\})?)|\{((?:[^{}]|\{[^{}]*\})*)\})")
_LABEL = re.compile(r"\s*\^\s*(?:\\text\s*\{([^{}]*)\}|\{\s*\\text\s*\{([^{}]*)\}\s*\}|\{\s*\(([\w]+)\)\s*\})")
_APPLIED = re.compile(r"\(\s*[+-]?(?:\d+(?:\.\d+)?|\\infty)\s*\)")
_FUNCTION_START = re.compile(r"\s*[(\d\\\[{]")
_DEGREE_SIGN = re.compile(r"\s*\^\\circ(?![a-zA-Z])\s*")


class Scanner:
    """Position and nesting of one pass over a text, and the features of its notation that were met."""

    def __init__(self, text: str, symbols: bool) -> None:
        self.text = text
        self.symbols = symbols
        self.position = 0
        self.nesting = 0
        self.in_bars = 0
        self.in_function = 0
        self.of_values = 0
        self.decimals = self.percent = self.slash = self.bare_log = self.bars = False

    def blanks(self) -> None:
        while self.position < len(self.text) and self.text[self.position] == " ":
            self.position += 1

    def peek(self) -> str:
        """The next non-blank character; "" at the end."""
        self.blanks()
        return self.text[self.position] if self.position < len(self.text) else ""

    def take(self, token: str) -> bool:
        """Step over this token if it comes next."""
        self.blanks()
        if self.text.startswith(token, self.position):
            self.position += len(token)
            return True
        return False

    def command(self) -> str:
        r"""The name of the command at this position, without the backslash, or ""."""
        self.blanks()
        match = _COMMAND.match(self.text, self.position)
        return match.group(1) if match else ""

    def skip_command(self) -> None:
        match = _COMMAND.match(self.text, self.position)
        assert match
        self.position = match.end()

    def degree_sign(self) -> re.Match[str] | None:
        return _DEGREE_SIGN.match(self.text, self.position)

    def enter(self) -> None:
        """One level deeper."""
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise TooLarge(f"answer is nested deeper than {MAX_NESTING} levels")

    def unreadable(self) -> Unreadable:
        return Unreadable(f"cannot read {self.text[self.position : self.position + 30]!r}")

    def starts_factor(self) -> bool:
        r"""Whether another factor follows without a multiplication sign: 2x, 2(x + 1), x \sin y."""
        char = self.peek()
        if not char:
            return False
        if char.isdigit() and char.isascii():
            before = self.text[: self.position].rstrip()[-1:]
            return not before.isdigit() and before != "."
        if char == "\\":
            name = self.command()
            if name in ("frac", "sqrt", "binom", "pi", "text", "lfloor", "lceil") or name in FUNCTIONS | OF_SEVERAL:
                return self.symbols or name != "text"
            if not name:
                return self.symbols and self.text.startswith("\\{", self.position)
            return self.symbols and (name in GREEK or name in DECORATIONS)
        if char in "([{":
            return self.symbols or char != "["
        if char == "|":
            return not self.in_bars and self.symbols
        if char.isalpha() and char.isascii():
            return self.symbols or self.plain_word() is not None
        return False

    def plain_word(self) -> str | None:
        """A function or constant written as a plain word (sin, pi). In a pure number only if its argument follows: the unit
        in "5 sec" is not a secant."""
        match = _LETTERS.match(self.text, self.position)
        word = match.group() if match else ""
        if len(word) < 2:
            return None
        for name in _WORDS:
            if word.startswith(name):
                end = self.position + len(name)
                if _FUNCTION_START.match(self.text, end) or (self.symbols and self.text[end : end + 1].strip() != ")"):
                    return name
        return word if word == "pi" or (self.symbols and word in GREEK) else None

    def numeral(self) -> Fraction:
        """The value of the numeral at this position."""
        match = (_WITHOUT_COMMAS if self.of_values else _NUMERAL).match(self.text, self.position)
        if not match:
            raise self.unreadable()
        digits = match.group().replace(",", "").replace(" ", "")
        self.position = match.end()
        repeating = _REPEATING.match(self.text, self.position) if "." in digits else None
        if repeating:
            self.position = repeating.end()
            return _repeating_decimal(digits, repeating.group(1))
        exponent = _EXPONENT.match(self.text, self.position)
        if exponent:
            self.position = exponent.end()
            if len(exponent.group()) > 6:
                raise TooLarge(f"exponent {exponent.group()[:20]} is too large")
            digits = digits.rstrip(".") + exponent.group()
        self.decimals |= "." in digits.rstrip(".") or bool(exponent)
        value = Fraction(digits.rstrip("."))
        mixed = _MIXED.match(self.text, self.position) if digits.isdigit() else None
        if mixed:
            above, below = (int(group) for group in mixed.groups() if group)
            if 0 < above < below:
                self.position = mixed.end()
                value += Fraction(above, below)
        return value

    def symbol(self, name: str) -> str:
        """The full name of a symbol: subscripts and primes that follow it are part of it."""
        primes, subscript = "", ""
        while True:
            if self.text.startswith("'", self.position):
                self.position += 1
                primes += "'"
            elif match := _SUBSCRIPT.match(self.text, self.position):
                self.position = match.end()
                subscript += "_" + plain(next(group for group in match.groups() if group is not None))
            elif match := _LABEL.match(self.text, self.position):  # Q^{\\text{outer}}, d^{(2)}
                self.position = match.end()
                primes += "^" + plain(next(group for group in match.groups() if group is not None))
            else:
                return name + subscript + primes + self.applied(name)

    def applied(self, name: str) -> str:
        """A numeral in brackets right after a symbol is a function's argument: I(0) is a value of I, not I times 0."""
        match = _APPLIED.match(self.text, self.position) if name not in ("pi", "e", "i") else None
        if not match:
            return ""
        self.position = match.end()
        return plain(match.group())


def plain(text: str) -> str:
    """Letters and signs of a subscript or a decorated symbol, without markup."""
    return re.sub(r"\\text|[\\{}\s]", "", text)


def _repeating_decimal(digits: str, repeated: str) -> Fraction:
    places = len(digits.partition(".")[2])
    return Fraction(digits.rstrip(".")) + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
