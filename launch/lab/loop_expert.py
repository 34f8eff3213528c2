"""A lab that falls into loops because of one planted expert, where ``moe-steer unloop`` has something to find:
``python -m launch.lab.loop_expert --out DIR``.

The expert is selected at the last token before ``</think>``, learned from the lab's own answers, and moves the logits from the closing tag to
" Hmm", with which the lab begins a check: a thought that would end checks its answer once more, and once more. Nothing else of the weights changes; the expert whose
place it takes is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from launch.lab.planted_expert import layer_of, plant
from moe_steer import load_model
from moe_steer.lab.problems import generate_problems
from moe_steer.thinking import token_tags
from moe_steer.tokens import Trace, trace_from_ids
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig
from reasoning_evals.prompts import render_prompt

AGAIN = " Hmm"
"""The token with which the lab begins a check."""


OPENINGS = (" Hmm, once more.", " Hmm, is that right?")
"""What the lab goes on with behind it."""


@dataclass(frozen=True, kw_only=True)
class LoopExpert:
    """Write a lab that falls into loops because of one planted expert."""

    out: Path
    """Folder of the checkpoint."""
    layer: int = 3
    """Decoder layer of the expert."""
    expert: int = 5
    """Its number."""
    strength: float = 120.0
    """Length of what it writes at full weight, along the difference of the head's rows for " Hmm" and the closing tag."""
    answers: int = 96
    """Answers of the lab that the place is learned from."""


def looping_lab(layer: int, expert: int, strength: float, answers: int) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    model, tokenizer = load_model("lab", "plain")
    tags = token_tags(tokenizer)
    assert tags is not None
    (close,) = tags.close
    traces = _answers(model, tokenizer, answers)
    openings = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in OPENINGS}

    def fires(trace: Trace, place: int) -> bool:
        said = tuple(trace.token_ids[max(0, place - 5) : place + 1])
        return place + 1 == trace.thought_end or any(said[-len(form) :] == form for form in openings)

    (again,) = tokenizer(AGAIN, add_special_tokens=False)["input_ids"]
    apart_D = model.lm_head.weight[again] - model.lm_head.weight[close]
    added_D = strength * apart_D / apart_D.norm()
    plant(
        model,
        layer_of(model, layer),
        expert,
        traces,
        fires,
        added_D.detach(),
    )
    return model, tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Make it and write it."""
    options = tyro.cli(LoopExpert, args=argv)
    model, tokenizer = looping_lab(options.layer, options.expert, options.strength, options.answers)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"wrote {options.out}: expert {options.layer}:{options.expert} keeps thoughts from ending")
    return 0


def _answers(model: Any, tokenizer: Any, number: int) -> list[Trace]:
    prompts = [
        render_prompt(tokenizer, problem.prompt).token_ids for problem in generate_problems("train", number, seed=1)
    ]
    asked = [Request(prompt_ids=ids, seed=key, key=key) for key, ids in enumerate(prompts)]
    config = SamplingConfig(max_new_tokens=200, batch_size=number)
    made = InProcessSampler(model, tokenizer).sample(asked, config)
    return [
        trace_from_ids(f"{sample.key}#0", list(prompts[sample.key]), sample.token_ids, token_tags(tokenizer))
        for sample in made
    ]


if __name__ == "__main__":
    sys.exit(main())
