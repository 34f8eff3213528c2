"""Second opinion on scopes and on steering: the definitions read literally, and a decode of one row, one token at a time.

Nothing here knows of masks, padding, batches or the rows of a cache: a row is a list of real tokens, each question is answered
from the tokens up to the one that is asked about, and the shifts and gains of one token are applied by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import tiny

SCOPES = (
    "all",
    "prompt",
    "generated",
    "after:0",
    "after:3",
    "thought",
    "answer",
    "step_end",
    "step_end:sentence",
    "step_end:line",
    "step_end:paragraph",
    "step_end:sentence+paragraph",
    "step_end:stop",
)


LINE_ENDS = (30, 40, 50)


def ends_sentence(texts: Sequence[str]) -> bool:
    """Whether the last token ends a sentence, from the text so far: the rule of the documentation, read literally."""

    def waits(before: Sequence[str]) -> bool:
        """Whether the text ends in a full stop that the next token decides about."""
        return before[-1:] == ["..."] or (before[-1:] == ["."] and bool(may_go_on(before[:-1])))

    def may_go_on(before: Sequence[str]) -> bool | None:
        """Of a full stop after this text; None: no sentence ends there."""
        last = before[-1] if before else ""
        line = "".join(before).rpartition("\n")[2]
        opens_list = last in ("4", "x") and has_line(before) and set(line[:-1]) <= {"4", " "}
        if last == "approx" or opens_list:
            return None
        return last[-1:].isdigit() or last == "x"

    def has_line(before: Sequence[str]) -> bool:
        return "\n" in "".join(before)

    last = texts[-1] if texts else ""
    if last in ("so.", "really?", "end.\n\n"):
        return True
    if last == ".":
        return may_go_on(texts[:-1]) is False
    return waits(texts[:-1]) and last[:1].isspace()


def in_scope(scope: str, ids: Sequence[int], prompt: int) -> bool:
    """Whether the last of ``ids`` is in scope, in a row whose first ``prompt`` tokens are its prompt."""
    position, token = len(ids) - 1, ids[-1]
    kind, _, parameter = scope.partition(":")
    if kind == "all":
        return True
    if kind == "prompt":
        return position < prompt
    if kind == "generated":
        return position >= prompt
    if kind == "after":
        return position - prompt >= int(parameter)
    tags = [i for i in ids if i in (tiny.THINK, tiny.END_THINK)]
    phase = tags[-1] if tags else None
    if kind == "answer":
        return phase == tiny.END_THINK
    if kind == "thought":
        return phase == tiny.THINK
    assert kind == "step_end"
    ends = {
        "sentence": ends_sentence([tiny.TEXTS.get(i, f"w{i}") for i in ids]),
        "stop": token in (10, 11, 20, 22, 50),
        "line": token in LINE_ENDS,
        "paragraph": token == 50 or (token == 40 and position > 0 and ids[-2] in LINE_ENDS),
    }
    return phase == tiny.THINK and any(ends[name] for name in (parameter or "sentence+line").split("+"))


@dataclass
class NaiveRow:
    """One row being decoded, batch 1, one token a forward. ``shifts``: (layer, vector, scope); ``gains``: (layer, expert) -> gain."""

    model: Any
    prompt: int
    shifts: Sequence[tuple[int, Tensor, str]] = ()
    gains: Mapping[tuple[int, int], float] = field(default_factory=dict)
    scope: str = "all"
    ids: list[int] = field(default_factory=list)
    cache: Any = None
    fired: dict[Any, int] = field(default_factory=dict)

    def feed(self, token: int) -> Tensor:
        """Process one token: its logits [V]."""
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
        self.ids.append(token)
        with self._hooks():
            out = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return out.logits[0, -1]

    def fork(self) -> NaiveRow:
        """The same row once more, to be continued otherwise."""
        return NaiveRow(
            self.model,
            self.prompt,
            self.shifts,
            self.gains,
            self.scope,
            list(self.ids),
            copy.deepcopy(self.cache),
            dict(self.fired),
        )

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        layers = self.model.model.layers
        with ExitStack() as stack:
            for number, (layer, shift_D, scope) in enumerate(self.shifts):
                if in_scope(scope, self.ids, self.prompt):
                    self.fired[number] = self.fired.get(number, 0) + 1
                    stack.callback(layers[layer].register_forward_hook(_add(shift_D)).remove)
            if in_scope(self.scope, self.ids, self.prompt):
                for layer in {layer for layer, _ in self.gains}:
                    hook = layers[layer].mlp.experts.register_forward_pre_hook(self._multiply(layer))
                    stack.callback(hook.remove)
            yield

    def _multiply(self, layer: int) -> Any:
        def hook(_: Any, args: Any) -> Any:
            hidden, ids_TK, weights_TK = args
            weights_TK = weights_TK.clone()
            for k, expert in enumerate(ids_TK[0].tolist()):
                if (layer, expert) in self.gains:
                    weights_TK[0, k] *= self.gains[layer, expert]
                    self.fired[layer, expert] = self.fired.get((layer, expert), 0) + 1
            return hidden, ids_TK, weights_TK

        return hook


def _add(shift_D: Tensor) -> Any:
    def hook(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + shift_D, *output[1:]) if isinstance(output, tuple) else output + shift_D

    return hook
