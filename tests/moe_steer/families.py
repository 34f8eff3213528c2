"""Tiny random models of every decoder family with routed experts in transformers 5, for tests across families.

``FAMILIES`` is the table, ``build(name)`` the model (built once a session: tests must leave it as it was). The weights
are random under a fixed seed, and large enough that routing varies between tokens and that one expert moves the logits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from family_configs import BASE, TEXT_CONFIGS, VOCAB_SIZE
from family_configs_later import LATER_TEXT, LATER_WRAPPED
from family_configs_wrapped import WRAPPED_CONFIGS

SEED = 7
PAD_TOKEN_ID = 0
# Ids 93 and above stand for images, video and audio in the wrapped families; 0-2 are special.
TEXT_IDS = range(3, 93)

REFUSED = {
    "ernie4_5_vl_moe": "several expert blocks in one decoder layer",
    "zaya": "skipped token",
}
"""Entries of the table that moe_steer refuses, and a part of what it says."""

NOT_IN_TABLE = {
    "diffusion_gemma": "a text diffusion model: there is no next-token pass to observe",
    "jetmoe": "attention and MLP experts in one fused module; refused, see refused_models",
    "nllb_moe": "encoder-decoder; refused, see refused_models",
    "openai_privacy_filter": "a token classifier, not a decoder",
    "switch_transformers": "encoder-decoder; refused, see refused_models",
    "vitpose_backbone": "a vision backbone",
}
"""Folders of transformers.models with an ``experts`` attribute that have no entry, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One entry: how to build the model, and what its configuration says about its experts, read by hand."""

    name: str
    model_type: str
    model_class: str | None
    config: dict[str, Any]
    moe_layers: tuple[int, ...]

    @property
    def folder(self) -> str:
        """The folder of transformers.models that holds the family."""
        aliases = {"minimax_m3_vl_text": "minimax_m3_vl", "qwen3_omni_moe_thinker": "qwen3_omni_moe"}
        return aliases.get(self.model_type, self.model_type.removesuffix("_text"))


def _table() -> dict[str, Family]:
    families = {}
    for name, (model_type, moe_layers, overrides) in {**TEXT_CONFIGS, **LATER_TEXT}.items():
        config = {key: value for key, value in {**BASE, **overrides}.items() if value is not None or key not in BASE}
        # Mistral-4 is not registered for AutoModelForCausalLM.
        model_class = "Mistral4ForCausalLM" if model_type == "mistral4" else None
        families[name] = Family(
            name=name, model_type=model_type, model_class=model_class, config=config, moe_layers=moe_layers
        )
    for name, (model_type, model_class, config) in {**WRAPPED_CONFIGS, **LATER_WRAPPED}.items():
        families[name] = Family(
            name=name, model_type=model_type, model_class=model_class, config=config, moe_layers=(1, 2)
        )
    return families


FAMILIES = _table()


def available() -> list[str]:
    """Names of the families that the installed transformers has."""
    return [name for name, family in FAMILIES.items() if family.model_type in CONFIG_MAPPING]


def config_of(name: str) -> Any:
    """A family's configuration."""
    family = FAMILIES[name]
    return CONFIG_MAPPING[family.model_type](**family.config)


@functools.cache
def build(name: str) -> Any:
    """The model of a family: float32, eval mode, on the CPU. Shared by all tests of a session."""
    return build_from_config(config_of(name), FAMILIES[name].model_class)


def build_from_config(config: Any, model_class: str | None = None, seed: int = SEED) -> Any:
    """A model with random weights that route unevenly; without a class, the causal language model of the config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model_class is None:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = getattr(transformers, model_class)._from_config(config)
    model.eval().requires_grad_(False)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def batch(num_rows: int = 2, length: int = 12, seed: int = SEED) -> Tensor:
    """Token ids [B, S] without padding or special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (num_rows, length), generator=generator)


_DRAWN = torch.float32
"""Named once: a test that computes in float64 gives torch.float32 another meaning, and models are shared."""


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=_DRAWN).to(tensor.dtype) * std

    other_towers = ("vision", "visual", "audio", "sam_encoder")
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if any(tower in name for tower in other_towers) and "moe" not in name:
            continue
        if leaf.endswith("bias"):
            parameter.add_(normal(parameter, 0.2))
        elif leaf in ("per_expert_scale", "global_scale"):
            parameter.mul_(torch.exp(normal(parameter, 0.3)))
        elif "norm" in name and parameter.ndim == 1:
            parameter.add_(normal(parameter, 0.1))
        elif parameter.ndim >= 2:
            parameter.copy_(normal(parameter, 1.2 / math.sqrt(parameter.shape[-1])))
    for name, buffer in model.named_buffers():
        leaf = name.rpartition(".")[2]
        if leaf in ("e_score_correction_bias", "expert_bias", "balancing_biases"):
            buffer.add_(normal(buffer, 0.15))
        elif leaf == "tid2eid":  # a table of different experts for each token id
            rows = torch.rand((len(buffer), 8), generator=generator)
            buffer.copy_(rows.argsort(-1)[:, : buffer.shape[-1]])


assert max(TEXT_IDS) < VOCAB_SIZE
