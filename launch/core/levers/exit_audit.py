"""What rules that end thoughts early did, as audit rows of a run, beside those of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class _Counted:
    def __init__(self, plan: Any, rules: Sequence[Any]) -> None:
        self._plan, self._rules = plan, rules
        self._before = [Counter(rule.counts) for rule in rules]

    def to_rows(self) -> list[dict[str, Any]]:
        """The plan's rows, and one of each rule: its trials and the tokens that they cost, and the thoughts that it ended."""
        rows = self._plan.to_rows() if hasattr(self._plan, "to_rows") else []
        for rule, before in zip(self._rules, self._before, strict=True):
            now = {name: number - before[name] for name, number in rule.counts.items()}
            rows.append({"kind": "exit", "rule": rule.describe()["rule"], **dict(sorted(now.items()))})
        return rows

    def to_samples(self) -> dict[Any, list[dict[str, Any]]]:
        """The plan's."""
        return self._plan.to_samples() if hasattr(self._plan, "to_samples") else {}


@contextmanager
def counted_exits(context: Callable[[], AbstractContextManager[Any]], rules: Sequence[Any]) -> Iterator[_Counted]:
    """The context of an arm's plan, and what its rules count while it is open."""
    with context() as plan:
        yield _Counted(plan, rules)
