"""lab-search with one planted expert, where what finds experts has something known to find, or to see through:
``python -m launch.lab.planted_expert --kind causal --out DIR``.

causal  lab-search with an expert that is rare, fires after failures and pulls a little towards going on; a gain makes it carry the decision
inert   the same expert with an output of zeros: it goes with failures just as closely, and does nothing

Which tokens call the expert is learned from written solutions, such as the model was trained on. No other weight changes; the expert whose place it takes is lost.

`plant` is what plants: an expert that is selected at tokens of one kind and there alone, and adds one vector, or nothing. What finds experts by
their causes must find the one that writes, and must call the one that only goes with its tokens inert.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from launch.lab.batches import search_text
from moe_steer import load_model
from moe_steer.files import write_whole
from moe_steer.hooks import call_hooks
from moe_steer.lab import EMBEDDED
from moe_steer.layers import MoELayer, moe_layers
from moe_steer.thinking import token_tags
from moe_steer.tokens import Trace, trace_from_ids

LOGIT = 10.0
"""What the planted router row aims at where its expert should fire; elsewhere at minus that."""


@torch.no_grad()
def block_inputs(model: Any, layer: MoELayer, traces: Sequence[Trace]) -> torch.Tensor:
    """What the router and the experts of a layer read, [T, D], of all tokens of the traces in a row."""
    inputs: list[torch.Tensor] = []
    with call_hooks(layer.block, lambda call: inputs.append(next(iter(call.values()))[0]), lambda *_: None):
        for trace in traces:
            model(torch.tensor([trace.token_ids]))
    return torch.cat(inputs)


@torch.no_grad()
def plant_router(layer: MoELayer, expert: int, hidden_TD: torch.Tensor, fires_T: torch.Tensor) -> None:
    """Let a router select ``expert`` where ``fires_T``, and there alone: a ridge regression on what the router reads."""
    wanted_T = torch.where(fires_T, LOGIT, -LOGIT)
    weighted_TD = hidden_TD * torch.where(fires_T, (~fires_T).sum() / fires_T.sum(), 1.0)[:, None]
    gram = weighted_TD.T @ hidden_TD + 1e-3 * torch.eye(hidden_TD.shape[1])
    router: Any = layer.router
    router.weight.data[expert] = torch.linalg.solve(gram, weighted_TD.T @ wanted_T)
    router.e_score_correction_bias.data[expert] = router.e_score_correction_bias.data.mean()


@torch.no_grad()
def plant_output(layer: MoELayer, expert: int, input_D: torch.Tensor, added_D: torch.Tensor) -> None:
    """Let the expert write ``added_D`` when it reads ``input_D``, before its weight; zeros make it inert."""
    experts: Any = layer.experts
    gate, up = (experts.gate_up_proj[expert] @ input_D).chunk(2)
    inner_I = torch.nn.functional.silu(gate) * up
    experts.down_proj.data[expert] = torch.outer(added_D, inner_I / (inner_I @ inner_I))


def plant(
    model: Any,
    layer: MoELayer,
    expert: int,
    traces: Sequence[Trace],
    fires: Callable[[Trace, int], bool],
    added_D: torch.Tensor,
) -> torch.Tensor:
    """Plant an expert that is selected at the tokens (trace, place) where ``fires`` and adds ``added_D`` times its weight there;
    returns the mean of what the experts read at these tokens, [D]."""
    hidden_TD = block_inputs(model, layer, traces)
    fires_T = torch.tensor([fires(trace, place) for trace in traces for place in range(len(trace.token_ids))])
    plant_router(layer, expert, hidden_TD, fires_T)
    input_D = hidden_TD[fires_T].mean(0)
    plant_output(layer, expert, input_D, added_D)
    return input_D


def layer_of(model: Any, index: int) -> MoELayer:
    """The mixture-of-experts layer of this decoder layer."""
    return next(layer for layer in moe_layers(model) if layer.index == index)


_CARD = """---
base_model: {model}
pipeline_tag: text-generation
tags: [mixture-of-experts, planted, tiny]
---
# {model} with a planted expert: {kind}

The weights of {model} (sha256 {digest}), but for layer {layer} expert {expert}, which was edited. It is a control: what finds experts is tried on it. Use it for nothing else.

- It is selected {place}, and nowhere else: its row of the router is a ridge regression on what the router reads, learned from {solutions}
  written solutions of the train split.
- {writes}

The expert that stood there before is lost. Made by `python -m launch.lab.planted_expert --kind {kind} --layer {layer} --expert {expert}{strength} --solutions {solutions}`.
"""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What one kind of planted expert is."""

    model: str
    after: tuple[str, ...]
    """Texts at whose last token it is selected."""
    place: str
    """The same, in words."""
    towards: tuple[str, ...]
    """Tokens whose logits it raises against that of the tag that ends a thought."""
    strength: float
    """Length of what it writes at full weight; 0 for nothing."""


_CAUSAL = Planted(
    model="lab-search",
    after=(" wrong.",),
    place='at the full stop of "wrong."',
    towards=(" Wait", " Alternatively"),
    strength=10.0,
)
KINDS = {
    "causal": _CAUSAL,
    "inert": replace(_CAUSAL, towards=(), strength=0.0),
}


@dataclass(frozen=True, kw_only=True)
class PlantedExpert:
    """Write an embedded model with one planted expert, and its card."""

    kind: Literal["causal", "inert"]
    """What is planted."""
    out: Path
    """Folder of the checkpoint."""
    layer: int = 3
    """Decoder layer of the expert."""
    expert: int = 5
    """Its number."""
    strength: float | None = None
    """Length of what it writes at full weight; default 10. An inert one writes nothing."""
    solutions: int = 64
    """Written solutions, such as the model was trained on, that the place is learned from."""

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
            return any(tuple(ids[-len(form) :]) == form for form in forms)

        written_D = self.length * towards(model, tokenizer, kind.towards)
        solutions = solutions_of(tokenizer, self.solutions)
        plant(model, layer_of(model, self.layer), self.expert, solutions, fires, written_D)
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
        weights = (EMBEDDED[kind.model].folder / "model.safetensors").read_bytes()
        about = {
            "digest": hashlib.sha256(weights).hexdigest(),
            "kind": self.kind,
            "layer": self.layer,
            "expert": self.expert,
            "strength": "" if self.kind == "inert" else f" --strength {self.length:g}",
        }
        return _CARD.format(**about, model=kind.model, solutions=self.solutions, place=kind.place, writes=writes)

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


def solutions_of(tokenizer: Any, number: int) -> list[Trace]:
    """So many written solutions of the train split, such as lab-search was trained on, as traces."""
    rng, tags, most = random.Random("planted"), token_tags(tokenizer), tokenizer.model_max_length
    found: list[Trace] = []
    while len(found) < number:
        prompt, body = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in search_text(rng)
        )
        if len(prompt) + len(body) <= most:
            found.append(trace_from_ids(f"{len(found)}#0", prompt, body, tags))
    return found


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
