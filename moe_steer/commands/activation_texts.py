"""What the SAE commands run through a model: the token ids of traces and of plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_steer.layers import text_config


def token_sequences(
    traces: Sequence[str], texts: Sequence[str], model: Any, tokenizer: Any, arm: str | None = None
) -> list[list[int]]:
    """All of them, cut at the model's context; ``arm``: of traces, see ``read_any_traces``. ValueError when there are none."""
    from launch.wiring import read_any_traces

    if not traces and not texts:
        raise ValueError("there is nothing to run through the model: give --traces or --texts")
    if arm is not None and not traces:
        raise ValueError(f"--arm {arm} is of runs, and only --texts are given: leave it out")
    found = [list(trace.token_ids) for trace in read_any_traces(traces, tokenizer, arm)] if traces else []
    for name in texts:
        found += _of_lines(name, tokenizer)
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return [item[:limit] for item in found]


def hold_out(sequences: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """(to train on, to measure on): every twentieth is kept back, at least one."""
    if len(sequences) < 2:
        raise ValueError(f"there are {len(sequences)} texts: give at least 2, one of them to measure the SAE on")
    every = min(20, len(sequences))
    return (
        [item for number, item in enumerate(sequences) if number % every != every - 1],
        [item for number, item in enumerate(sequences) if number % every == every - 1],
    )


def at_most(sequences: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """The first sequences that hold so many tokens together, one at least."""
    kept: list[list[int]] = []
    held = 0
    for item in sequences:
        if kept and held + len(item) > num_tokens:
            break
        kept.append(item)
        held += len(item)
    return kept


def _of_lines(name: str, tokenizer: Any) -> list[list[int]]:
    from reasoning_evals.problems import not_utf8

    try:
        lines = [line for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"the texts {name!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(name, error)) from error
    if not lines:
        raise ValueError(f"{name!r} holds no texts: write one a line")
    return [list(tokenizer(line)["input_ids"]) for line in lines]
