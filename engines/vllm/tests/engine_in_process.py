"""An engine in the process of the test, with the plans of the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NO_CUSTOM_OPS = {"custom_ops": ["none"]}
"""vLLM 0.32's rotary embedding on CPUs is wrong for MLA's queries in eager mode; PyTorch's own is taken instead."""
KERNEL = "CPU_MLA"
"""Where the processor has AMX, vLLM would take its kernel for latent attention, which has no float32; other attention ignores this."""


def engine(folder: Path, model: str, plans: list[str], default: str | None = None, **options: Any) -> Any:
    """A vLLM engine on a model of the reference, in float32."""
    from vllm import LLM

    settings: dict[str, Any] = {"plans": {name: str(folder / f"{name}.json") for name in plans}}
    settings |= {"default": default} if default else {}
    extra = {"additional_config": {"moe_steer": settings}} if plans else {}
    options = {
        "enforce_eager": True,
        "compilation_config": NO_CUSTOM_OPS,
        "max_num_seqs": 96,
        "attention_backend": KERNEL,
        **extra,
        **options,
    }
    return LLM(str(folder / model), dtype="float32", max_model_len=512, disable_log_stats=True, **options)


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
    pairs = [(n, asked) for n in range(len(reference["prompts"])) for asked in found]
    prompts = [reference["prompts"][n] for n, _ in pairs]
    outputs = ask(llm, prompts, [asked for _, asked in pairs], max_tokens=reference["new_tokens"])
    same = dict.fromkeys(found, 0)
    for (n, asked), output in zip(pairs, outputs, strict=True):
        same[asked] += list(output.outputs[0].token_ids) == found[asked]["tokens"][n]
    return same


def all_equal(reference: dict[str, Any]) -> dict[str, int]:
    """What ``mixed`` returns where every text is the reference's."""
    return dict.fromkeys(reference["asked"], len(reference["prompts"]))


def expected_hits(reference: dict[str, Any]) -> dict[str, list[int]]:
    """By plan, over all doses: what the audit in process counted."""
    found: dict[str, list[int]] = {}
    for asked, said in reference["asked"].items():
        name = asked.partition("*")[0]
        if name != "off":
            pairs = zip(found.get(name, [0] * len(said["hits"])), said["hits"], strict=True)
            found[name] = [sum(pair) for pair in pairs]
    return found


def counts(llm: Any) -> list[dict[str, Any]]:
    """What every worker says has fired."""
    return [json.loads(text)["counts"] for text in llm.collective_rpc("steer_status")]
