r"""One normal form for the many ways to write a formula: unicode, LaTeX spacing, delimiters, styles and wrappers.

``clean`` changes how a formula is written, never what it means: no unit, sign, case or symbol is dropped. Symbols that
differ only in style (``\mathbf{E}``, ``\vec{E}``, ``E``; ``\epsilon``, ``\varepsilon``) become one.

The commands and functions of the formula grammar: \frac, \sqrt, \sin, \log_2, \hat and their kin.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from fractions import Fraction
from functools import lru_cache

from reasoning_evals.grading.characters import in_latex, number_in_words, separators, sign_in_words
from reasoning_evals.grading.records import MINUS_ONE, Tree, Unreadable, signed
from reasoning_evals.grading.scanner import DECORATIONS, FUNCTIONS, GREEK, OF_SEVERAL, Scanner, plain

_SPACES = re.compile(
    r"\\(?:quad|qquad|thinspace|enspace|thickspace|medspace|nobreakspace)(?![a-zA-Z])|(?<!\\)\\[,;:> ]|(?<!\\)\\(?=\n)|~"
)
_NOTHING = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg|middle|displaystyle|textstyle|scriptstyle"
    r"|limits|nolimits|tiny|small|normalsize|large|Large|LARGE|huge|Huge|hfill|noindent|nonumber|mathstrut|checkmark|qed"
    r"|(?:black)?square|Box|pounds|euro|texteuro|textdollar|mathdollar|textsterling)(?![a-zA-Z])|\\!"
    r"|\\(?:hspace\*?|label|tag|(?:text|page)?color|colorbox|[hv]?phantom)\s*\{[^{}]*\}"
    r"|\\underline\s*(?=\{(?:\\underline\s*\{)?[^{}]*\d)"
)
_ROWS = re.compile(
    r"\s*\\begin\s*\{(aligned|align\*?|gathered|equation\*?|split)\}((?:(?!\\begin).)*)\\end\s*\{\1\}\s*", re.DOTALL
)
_NEW_NAMES = {
    "dbinom": r"\binom", "tbinom": r"\binom", "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "nicefrac": r"\frac", "sfrac": r"\frac", "varepsilon": r"\epsilon", "varphi": r"\phi", "vartheta": r"\theta",
    "varrho": r"\rho", "varsigma": r"\sigma", "le": r"\leq", "ge": r"\geq", "ne": r"\neq", "leqslant": r"\leq",
    "geqslant": r"\geq", "lvert": "|", "rvert": "|", "vert": "|", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]",
    "ast": "*", "thickapprox": r"\approx", "approxeq": r"\approx", "simeq": r"\approx", "cong": r"\approx", "arcctg": r"\arccot",
    "tg": r"\tan", "ctg": r"\cot", "degree": r"^\circ", "textdegree": r"^\circ", "angstrom": r"\AA", "textohm": r"\Omega",
    "ohm": r"\Omega", "micro": r"\mu", "textmu": r"\mu", "prime": "'", "div": "/", "overline": r"\bar", "widehat": r"\hat", "widetilde": r"\tilde",
    "imath": "i", "jmath": "j", "R": r"\mathbb{R}", "colon": ":", "mid": "|", "dots": r"\ldots",
    "gt": ">", "lt": "<", "surd": r"\sqrt", "cr": r"\\",
}  # fmt: skip
_RENAMED = re.compile(rf"(?:(?<!\\)|(?<=\\\\))\\({'|'.join(_NEW_NAMES)})(?![a-zA-Z])")
_STYLE_NAMES = (
    r"\\(?:mathbf|mathit|mathsf|mathtt|boldsymbol|bm|vec|overrightarrow|operatorname\*?|pmb|bold|textbf|textit|texttt|emph|mathcal|mathscr|bf|it|rm)"
    r"(?![a-zA-Z])\s*"
)
_STYLE = re.compile(_STYLE_NAMES)
_STYLED_SYMBOL = re.compile(_STYLE_NAMES + r"\{\s*(\\?[a-zA-Z]+)\s*\}")
_ROMAN = re.compile(r"\\(?:mathrm|textrm|textnormal|mbox|textup|rm|mathnormal|hbox|textsf)(?![a-zA-Z])\s*\{")
_ROMAN_LETTER = re.compile(r"\\(?:mathrm|rm|text|textrm)\s+([a-zA-Z])(?![a-zA-Z])")
_ROMAN_SWITCH = re.compile(r"\{\s*\\(?:rm|bf|it)\s+((?:[^{}]|\{[^{}]*\})*)\}")
_INFIX = re.compile(
    r"\{((?:[^{}\\]|\{[^{}]*\}|\\(?!over|choose))*)\\(over|choose)(?![a-zA-Z])((?:[^{}]|\{[^{}]*\})*)\}"
)
_LEADING = re.compile(r"^\s*\\(?:therefore|Rightarrow|Longrightarrow|implies)(?![a-zA-Z])")
_ANGLES = re.compile(r"\\langle(?![a-zA-Z])((?:(?!\\[lr]angle).)*?[,;](?:(?!\\[lr]angle).)*)\\rangle(?![a-zA-Z])")
_PRIMES = re.compile(r"\^\s*\{\s*('+)\s*\}|\^\s*('+)")
_DEGREE = re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])")
_RINGED_A = re.compile(
    r"\\(?:overset|stackrel)\s*\{\s*\\(?:circ|o)\s*\}\s*\{?\s*A\s*\}?|\\mathring\s*\{?\s*A\s*\}?|\\r\s*\{\s*A\s*\}"
)
_MATH_MARKS = re.compile(r"(?<!\\)\$|\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\](?!\])")
_BLANKS = re.compile(r"\s+")
_TEN = re.compile(r"(?<=[\d.}])\s*(?:\\text\s*\{\s*[xX]\s*\}|[xX])\s*(?=10\s*\^)")
_POWER_OF_TEN = re.compile(r"(?<=\d)\s*\\text\s*\{\s*[eE]\s*\}\s*\{?\s*([+-]?\s*\d+)\s*\}?")
_INFINITY = re.compile(r"\\text\s*\{\s*infinity\s*\}|(?<![a-zA-Z\\])infinity(?![a-zA-Z])", re.I)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11",
          "twelve": "12", "sixteen": "16"}  # fmt: skip
_BASE = re.compile(
    rf"(?<=[\dA-F)])(\s*_\s*\{{?\s*)(?:\\text\s*\{{\s*\(?(?:base[ -]*)?({'|'.join(_BASES)}|\d+)\)?\s*\}}|({'|'.join(_BASES)})(?![a-z]))"
)
_NUMERAL_IN_BASE = re.compile(
    r"\(\s*((?=[A-F]*\d)[\dA-F]+)\s*\)(?=\s*_\s*\{?\s*\d)|(?<=_\{)\((\d+)\)(?=\})|(?<=_\{)\\text\s*\{\s*base\s*\}\s*(?=\d)"
)
_SI_NUMBER = re.compile(r"\\(?:SI|qty)\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}\s*(?=\{)|\\(?:num|(ang))\s*\{([^{}]*)\}")
_SI_UNIT = re.compile(r"\\(?:unit|si)\s*(?:\[[^\]]*\])?\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SI_PREFIX = re.compile(r"\\(kilo|mega|giga|tera|deci|centi|milli|micro|nano|pico|femto)\s*\\?(?=[a-zA-Z])")
_SI_SIGNS = {"per": " / ", "squared": "^2 ", "cubed": "^3 ", "percent": "%", "degreeCelsius": " degC ", "ohm": " ohm "}
_TEXT_GROUP = re.compile(r"(?<![_^])\\text\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_TEXT_WORDS = re.compile(
    r"(?<![\\a-zA-Z])(?:(?:and|or)(?![a-zA-Z])|[A-Za-z]{2,}(?:[ ,.'/-]+(?!(?:and|or)(?![a-zA-Z]))[A-Za-z]+)*)"
)

_ANGLE = re.compile(rf"\s*(?:\\(?:{'|'.join(GREEK)})(?![a-zA-Z])|(?!e\s*_)[a-zA-Z])")  # e_r is a unit vector
_INVERSE = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh")}
_BARE = FUNCTIONS | GREEK | {"sqrt"}
_TEXT = re.compile(r"\\text\s*\{\s*([a-zA-Z]+)\s*\}")


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """The formula in normal form; text inside ``\\text{...}`` stays marked as text."""
    text = in_latex(text)
    text = text.replace("**", "^") if re.search(r"[\w)}]\*\*[\w({\-]", text) else text.replace("**", "")
    text = re.sub(r"""^\s*(["'])([^"']*)\1\s*$""", r"\2", text.replace("`", "").replace(r"\$", ""))
    text = _MATH_MARKS.sub(" ", text)
    if "\\" in text:
        text = _clean_commands(text)
    text = _INFINITY.sub(r"\\infty ", _TEN.sub(r" \\times ", sign_in_words(separators(text))))
    text = re.sub(r"(?<![a-zA-Z\\])abs\(([^()]*)\)", r"|\1|", text)
    if "_" in text:
        text = _BASE.sub(lambda match: match[1] + _BASES.get(match[2] or match[3], match[2] or ""), text)
        text = _NUMERAL_IN_BASE.sub(lambda match: match[1] or match[2] or "", text)
        text = re.sub(r"(?<=\d)\s*_\s*(?:10|\{\s*10\s*\})(?!\d)", "", text)
    return number_in_words(_BLANKS.sub(" ", text).strip().strip(";,").rstrip(".\\").strip())


def unwrap(text: str) -> str:
    r"""Mathematics inside ``\text{...}`` as mathematics, the words beside it as text: \text{40 cm^2} is 40 \text{cm}^2.

    Text after ``_`` and ``^`` is a label and stays.
    """
    for _ in range(3):
        if text == (text := _TEXT_GROUP.sub(_unwrapped, text)):
            break
    return _BLANKS.sub(" ", text).strip()


def _unwrapped(match: re.Match[str]) -> str:
    if not re.search(r"[\d^_\\]", match[1]):
        return match[0]
    return " " + _TEXT_WORDS.sub(lambda word: word[0] if word[0] in _BARE else f"\\text{{ {word[0]} }}", match[1]) + " "


def _si_unit(match: re.Match[str]) -> str:
    text = _SI_PREFIX.sub(r" \1", match[1].replace(".", " "))
    return " \\text{" + re.sub(r"\\([a-zA-Z]+)", lambda name: _SI_SIGNS.get(name[1], f" {name[1]} "), text) + "} "


def _clean_commands(text: str) -> str:
    if rows := _ROWS.fullmatch(text):  # one statement a row, or one that goes on after a sign of equality
        text = re.sub(r"\\\\(?:\[[^\]]*\])?", ", ", re.sub(r"\\\\\s*&?\s*=", " =", rows[2])).replace("&", "")
    text = _SI_NUMBER.sub(
        lambda match: match[3] + r"^\circ " * bool(match[2]) if match[3] else match[1] + r"\unit", text
    )
    text = _NOTHING.sub("", _SI_UNIT.sub(_si_unit, text))
    text = _RENAMED.sub(lambda match: _NEW_NAMES[match.group(1)] + " ", text)
    text = _RINGED_A.sub(r"\\AA ", text)
    text = re.sub(r"\\operatorname\*?\s*\{\s*(gcd|lcm|max|min)\s*\}", r"\\\1 ", _SPACES.sub(" ", text))
    text = _ROMAN_SWITCH.sub(r"\\text{\1}", text)
    text = _ROMAN.sub(r"\\text{", _ROMAN_LETTER.sub(r"\\text{\1}", text))
    text = _STYLE.sub(" ", _STYLED_SYMBOL.sub(r" \1 ", text))
    text = _INFIX.sub(
        lambda match: f"{{\\{'frac' if match[2] == 'over' else 'binom'}{{{match[1]}}}{{{match[3]}}}}}", text
    )
    text = re.sub(r"^([^{}\\=]+)\\over(?![a-zA-Z])([^{}\\=]+)$", r"\\frac{\1}{\2}", _LEADING.sub("", text))
    text = _ANGLES.sub(r"(\1)", _POWER_OF_TEN.sub(lambda match: f"e{match[1].replace(' ', '')}", text))
    text = re.sub(r"(?<=\d)\s*\^\s*\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?", "", text)
    text = _PRIMES.sub(lambda match: match.group(1) or match.group(2), text)
    return _DEGREE.sub(r"^\\circ ", text)


class Commands(Scanner, ABC):
    """Reads commands (backslash) and functions by name; a subclass provides sums, powers and brackets."""

    def __init__(self, text: str, symbols: bool, log_base: int | None) -> None:
        super().__init__(text, symbols)
        self.log_base = log_base

    @abstractmethod
    def sum(self) -> Tree:
        """A sum of products."""

    @abstractmethod
    def power(self) -> Tree:
        """An atom with its powers."""

    @abstractmethod
    def exponent(self) -> Tree:
        """The exponent after ``^``."""

    @abstractmethod
    def group(self, opening: str = "", closing: str = "") -> Tree:
        """The content of brackets."""

    def sign(self) -> int:
        """The product of the plus and minus signs at this position."""
        sign = 1
        while self.peek() and self.peek() in "+-":
            sign = -sign if self.peek() == "-" else sign
            self.position += 1
        return sign

    def commanded(self) -> Tree:
        name = self.command()
        if text := _TEXT.match(self.text, self.position):
            return self.upright(text)
        if name not in FUNCTIONS | GREEK | DECORATIONS | OF_SEVERAL | {"frac", "binom", "sqrt"}:
            raise self.unreadable()
        self.skip_command()
        if name in OF_SEVERAL:
            return self.of_several(name)
        if name in GREEK:
            return ("sym", self.symbol(name))
        if name in FUNCTIONS:
            return self.call(name)
        if name == "sqrt":
            return self.root()
        if name in DECORATIONS:
            return self.decorated(name)
        first, second = self.argument(), self.argument()
        return ("prod", ((1, first), (-1, second))) if name == "frac" else ("binom", first, second)

    def upright(self, text: re.Match[str]) -> Tree:
        r"""``\text{ln} x``, or a single upright letter such as e; words are not a formula."""
        word = text.group(1)
        if word in FUNCTIONS:
            self.position = text.end()
            return self.call(word)
        if self.symbols and len(word) == 1:
            self.position = text.end()
            return ("sym", self.symbol(word))
        raise self.unreadable()

    def argument(self) -> Tree:
        r"""One argument of a command: a group, or a single digit, letter or command (``\frac12``)."""
        self.enter()
        char = self.peek()
        if char == "{":
            tree = self.group()
        elif char.isdigit() and char.isascii():
            self.position += 1
            tree = ("num", Fraction(int(char)))
        elif char.isalpha() and char.isascii() and self.symbols:
            self.position += 1
            tree = ("sym", char)
        elif char == "\\":
            tree = self.commanded()
        else:
            raise Unreadable("a command lacks its argument")
        self.nesting -= 1
        return tree

    def root(self) -> Tree:
        index: Tree = ("num", Fraction(2))
        if self.take("["):
            index = self.sum()
            if not self.take("]"):
                raise Unreadable("']' is missing")
        char = self.peek()
        radicand = self.group() if char == "(" else ("num", self.numeral()) if char.isdigit() else self.argument()
        return ("pow", radicand, ("prod", ((-1, index),)))

    def call(self, name: str) -> Tree:
        """A function with its power, base and argument: sin^2 x, log_2 8, ln(b/a), cos 2 pi f t."""
        base: Tree | None = None
        if name == "lg":
            base = ("num", Fraction(10))
        elif name == "log" and self.take("_"):
            base = self.argument()
        elif name == "log":
            self.bare_log = True
            base = ("num", Fraction(self.log_base)) if self.log_base else None
        power: Tree | None = None
        if self.peek() == "^":
            self.position += 1
            power = self.exponent()
            if power == MINUS_ONE and name in _INVERSE:
                name, power = _INVERSE[name], None
        self.enter()
        self.in_function += 1
        tree: Tree = ("call", "ln" if name in ("log", "lg") else name, self.function_argument())
        self.in_function -= 1
        self.nesting -= 1
        if base is not None:
            tree = ("prod", ((1, tree), (-1, ("call", "ln", base))))
        return tree if power is None else ("pow", tree, power)

    def of_several(self, name: str) -> Tree:
        r"""``\max(a, b, c)``, ``\gcd(4, 6)``, also in braces: taken two by two."""
        braces = self.take("\\{")
        if not braces and not self.take("("):
            raise Unreadable("a command lacks its argument")
        self.of_values += 1  # (84,126) are two numbers
        tree = self.sum()
        while self.take(","):
            tree = ("of", name, tree, self.sum())
        self.of_values -= 1
        if not self.take("\\}" if braces else ")"):
            raise self.unreadable()
        return tree

    def function_argument(self) -> Tree:
        """A group, or the product of numbers and plain symbols that follows: sin 2x cos y is sin(2x) cos(y)."""
        if self.peek() in ("(", "[", "{"):
            return self.group()
        sign = self.sign()
        factors = [(1, self.power())]
        while self.command() == "pi" or (
            self.symbols and _ANGLE.match(self.text, self.position) and self.plain_word() not in FUNCTIONS
        ):
            factors.append((1, self.power()))
        return signed(sign, factors[0][1] if len(factors) == 1 else ("prod", tuple(factors)))

    def decorated(self, name: str) -> Tree:
        start = self.position
        self.argument()
        inner = plain(self.text[start : self.position])
        return ("sym", self.symbol(f"e_{inner}" if name == "hat" else f"{name}({inner})"))  # the unit vector e_r
