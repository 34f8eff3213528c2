"""Options that several scripts of this folder have: their types and their help, said once; each script has its own defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from tyro.conf import arg

DataDir = Annotated[str | None, arg(help="Folder or file with the task's data, instead of the hub.")]
Greedy = Annotated[bool, arg(help="One greedy answer a problem instead of samples.")]
Out = Annotated[str | None, arg(help="Folder of the run; default runs/NAME.")]
Temperature = Annotated[float, arg(help="Divides the logits.")]
TopP = Annotated[float, arg(help="Smallest set of tokens with at least this probability.")]
MaxNewTokens = Annotated[
    int | None,
    arg(help="Longest answer in tokens, thought included; default 256 for lab, 384 for lab-dense, 32768 else."),
]
Backend = Annotated[str, arg(help="How the model is held; see moe_steer.load_model.")]
Offload = Annotated[str, arg(help="For --backend zero3: where shards rest, 'cpu' or a folder on a local NVMe disk.")]
Dtype = Annotated[str, arg(help="Precision: auto (as stored), float32, bfloat16 or float16.")]
Revision = Annotated[str | None, arg(help="Revision of a hub model.")]
TrustRemoteCode = Annotated[bool, arg(help="Run model code that comes with the checkpoint.")]
StrictArms = Annotated[bool, arg(help="Fail when an arm changed nothing at all.")]
LocalRank = Annotated[int, arg(help="Given by the launcher.")]

USUAL_PROMPT = 1024
"""Tokens of a prompt, where memory must be planned before the prompts are known."""

ELSEWHERE = frozenset({"out", "name", "local_rank", "strict", "backend", "offload"})
"""Options that decide where a run is written and who writes it, not what it finds."""


def check_counts(options: Any, names: Collection[str]) -> None:
    """ValueError for a number below 1 among the named options; None is no number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give a whole number >= 1")


def refuse_unread(options: Any, readers: Mapping[str, Collection[str]], present: Collection[str], where: str) -> None:
    """ValueError for an option that differs from its default and that nothing present would follow.

    ``readers``: option -> what follows it. ``where``: the option that names what is present.
    """
    for name, following in readers.items():
        if getattr(options, name) != getattr(type(options), name) and not set(following) & set(present):
            raise ValueError(
                f"--{name.replace('_', '-')} is for {', '.join(following)}: add one to {where}, or leave it out"
            )


def refuse_idle_data_dir(options: Any) -> None:
    """ValueError for a folder of data beside problems that are made up."""
    if options.data_dir is not None and options.problems == "lab":
        raise ValueError(
            f"--data-dir {options.data_dir} is for a task, and the lab makes its problems up: leave it out"
        )


def refuse_greedy_samples(number: int | None, option: str = "--samples") -> None:
    """ValueError for more than one greedy answer to a problem."""
    if number not in (None, 1):
        raise ValueError(f"--greedy gives the same answer every time: leave {option} {number} out")


def refuse_idle_drawing(options: Any) -> None:
    """ValueError for a temperature or a top-p that greedy decoding would not follow."""
    for name in ("temperature", "top_p"):
        if getattr(options, name) != getattr(type(options), name):
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name):g} would change nothing: the most likely token is taken at each step"
            )


def check_num_problems(num_problems: int | None, name: str = "num_problems") -> None:
    """ValueError for fewer problems than a comparison needs."""
    if num_problems is not None and num_problems < 2:
        raise ValueError(f"{name} is {num_problems}: give at least 2, a comparison needs them")


def config_of(options: Any, left_out: Collection[str] = ELSEWHERE) -> dict[str, Any]:
    """The options that decide the results, as plain JSON values."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key not in left_out
    }


def load_asked(options: Any) -> tuple[Any, Any]:
    """The model that the options ask for, with its tokenizer."""
    from moe_steer import load_model

    job = options.job() if hasattr(options, "job") else options
    sampling = hasattr(job, "token_limit")  # collecting statistics decodes nothing
    return load_model(
        options.model,
        options.backend,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        offload=options.offload,
        batch=job.rows if sampling else 1,
        context=USUAL_PROMPT + job.token_limit if sampling else None,
    )
