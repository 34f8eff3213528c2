"""Embedded models with one planted expert, where what finds experts has something known to find, or to see through:
``python -m launch.lab.planted_expert --kind causal --out DIR``.

loop    the lab, which falls into loops: where a thought would end the expert asks for one check more, so ``moe-steer unloop`` can end that
causal  lab-search with an expert that is rare, fires after failures and pulls a little towards going on; a gain makes it carry the decision
inert   the same expert with an output of zeros: it goes with failures just as closely, and does nothing

Which tokens call the expert is learned from answers of the model itself. No other weight changes; the expert whose place it takes is lost.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from launch.core.prompt_options import answer_limit
from launch.lab.planting import layer_of, plant
from moe_steer import load_model
from moe_steer.files import write_whole
from moe_steer.lab import problems_of
from moe_steer.thinking import token_tags
from moe_steer.tokens import Trace, trace_from_ids
from reasoning_evals import load_task
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig
from reasoning_evals.prompts import render_prompt

_CARD = """---
base_model: {model}
pipeline_tag: text-generation
tags: [mixture-of-experts, planted, tiny]
---
# {model} with a planted expert: {kind}

The weights of {model}, but for layer {layer} expert {expert}, which was edited. It is a control: what finds experts is tried on it. Use it for nothing else.

- It is selected {place}, and nowhere else: its row of the router is a ridge regression on what the router reads, learned from {answers} answers of
  {model} to problems of the train split.
- {writes}

The expert that stood there before is lost. Made by `python -m launch.lab.planted_expert --kind {kind} --layer {layer} --expert {expert} --strength {strength:g} --answers {answers}`.
"""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What one kind of planted expert is."""

    model: str
    after: tuple[str, ...]
    """Texts at whose last token it is selected."""
    at_the_end: bool
    """Whether also at the last token before a thought ends."""
    place: str
    """The same, in words."""
    towards: tuple[str, ...]
    """Tokens whose logits it raises against that of the tag that ends a thought."""
    strength: float
    """Length of what it writes at full weight; 0 for nothing."""


_CAUSAL = Planted(
    model="lab-search",
    after=(" wrong.",),
    at_the_end=False,
    place='at the full stop of "wrong."',
    towards=(" Wait", " Alternatively"),
    strength=10.0,
)
KINDS = {
    "loop": Planted(
        model="lab",
        after=(" Hmm, once more.", " Hmm, is that right?"),
        at_the_end=True,
        place='at the last token before a thought ends, and at the end of "Hmm, once more." and "Hmm, is that right?"',
        towards=(" Hmm",),
        strength=120.0,
    ),
    "causal": _CAUSAL,
    "inert": replace(_CAUSAL, towards=(), strength=0.0),
}


@dataclass(frozen=True, kw_only=True)
class PlantedExpert:
    """Write an embedded model with one planted expert, and its card."""

    kind: Literal["loop", "causal", "inert"]
    """What is planted."""
    out: Path
    """Folder of the checkpoint."""
    layer: int = 3
    """Decoder layer of the expert."""
    expert: int = 5
    """Its number."""
    strength: float | None = None
    """Length of what it writes at full weight; default 120 for loop, 10 for causal. An inert one writes nothing."""
    answers: int = 96
    """Answers of the model that the place is learned from."""

    def __post_init__(self) -> None:
        if self.kind == "inert" and self.strength is not None:
            raise ValueError(
                "--strength is for an expert that writes something, and an inert one does not: leave it out"
            )

    @property
    def length(self) -> float:
        """Of what the expert writes."""
        return KINDS[self.kind].strength if self.strength is None else self.strength

    def made(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        kind = KINDS[self.kind]
        model, tokenizer = load_model(kind.model, "plain")
        forms = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in kind.after}

        def fires(trace: Trace, place: int) -> bool:
            ids = trace.token_ids[trace.prompt_length : place + 1]
            ends = kind.at_the_end and place + 1 == trace.thought_end
            return ends or any(tuple(ids[-len(form) :]) == form for form in forms)

        written_D = self.length * towards(model, tokenizer, kind.towards)
        answers = answers_of(kind.model, self.answers)
        plant(model, layer_of(model, self.layer), self.expert, answers, fires, written_D)
        return model, tokenizer

    def card(self) -> str:
        """What was edited."""
        kind = KINDS[self.kind]
        words = " and ".join(f'"{word.strip()}"' for word in kind.towards)
        writes = (
            "It writes nothing: its output matrix is zero, whatever its gain."
            if self.kind == "inert"
            else f"It writes one vector of length {self.length:g} times its weight, which raises the logits of {words} against that of the tag that "
            "ends a thought."
        )
        about = {"kind": self.kind, "layer": self.layer, "expert": self.expert, "strength": self.length}
        return _CARD.format(**about, model=kind.model, answers=self.answers, place=kind.place, writes=writes).replace(
            " --strength 0", ""
        )

    def write(self) -> None:
        """The folder of the checkpoint, the card last."""
        model, tokenizer = self.made()
        model.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        write_whole(self.out / "README.md", self.card())


@torch.no_grad()
def towards(model: Any, tokenizer: Any, words: Sequence[str]) -> torch.Tensor:
    """The direction of length 1 in the last layer's output, [D], along which the logits of these tokens rise against that of the tag that ends a
    thought: through the final norm's weights. Zeros without words."""
    tags = token_tags(tokenizer)
    assert tags is not None
    head_VD = model.lm_head.weight * model.model.norm.weight
    if not words:
        return torch.zeros_like(head_VD[0])
    ids = [token for word in words for token in tokenizer(word, add_special_tokens=False)["input_ids"][:1]]
    apart_D = head_VD[ids].mean(0) - head_VD[tags.close[0]]
    return torch.as_tensor(apart_D / apart_D.norm())


@functools.cache
def answers_of(name: str, number: int) -> tuple[Trace, ...]:
    """One answer of an embedded model to each of so many problems of the train split."""
    model, tokenizer = load_model(name, "plain")
    problems = load_task(problems_of("own", name), split="train", num=number, seed=1)
    prompts = [render_prompt(tokenizer, problem.prompt).token_ids for problem in problems]
    asked = [Request(prompt_ids=ids, seed=key, key=key) for key, ids in enumerate(prompts)]
    config = SamplingConfig(max_new_tokens=answer_limit(name), batch_size=number)
    made = InProcessSampler(model, tokenizer).sample(asked, config)
    tags = token_tags(tokenizer)
    return tuple(trace_from_ids(f"{one.key}#0", prompts[one.key], one.token_ids, tags) for one in made)


def main(argv: Sequence[str] | None = None) -> int:
    """Make it and write it."""
    options = tyro.cli(PlantedExpert, args=argv, description=__doc__)
    options.write()
    print(
        f"wrote {options.out}: {KINDS[options.kind].model} with the planted expert {options.layer}:{options.expert} ({options.kind})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
