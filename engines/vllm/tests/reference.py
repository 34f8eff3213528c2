"""What hooked transformers models write, for the tests on a real vLLM: run in this project's environment, read in vLLM's.

    python engines/vllm/tests/reference.py FOLDER

writes plans, models in the form that vLLM serves, and reference.json: for each model its prompts, and for every plan (and dose) the
greedy tokens and what the audit counted.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.serve import with_latent_sizes
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, bake, load_model, steer
from moe_steer.lab import LAB_DENSE, LAB_MODEL, LAB_SEARCH, LAB_SERVED, OWN_PROBLEMS, problems_of
from reasoning_evals import load_task

NUM_PROMPTS = 8


def direction(width: int, length: float) -> Tensor:
    vector_D = torch.randn(width, generator=torch.Generator().manual_seed(5))
    return length * vector_D / vector_D.norm()


def lab_plans() -> dict[str, SteeringPlan]:
    """Gains, a direction, both with scopes, and a say in the choice; all of them change what the model writes."""
    vector_D = direction(128, 90.0)

    def gains(gain: float, **more: Any) -> SteeringPlan:
        return SteeringPlan(experts=[ExpertGain(1, 12, gain), ExpertGain(3, 2, gain)], **more)

    answer = ResidualVector(1, vector=vector_D, scope="answer", strength=2.0)
    return {
        "g2": gains(2.0),
        "g16": gains(16.0),
        "g64": gains(64.0),
        "direction": SteeringPlan(residual=[ResidualVector(2, vector=vector_D)]),
        "thought": gains(64.0, scope="thought", residual=[answer]),
        "steps": SteeringPlan(
            residual=[
                ResidualVector(1, vector=vector_D, scope="step_end", strength=4.0),
                ResidualVector(2, vector=vector_D, scope="after:20", strength=-1.0),
            ]
        ),
        "choice": choosing(1, 2, 3, scope="generated"),
    }


def choosing(first: int, second: int, third: int, **more: Any) -> SteeringPlan:
    """Experts forced in and out, a bias, and weights scaled back."""
    experts = [
        ExpertGain(first, 6, 30.0, force="in"),
        ExpertGain(first, 3, force="out"),
        ExpertGain(second, 5, 8.0, logit_bias=1.5),
        ExpertGain(third, 2, 16.0),
    ]
    return SteeringPlan(experts=experts, renormalize=True, **more)


def dense_plans() -> dict[str, SteeringPlan]:
    """Directions in the scopes that follow a text."""
    vector_D = direction(128, 30.0)
    return {
        "d1": SteeringPlan(residual=[ResidualVector(2, vector=vector_D)]),
        "d-thought": SteeringPlan(
            residual=[
                ResidualVector(1, vector=vector_D, scope="thought"),
                ResidualVector(2, vector=vector_D, scope="answer", strength=-2.0),
            ]
        ),
        "d-steps": SteeringPlan(residual=[ResidualVector(1, vector=vector_D, scope="step_end", strength=2.0)]),
        "d-prompt": SteeringPlan(residual=[ResidualVector(1, vector=vector_D, scope="prompt", strength=2.0)]),
    }


def search_plans() -> dict[str, SteeringPlan]:
    """For the lab whose thinking pays."""
    gains = [ExpertGain(layer, expert, 8.0) for layer in (1, 3) for expert in (2, 7, 11)]
    return {
        "s8": SteeringPlan(experts=gains),
        "s-thought": SteeringPlan(experts=gains, scope="thought"),
        "s-persist": SteeringPlan(residual=[ResidualVector(2, vector=direction(128, 60.0), scope="step_end")]),
    }


def qwen_plans() -> dict[str, SteeringPlan]:
    """For a router of another kind, softmax without groups, whose attention vLLM caches on CPUs too."""
    gains = [ExpertGain(layer, expert, 12.0) for layer in (0, 1, 2) for expert in (1, 5)]
    return {
        "q8": SteeringPlan(experts=gains),
        "q-late": SteeringPlan(experts=gains, scope="after:3"),
        "q-choice": choosing(0, 1, 2),
    }


def write_qwen(folder: Path) -> None:
    """Random weights under the lab's tokenizer."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    config = Qwen3MoeConfig(
        vocab_size=966, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_experts=8, **sizes,
        num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=0.15)
    model.save_pretrained(folder, max_shard_size="600KB")
    AutoTokenizer.from_pretrained(LAB_MODEL).save_pretrained(folder)


def main(folder: Path) -> None:
    """Write everything."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(LAB_SERVED, folder / "lab")
    with_latent_sizes(LAB_SEARCH, folder / "search")
    shutil.copytree(LAB_DENSE, folder / "dense")
    write_qwen(folder / "qwen")
    doses = {"g64": 0.25, "direction": -1.0, "d1": 0.5, "q8": 0.5, "s8": 0.5}
    found = {
        "lab": reference("lab", lab_plans(), doses, folder, 160),
        "search": reference("lab-search", search_plans(), doses, folder, 160),
        "dense": reference("lab-dense", dense_plans(), doses, folder, 100),
        "qwen": reference(str(folder / "qwen"), qwen_plans(), doses, folder, 40),
    }
    for name, loader in (("baked", None), ("overlay", "in-order")):
        bake(folder / "qwen", qwen_plans()["q8"], folder / name, overlay=loader)
    (folder / "reference.json").write_text(json.dumps(found))


def reference(
    name: str, plans: Mapping[str, SteeringPlan], doses: Mapping[str, float], folder: Path, new_tokens: int
) -> dict[str, Any]:
    """Prompts, and under every plan and dose what the model writes after them."""
    model, tokenizer = load_model(name, device="cpu", dtype="float32")
    problems = load_task(problems_of(OWN_PROBLEMS, name), split="test", num=NUM_PROMPTS, seed=3)
    messages = [[{"role": "user", "content": one.prompt}] for one in problems]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in messages]
    asked: dict[str, Any] = {"off": write(model, tokenizer, SteeringPlan(), prompts, new_tokens)}
    for plan_name, plan in plans.items():
        plan.save(folder / f"{plan_name}.json")
        for dose in (1.0, doses.get(plan_name, 1.0)):
            said = plan_name if dose == 1.0 else f"{plan_name}*{dose}"
            if said not in asked:
                asked[said] = write(model, tokenizer, plan.dosed(dose), prompts, new_tokens)
    return {"prompts": prompts, "new_tokens": new_tokens, "asked": asked, "plans": list(plans)}


def write(model: Any, tokenizer: Any, plan: SteeringPlan, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """The greedy tokens after each prompt, and the tokens of each entry's audit row."""
    length, end = max(map(len, prompts)), tokenizer.eos_token_id
    ids_BS = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts])
    real_BS = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    with steer(model, plan, tokenizer=tokenizer, quiet=True), torch.no_grad():
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        texts = model.generate(ids_BS, attention_mask=real_BS, **options)[:, length:].tolist()
    rows = [row[: row.index(end) + 1] if end in row else row for row in texts]
    # Counted over the texts alone, of which the last token is never processed: generate feeds finished rows on.
    whole = [ids + row[:-1] for ids, row in zip(prompts, rows, strict=True)]
    longest = max(map(len, whole))
    ids_BS = torch.tensor([text + [0] * (longest - len(text)) for text in whole])
    real_BS = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in whole])
    lengths = [len(ids) for ids in prompts]
    with steer(model, plan, tokenizer=tokenizer, quiet=True, prompt_lengths=lengths) as audit, torch.no_grad():
        model(ids_BS, attention_mask=real_BS, use_cache=False)
    return {"tokens": rows, "hits": [row["tokens"] for row in audit.to_rows()]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
