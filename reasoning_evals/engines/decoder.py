"""A step of a batch: how a token goes through the model and the rules by which one is chosen; and the texts that rules write into rows while these
are decoded, with answers on trial that leave no trace in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from reasoning_evals.engines.cache_rows import can_join, fork_rows, keeps_states_alone, reads_padding
from reasoning_evals.engines.kv_cache import AbsorbedLatents, growing_cache
from reasoning_evals.engines.sampling import SamplingConfig


class Decoder:
    """What the batches of one call of ``sample`` share: the model and the rule by which tokens are chosen."""

    def __init__(
        self, model: Any, config: SamplingConfig, stop_ids: Sequence[int], processors: LogitsProcessorList | None
    ) -> None:
        self.model = model
        self.config = config
        self.processors: Callable[..., Tensor] | None = processors or None
        self.redirects = [item.redirect for item in processors or () if hasattr(item, "redirect")]
        """Rules that act on the token that was drawn, such as ``reasoning_evals.decoding.Continuation``."""
        self.interjects = [item for item in processors or () if hasattr(item, "interject")]
        """Rules that write texts, such as ``reasoning_evals.decoding.TrialExit``."""
        self.absorbed = AbsorbedLatents(model)
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=model.device)
        takes = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"
        """What the model calls its cache: ``past_key_values`` before transformers 5.24, and in code that comes with a checkpoint."""
        probe = self.new_cache(1)
        if "position_ids" not in takes and (probe is None or keeps_states_alone(probe)):
            raise ValueError(
                f"{type(model).__name__} keeps states and no keys, and takes no positions, so the in-process sampler cannot pad its rows: "
                "serve the model and use --endpoint"
            )
        self.joins = probe is not None and can_join(probe)
        self.takes_padding = self.joins and not reads_padding(model, probe)
        """Whether prompts of unequal lengths may go through one prefill."""

    def new_cache(self, most: int) -> Any:
        """An empty cache for up to ``most`` columns; None where the model makes one of its own kind."""
        if not self.model._supports_default_dynamic_cache():
            return None
        return growing_cache(self.model.config, joint=bool(self.absorbed.layers), most=most)

    def decode(self, ids_B1: Tensor, mask_BT: Tensor, position_B1: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] of the token after the newest of each row; the cache holds all others."""
        context: AbstractContextManager[Any] = self.absorbed if self.absorbed.layers else nullcontext()
        with context:
            output = self.model(
                input_ids=ids_B1,
                attention_mask=mask_BT,
                position_ids=position_B1,
                use_cache=True,
                **{self.cache_name: cache},
            )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


Form = tuple[int, ...]


class Trial(NamedTuple):
    """Greedy tokens behind a text, and their probabilities at temperature 1 without any rule."""

    token_ids: tuple[int, ...]
    probabilities: tuple[float, ...]


class Interjecting(Protocol):
    """A rule that writes texts (``reasoning_evals.decoding.TrialExit``)."""

    def interject(self, step: Step) -> Mapping[int, Form]:
        """Row -> tokens that are written in place of the one that was drawn."""


class Step(NamedTuple):
    """One step of a batch, between the draw and the writing of the tokens. Row i of the tensors is row i of the cache, which holds
    all of ``ids_BT``; ``mask_BT`` has a 0 at padding, ``position_B`` is the position of the last token, ``generated_B`` the number of tokens
    of the row that no prompt holds; at 0 the rows of the last forward are not these, but the distinct prompts."""

    ids_BT: Tensor
    mask_BT: Tensor
    position_B: Tensor
    drawn_B: Tensor
    free_B: Tensor
    generated_B: Tensor
    cache: Any
    decode: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """``Decoder.decode``."""

    def trial(
        self, rows: Sequence[int], text: Form, most: int, ends: Callable[[Sequence[int]], bool]
    ) -> Sequence[Trial]:
        """Greedy answers of these rows behind ``text``, up to ``most`` tokens, each until ``ends(token_ids)``. The rows' cache is
        copied, so nothing of it stays. One token a forward, as a decode step is: every kind of cache takes that."""
        index_R = torch.tensor(rows, device=self.ids_BT.device)
        cache = fork_rows(self.cache, index_R, len(self.ids_BT))
        mask_RT, position_R = self.mask_BT[index_R], self.position_B[index_R]
        found: list[list[int]] = [[] for _ in rows]
        probabilities: list[list[float]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        for place in range(len(text) + most - 1):
            if place < len(text):
                next_R = torch.full_like(index_R, text[place])
            mask_RT = torch.cat([mask_RT, mask_RT.new_ones(len(rows), 1)], dim=1)
            position_R = position_R + 1
            logits_RV = self.decode(next_R[:, None], mask_RT, position_R[:, None], cache)
            if place < len(text) - 1:
                continue
            probabilities_RV = logits_RV.float().softmax(-1)
            best_R, next_R = probabilities_RV.max(-1)
            for row in sorted(open_rows):
                found[row].append(int(next_R[row]))
                probabilities[row].append(float(best_R[row]))
                if ends(found[row]):
                    open_rows.discard(row)
            if not open_rows:
                break
        return [Trial(tuple(ids), tuple(shares)) for ids, shares in zip(found, probabilities, strict=True)]


class Dictation:
    """The tokens that are still to be written into each row of a batch, whatever the model would say."""

    def __init__(self, num_rows: int) -> None:
        self._due: list[Form] = [()] * num_rows

    @property
    def free(self) -> list[bool]:
        """Whether the row's next token is its own."""
        return [not due for due in self._due]

    def write(self, rules: Sequence[Interjecting], step: Step) -> Tensor:
        """The tokens [B] that are written: those that are due, those that a rule interjects, those that were drawn."""
        for rule in rules:
            for row, text in rule.interject(step).items():
                if not self._due[row]:
                    self._due[row] = tuple(text)
        if not any(self._due):
            return step.drawn_B
        ids_B = step.drawn_B.clone()
        for row, due in enumerate(self._due):
            if due:
                ids_B[row], self._due[row] = due[0], due[1:]
        return ids_B

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._due = [self._due[row] for row in rows]

    def join(self, others: Sequence[Dictation]) -> None:
        """Append the rows of others."""
        self._due = [due for part in (self, *others) for due in part._due]
