"""What entries do beside adding, and where in a layer: against loops over tokens, in whole texts and in cached decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import families
import tiny
from moe_steer import Direction, ResidualVector, SteeringPlan, steer
from moe_steer.layers import decoder_layers, text_config

SITES: dict[str, dict[str, str]] = {
    "deepseek_v3": {"attention": "self_attn", "head": "self_attn.o_proj", "mlp": "mlp"},
    "gpt_oss": {"attention": "self_attn", "head": "self_attn.o_proj", "mlp": "mlp"},
    "granitemoe": {"attention": "self_attn", "head": "self_attn.o_proj", "mlp": "block_sparse_moe"},
    "llama4": {"attention": "self_attn", "head": "self_attn.o_proj", "mlp": "feed_forward"},
    "qwen3_next": {"attention": "linear_attn", "mlp": "mlp"},
    "deepseek_v4": {"attention": "self_attn", "mlp": "mlp"},
    "inkling2": {"attention": "self_attn", "head": "self_attn.o_proj.linear", "mlp": "mlp"},
}
"""Family -> site -> name of the module in a layer, read from its code by hand."""
DEEDS: dict[str, dict[str, Any]] = {
    "add": {"strength": 0.7},
    "clamp": {"do": "clamp", "low": -0.02, "high": 0.01},
    "half": {"do": "clamp", "high": 0.0, "strength": 0.5},
    "set": {"do": "set", "to": 0.6},
    "ablate": {"do": "ablate"},
    "rotate": {"do": "rotate", "strength": 40.0},
    "away": {"do": "rotate", "strength": -25.0},
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def by_hand(x: list[float], v: list[float], deed: dict[str, Any]) -> list[float]:
    """One vector of one token, in plain Python."""
    length = math.sqrt(sum(a * a for a in v))
    u = [a / length for a in v]
    c = sum(a * b for a, b in zip(x, u, strict=True))
    do, strength = deed.get("do", "add"), deed.get("strength", 1.0)
    if do == "add":
        return [a + strength * b for a, b in zip(x, v, strict=True)]
    if do == "rotate":
        rest = [a - c * b for a, b in zip(x, u, strict=True)]
        across = math.sqrt(sum(a * a for a in rest))
        norm = math.sqrt(sum(a * a for a in x))
        angle = min(max(math.atan2(across, c) - math.radians(strength), 0.0), math.pi)
        return [norm * (math.cos(angle) * a + math.sin(angle) * b / across) for a, b in zip(u, rest, strict=True)]
    low, high = {
        "clamp": (deed.get("low", -math.inf), deed.get("high", math.inf)),
        "set": (deed.get("to"), deed.get("to")),
        "ablate": (0.0, 0.0),
    }[do]
    target = min(max(c, low * length), high * length)
    return [a + strength * (target - c) * b for a, b in zip(x, u, strict=True)]


def each_token(hidden: Tensor, v: list[float], deed: dict[str, Any], at: slice) -> Tensor:
    """The same for every token of a tensor, on a part of its last dimension (several streams of a token one by one)."""
    flat = hidden.double().reshape(-1, hidden.shape[-1])
    for row in flat:
        here = row[at].tolist()
        for start in range(0, len(here), len(v)):
            here[start : start + len(v)] = by_hand(here[start : start + len(v)], v, deed)
        row[at] = torch.tensor(here, dtype=torch.float64)
    return flat.reshape(hidden.shape).to(hidden.dtype)


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor], on_input: bool) -> Iterator[None]:
    def output_hook(_: Any, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if on_input:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(output_hook)
    yield
    handle.remove()


def cached(model: Any, ids: Tensor) -> Tensor:
    """Logits [B, S, V], the last three tokens one by one through a cache."""
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :-3], *ids[:, -3:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("site", ["output", "attention", "head", "mlp"])
@pytest.mark.parametrize("family", [name for name in SITES if name in families.available()])
def test_every_deed_at_every_site_equals_a_loop_over_tokens(family: str, site: str) -> None:
    model = families.build(family)
    layer = 0
    if site != "output" and site not in SITES[family]:
        entry = ResidualVector(layer, vector=torch.ones(8), site="head", head=0)
        with pytest.raises(
            ValueError, match=f"layer 0 of {family} has no output projection .* use the site 'attention'"
        ):
            SteeringPlan(residual=[entry]).check(model)
        return
    module = decoder_layers(model)[1][layer]
    width, head = text_config(model).hidden_size, {}
    at = slice(None)
    if site != "output":
        module = module.get_submodule(SITES[family][site])
    if site == "head":
        width, head = module.in_features // text_config(model).num_attention_heads, {"head": 1}
        at = slice(width, 2 * width)
    vector_D = torch.randn(width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = model(IDS).logits
        for name, deed in DEEDS.items():
            entry = ResidualVector(layer, vector=vector_D, site=site, **head, **deed)
            with hooked(module, lambda x, d=deed: each_token(x, vector_D.tolist(), d, at), site == "head"):
                wanted = model(IDS).logits
            assert float((wanted - plain).abs().max()) > 1e-3, name
            with steer(model, SteeringPlan(residual=[entry])) as audit:
                assert torch.allclose(model(IDS).logits, wanted, atol=1e-4), (name, "whole")
                assert audit.to_rows()[0]["tokens"] == IDS.numel()
                if name in ("rotate", "half"):
                    assert torch.allclose(cached(model, IDS), wanted, atol=1e-4), (name, "cached")


@pytest.mark.parametrize("site", ["output", "attention", "mlp"])
def test_neutral_settings_change_no_bit(site: str) -> None:
    model = tiny.deepseek_v3()
    vector_D = torch.randn(64, generator=torch.Generator().manual_seed(3))
    deeds = [{"do": "clamp", "low": -1e6, "high": 1e6}, *({**d, "strength": 0.0} for d in DEEDS.values())]
    entries = [ResidualVector(1, vector=vector_D, site=site, **deed) for deed in deeds]
    with torch.no_grad():
        plain = model(IDS).logits
        with steer(model, SteeringPlan(residual=entries), quiet=True):
            assert torch.equal(model(IDS).logits, plain)
        with steer(model, SteeringPlan(residual=[ResidualVector(1, vector=vector_D, site=site, do="ablate")])):
            assert not torch.equal(model(IDS).logits, plain)


def test_a_gate_leaves_its_part_of_a_transform() -> None:
    model = tiny.qwen2()
    vector_D = torch.randn(32, generator=torch.Generator().manual_seed(3))
    gate = {"on": "loop", "above": 2, "copies": 2, "ramp": 2}
    ids = torch.tensor([[5, 9, 9, 9, 9, 6]])
    parts = {
        2: 0.5,
        3: 1.0,
        4: 1.0,
    }  # the prompt has two tokens; the second 9 that is generated is the first of the loop
    for name in ("clamp", "ablate", "rotate"):
        entry = ResidualVector(1, vector=vector_D, when=gate, **DEEDS[name])

        def change(x: Tensor, name: str = name) -> Tensor:
            new = x.clone()
            for place in parts:
                if place >= 3:
                    deed = {**DEEDS[name], "strength": DEEDS[name].get("strength", 1.0) * parts[place - 1]}
                    new[:, place] = each_token(x[:, place], vector_D.tolist(), deed, slice(None))
            return new

        with torch.no_grad(), hooked(model.model.layers[1], change, False):
            wanted = model(ids).logits
        with torch.no_grad(), steer(model, SteeringPlan(residual=[entry]), prompt_lengths=[2]) as audit:
            assert torch.allclose(model(ids, use_cache=False).logits, wanted, atol=1e-5), name
        (row,) = audit.to_rows()
        assert (row["tokens"], row["openings"]) == (2, 1)
        assert row["norm_added"] > 0


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("jamba", "attention", "layer 0 of jamba has no one attention module"),
        ("dbrx", "attention", "layer 0 of dbrx has no one attention module"),
        ("nemotron_h", "mlp", "layer 0 of nemotron_h has no one module as its MLP"),
        ("gemma4", "mlp", "has no one module as its MLP .it holds self_attn, mlp, router, experts"),
        ("longcat_flash", "attention", "has no one attention module"),
    ],
)
def test_families_without_a_site_are_refused_by_name(family: str, site: str, message: str) -> None:
    model = families.build(family)
    vector_D = torch.ones(text_config(model).hidden_size)
    with pytest.raises(ValueError, match=message) as error:
        SteeringPlan(residual=[ResidualVector(0, vector=vector_D, site=site)]).check(model)
    assert "use the site 'output'" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"do": "push"},
            "do of the residual vector at layer 1 is 'push': choose one of add, clamp, set, ablate, rotate",
        ),
        ({"do": "clamp"}, "is to clamp: give low or high"),
        ({"do": "set"}, "is to set: give to"),
        ({"do": "set", "to": 1, "low": 0}, "is to set and has 'low', which nothing reads"),
        ({"low": 1}, "is to add and has 'low'"),
        ({"do": "clamp", "low": 2, "high": 1}, "low of .* is 2, above high, 1"),
        ({"do": "clamp", "low": float("nan")}, "low of .* give a finite number"),
        ({"do": "ablate", "unit": "residual_norm"}, "is to ablate, which needs no unit"),
        ({"site": "mlps"}, "site of .* choose one of output, attention, head, mlp"),
        ({"site": "head"}, "site of .* is 'head' and head None: give both"),
        ({"head": 1}, "site of .* is 'output' and head 1: give both"),
        ({"site": "head", "head": -1}, "head of ResidualVector is -1"),
    ],
)
def test_what_says_nothing_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteeringPlan.from_dict({"version": 2, "residual": [{"layer": 1, "file": "v.safetensors", **entry}]})


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = tiny.deepseek_v3()
    for entry, message in (
        (
            ResidualVector(1, vector=torch.ones(16), site="head", head=4),
            "head 4 at layer 1 does not exist: .* heads 0-3",
        ),
        (ResidualVector(1, vector=torch.ones(8), site="mlp"), "has width 8"),
        (
            ResidualVector(
                1, vector=Direction(vector_D=torch.ones(64), layer=1, method="x"), do="set", to=1, unit="residual_norm"
            ),
            "has no residual_norm in its header",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SteeringPlan(residual=[entry]).check(model)
    narrow = SteeringPlan(residual=[ResidualVector(1, vector=torch.ones(8), site="head", head=0)])
    with torch.no_grad(), steer(model, narrow, quiet=True), pytest.raises(ValueError, match="4 heads of 8 have 32"):
        model(IDS)
