"""A list option that stands twice on a command line: the parser would keep the last list and drop the others without a word.

Of an option with one value the last one counts, as everywhere.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any


def refuse_repeated(program: str, options: type[Any], arguments: Sequence[str]) -> None:
    """Exit with 2, and one line on stderr, when a list among the fields of the dataclass ``options`` is given twice."""
    lists = {field.name for field in dataclasses.fields(options) if "tuple[" in str(field.type)}
    seen: set[str] = set()
    for token in arguments:
        if token == "--":
            return
        name = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if not token.startswith("--") or name not in lists:
            continue
        if name in seen:
            option = f"--{name.replace('_', '-')}"
            print(f"{program}: {option} is given twice: give it once, with all its values behind it", file=sys.stderr)
            raise SystemExit(2)
        seen.add(name)
