"""What the hooked transformers model writes, for the tests on a real vLLM: run in this project's environment, read in vLLM's.

    python engines/vllm/tests/reference.py FOLDER

writes plans, the lab in the form that vLLM serves, and reference.json: prompts, and for every plan (and dose) the greedy tokens and
what the audit counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from launch.serving.latent import with_latent_sizes
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, load_model, steer
from moe_steer.lab import LAB_MODEL
from moe_steer.lab.problems import generate_problems

NEW_TOKENS = 160


def plans() -> dict[str, SteeringPlan]:
    """Gains, a direction, both with scopes, and a say in the choice; all of them change what the model writes."""
    vector_D = torch.randn(128, generator=torch.Generator().manual_seed(5))
    vector_D = 90 * vector_D / vector_D.norm()

    def gains(gain: float, **more: Any) -> SteeringPlan:
        return SteeringPlan(experts=[ExpertGain(1, 12, gain), ExpertGain(3, 2, gain)], **more)

    return {
        "g2": gains(2.0),
        "g16": gains(16.0),
        "g64": gains(64.0),
        "direction": SteeringPlan(residual=[ResidualVector(2, vector=vector_D)]),
        "thought": gains(64.0, scope="thought", residual=[ResidualVector(1, vector=vector_D, scope="answer", strength=2.0)]),
        "steps": SteeringPlan(
            residual=[
                ResidualVector(1, vector=vector_D, scope="step_end", strength=4.0),
                ResidualVector(2, vector=vector_D, scope="after:20", strength=-1.0),
            ]
        ),
        "choice": SteeringPlan(
            experts=[
                ExpertGain(1, 12, 30.0, force="in"),
                ExpertGain(1, 3, force="out"),
                ExpertGain(2, 5, 8.0, logit_bias=1.5),
                ExpertGain(3, 2, 16.0),
            ],
            scope="generated",
            renormalize=True,
        ),
    }  # fmt: skip


ASKED = ("off", "g2", "g16", "g64", "g64*0.25", "direction", "direction*-1.0", "thought", "steps", "choice")


def main(folder: Path) -> None:
    """Write everything."""
    folder.mkdir(parents=True, exist_ok=True)
    with_latent_sizes(LAB_MODEL, folder / "lab")
    model, tokenizer = load_model("lab", device="cpu")
    named = plans()
    for name, plan in named.items():
        plan.save(folder / f"{name}.json")
    messages = [[{"role": "user", "content": one.prompt}] for one in generate_problems("test", 8, seed=3)]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in messages]
    found: dict[str, Any] = {}
    for asked in ASKED:
        name, _, dose = asked.partition("*")
        plan = SteeringPlan() if name == "off" else named[name].dosed(float(dose or 1))
        rows = []
        with steer(model, plan, tokenizer=tokenizer, quiet=True) as audit, torch.no_grad():
            for ids in prompts:
                text = model.generate(
                    torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
                rows.append(text[0, len(ids) :].tolist())
        found[asked] = {"tokens": rows, "hits": [row["tokens"] for row in audit.to_rows()]}
    (folder / "reference.json").write_text(json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS, "asked": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
