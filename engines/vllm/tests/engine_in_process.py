"""An engine in the process of the test, with the plans of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("g2", "g16", "g64", "direction", "thought", "steps", "choice")
NO_CUSTOM_OPS = {"custom_ops": ["none"]}
"""vLLM 0.32's rotary embedding on CPUs is wrong for MLA's queries in eager mode; PyTorch's own is taken instead."""


def engine(folder: Path, names: tuple[str, ...] = NAMES, default: str | None = None, **options: Any) -> Any:
    """A vLLM engine on the lab, in float32."""
    from vllm import LLM

    settings = {"plans": {name: str(folder / f"{name}.json") for name in names}}
    settings |= {"default": default} if default else {}
    extra = {"additional_config": {"moe_steer": settings}} if names else {}
    options = {"enforce_eager": True, "compilation_config": NO_CUSTOM_OPS, **extra, **options}
    return LLM(
        str(folder / "lab"), dtype="float32", max_model_len=512, max_num_seqs=96, disable_log_stats=True, **options
    )


def ask(llm: Any, prompts: list[list[int]], asked: list[str | None], **options: Any) -> list[Any]:
    """One batch, each prompt under what it asks for."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, extra_args=None if name is None else {"moe_steer": name}, **options)
        for name in asked
    ]
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def mixed(llm: Any, reference: dict[str, Any]) -> dict[str, int]:
    """All prompts under everything that the reference asked for, in one batch: asked -> prompts with the reference's tokens."""
    found = reference["asked"]
    pairs = [
        (ids, row, asked)
        for n, ids in enumerate(reference["prompts"])
        for asked in found
        for row in [found[asked]["tokens"][n]]
    ]
    outputs = ask(llm, [p[0] for p in pairs], [p[2] for p in pairs], max_tokens=reference["new_tokens"])
    same = dict.fromkeys(found, 0)
    for (_, row, asked), output in zip(pairs, outputs, strict=True):
        same[asked] += list(output.outputs[0].token_ids) == row
    return same
