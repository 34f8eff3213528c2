r"""The worker process that compares what our own grammar does not read: integrals, sums, derivatives, set operations.

It parses with math-verify's LaTeX parser and compares with sympy and math-verify. Both may run for hours or never end, and
their own time limits need an alarm in the main thread; so they run here without a limit, and the parent kills this process
when the time is up. Protocol: one JSON object a line on standard input, one on standard output.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import random
import re
import sys
from typing import Any

MEMORY_LIMIT = 4 << 30
"""Limit of the address space in bytes; a formula that needs more counts as unreadable."""
GRACE = 5.0
"""Seconds after the parent's limit at which this process ends itself, in case the parent has died."""
_LETTERS = "abcfghjklmnopqrstuvwyzABCDFGHJKLMPRTUVWXYZ"
_SUBSCRIPTED = r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:'|_\s*(?:\w|\{(?:[^{}]|\{[^{}]*\})*\}|\\text\s*\{[^{}]*\}))+"
_PROTECTED = re.compile(
    rf"{_SUBSCRIPTED}|(?<!\\)(?<![a-zA-Z])\\(?:gamma|Gamma|beta|zeta|Lambda)(?![a-zA-Z])|(?<![\\a-zA-Z])I(?![a-zA-Z])"
)
_OPERATORS = re.compile(r"\\(?:int|iint|oint|sum|prod|lim|log|max|min|sup|inf)(?![a-zA-Z])")


def protect(*formulas: str) -> list[str]:
    r"""Replace symbols that the parser would misread by plain letters, the same letter for the same symbol.

    The parser reads I_0 as the imaginary unit, \gamma for Euler's constant, k' for k.
    """
    free = [
        letter for letter in _LETTERS if not any(letter in re.sub(r"\\[a-zA-Z]+", "", formula) for formula in formulas)
    ]
    names: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        symbol = match.group()
        if _OPERATORS.match(symbol):
            return symbol
        key = re.sub(r"\\text|[{}\s]", "", symbol)
        if key not in names:
            if not free:
                raise ValueError("more symbols than letters")
            names[key] = free.pop()
        return f" {names[key]} "

    return [_PROTECTED.sub(rename, formula) for formula in formulas]


def compare(target: str, answer: str) -> dict[str, str]:
    """{"verdict": same | different | target | answer, "detail": ...}; the last two say which of them cannot be read."""
    ours, theirs = protect(target, answer)
    parsed = []
    for which, formula in (("target", ours), ("answer", theirs)):
        try:
            parsed.append(_parse(formula))
        except Exception as error:  # the parser raises bare Exceptions
            return {"verdict": which, "detail": " ".join(str(error).split())[:120]}
    try:
        same = _same(*parsed)
    except Exception as error:
        return {"verdict": "answer", "detail": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}
    return {"verdict": "same" if same else "different", "detail": ""}


def _parse(formula: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if not formula.strip():
        raise ValueError("empty formula")
    return latex2sympy(
        formula,
        normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none"),
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )


def _same(target: Any, answer: Any) -> bool:
    import sympy
    from math_verify import verify

    if isinstance(target, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _same_expression(target.doit(), answer.doit())
    if isinstance(target, sympy.Expr) != isinstance(answer, sympy.Expr):
        return False
    return bool(verify(target, answer, float_rounding=30, strict=True, timeout_seconds=None))


def _same_expression(target: Any, answer: Any) -> bool:
    """Equal to 20 digits, relatively, at three points; where an integral or a sum has no value, equal after simplification."""
    import sympy

    symbols = sorted(target.free_symbols | answer.free_symbols, key=str)
    compared = 0
    for point in range(3):
        values = {
            symbol: sympy.Rational(random.Random(f"{point}/{symbol}").randrange(3 * 10**8, 3 * 10**9), 10**9)
            for symbol in symbols
        }
        left, right = (sympy.N(side.subs(values), 30) for side in (target, answer))
        if not (left.is_number and right.is_number and left.is_finite and right.is_finite):
            continue
        if abs(left - right) > max(abs(left), abs(right)) * sympy.Float(10) ** -20:
            return False
        compared += 1
    return compared >= 2 or bool(sympy.simplify(target - answer) == 0)


def serve() -> None:
    """Answer requests until standard input ends."""
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 1
    )  # stdout carries the protocol: what a library prints must not get into it
    logging.disable(logging.CRITICAL)
    _limit_memory()
    import math_verify  # noqa: F401  (slow to import: before the parent starts its clock)

    _parse("x")
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["timeout"] + GRACE, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        try:
            reply = compare(request["target"], request["answer"])
        except (MemoryError, RecursionError) as error:
            reply = {"verdict": "answer", "detail": type(error).__name__}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not a Unix machine
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
