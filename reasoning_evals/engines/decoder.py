"""What the batches of one call of ``sample`` share: the model, how a token goes through it, and the rules by which one is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from reasoning_evals.engines.cache_rows import can_join, reads_padding
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
        if (
            "cache_params" in (takes := inspect.signature(type(model).forward).parameters)
            and "past_key_values" not in takes
        ):
            raise ValueError(
                f"{type(model).__name__} keeps its states in cache_params, which the in-process sampler does not fill: serve the model and use --endpoint"
            )
        probe = self.new_cache(1)
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
                past_key_values=cache,
                use_cache=True,
            )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV
