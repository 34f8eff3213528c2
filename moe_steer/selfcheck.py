"""A check before a sharded model is used: steer a few tokens and compare with the formula, on the same backend.

One expert's contribution to its layer's experts is linear in its gain: out(g) = out(0) + g * (out(1) - out(0)). So three runs with
gains 0, 1 and g give the contribution without access to the expert's weights, and a fourth run with that contribution added
explicitly must give the logits of the steered one. Caught: a hook that does not bite, ids that are not global (transformers
<= 5.17 under expert parallelism), ranks that compute different things.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_steer.backends import layout_of, lockstep
from moe_steer.hooks import output_hooks
from moe_steer.layers import MoELayer, model_shape, moe_layers, text_config, unwrap
from moe_steer.observe import observe_routing
from moe_steer.plan import ExpertGain, SteeringPlan
from moe_steer.steering import steer

_TOKENS = 8
_GAIN = 8.0
_ROUNDINGS = 16
"""Errors allowed, in units of the precision's eps times the size of the numbers."""


class BackendCheckFailed(RuntimeError):
    """A sharded model is not steered as the plan says."""


def check_backend(model: Any) -> None:
    """Raise ``BackendCheckFailed``, on every rank, when a sharded model is not steered as the formula demands.

    All ranks must call it together. Checks the first and the last layer with experts; a dense model only for finite logits that
    are equal where ranks must agree. About ten forwards of eight tokens.
    """
    layout = layout_of(model)
    # A rank that finds an error stops; under lockstep it still joins the forwards of the others.
    with torch.no_grad(), lockstep(model):
        try:
            problems = _problems(model)
        except (torch.cuda.OutOfMemoryError, ValueError):
            raise
        except Exception as error:  # of the library, in the first forward of a family that it cannot cut
            said = (str(error).strip().splitlines() or [""])[0][:160]
            problems = (f"a forward pass ended in {type(error).__name__}{f' ({said})' if said else ''}", "")
    if layout.world_size > 1 and dist.is_initialized():
        gathered: list[Any] = [None] * layout.world_size
        dist.all_gather_object(gathered, problems)
        if layout.same_tokens and len({item[1] for item in gathered}) > 1:
            gathered[0] = ("ranks that were given the same tokens computed different logits", "")
        problems = next((item for item in gathered if item[0]), ("", ""))
    if problems[0]:
        raise BackendCheckFailed(
            f"the start-up check of backend {layout.backend!r} failed, nothing was run: {problems[0]}; "
            "use another backend (plain and zero3 need no hooks of their own)"
        )


def _problems(model: Any) -> tuple[str, str]:
    """(what is wrong or "", digest of the unsteered logits)."""
    inner = unwrap(model)
    vocab = int(text_config(inner).vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocab - 1), vocab, (1, _TOKENS), generator=generator).to(inner.device)
    routed: dict[int, Tensor] = {}
    layers = moe_layers(inner) if model_shape(inner).moe_layers else []
    if layers:
        with observe_routing(inner, lambda layer, ids_TK, _: routed.__setitem__(layer, ids_TK)):
            logits = _logits(inner, ids)
    else:
        logits = _logits(inner, ids)
    digest = hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest()
    problem = "" if bool(torch.isfinite(logits).all()) else "the logits are not finite"
    for layer in ([layers[0], layers[-1]] if len(layers) > 1 else layers) if not problem else []:
        found = _check_ids(layer, routed.get(layer.index)) or _check_layer(
            inner, layer, ids, routed[layer.index], logits
        )
        problem = problem or found
    return problem, digest


def _check_ids(layer: MoELayer, ids_TK: Tensor | None) -> str:
    if ids_TK is None:
        return f"the hook at layer {layer.index} never fired"
    rows_distinct = all(len(set(row)) == layer.top_k for row in ids_TK.tolist())
    if not rows_distinct or int(ids_TK.min()) < 0 or int(ids_TK.max()) >= layer.num_experts:
        return (
            f"layer {layer.index} shows expert ids that are not global ({ids_TK[0].tolist()} for the first token; "
            f"{layer.top_k} different ids below {layer.num_experts} expected)"
        )
    return ""


def _check_layer(inner: Any, layer: MoELayer, ids: Tensor, routed_TK: Tensor, plain: Tensor) -> str:
    counts = torch.bincount(routed_TK.flatten(), minlength=layer.num_experts)
    expert = int(counts.argmax())
    selected_T = (routed_TK == expert).any(-1)
    _, out_1 = _run(inner, layer, ids, expert, 1.0)
    _, out_0 = _run(inner, layer, ids, expert, 0.0)
    logits, out_g = _run(inner, layer, ids, expert, _GAIN)
    where = f"layer {layer.index}, expert {expert}"
    change_T = (out_g - out_1).abs().amax(-1)
    if not bool((change_T[selected_T] > 0).all()):
        return f"steering {where} with gain {_GAIN:g} changed nothing: the hook does not bite"
    if layer.input_scaled:
        return ""
    eps = torch.finfo(inner.dtype).eps
    tolerance = _ROUNDINGS * eps * float(_GAIN * out_1.abs().max() + out_g.abs().max())
    if bool((change_T[~selected_T] > tolerance).any()):
        return f"steering {where} changed tokens that did not select it"
    error = float((out_g - (out_0 + _GAIN * (out_1 - out_0))).abs().max())
    if error > tolerance:
        return f"steering {where} with gain {_GAIN:g} is off the formula by {error:.3g} (allowed {tolerance:.3g})"
    shift = ((_GAIN - 1) * (out_1 - out_0)).to(inner.dtype)
    with output_hooks({_sum_of(layer): lambda hidden: hidden + shift.reshape(hidden.shape)}):
        by_hand = _logits(inner, ids)
    effect, left = float((logits - plain).norm()), float((logits - by_hand).norm())
    allowed = _ROUNDINGS * eps * float(plain.norm()) + (0.05 if eps < 1e-4 else 0.5) * effect
    if left > allowed:
        return f"steered logits of {where} differ from the formula by {left:.3g} (allowed {allowed:.3g})"
    return ""


def _sum_of(layer: MoELayer) -> torch.nn.Module:
    """What returns the sum of the experts' contributions: a block may norm it (A.X K1, Gemma-4)."""
    return layer.block if layer.input_scaled or layer.weights_first else layer.experts


def _run(inner: Any, layer: MoELayer, ids: Tensor, expert: int, gain: float) -> tuple[Tensor, Tensor]:
    """(logits, output [T, D] of the block) under one gain."""
    seen: list[Tensor] = []
    plan = SteeringPlan(experts=[ExpertGain(layer=layer.index, expert=expert, gain=gain)])
    with output_hooks({_sum_of(layer): lambda hidden: seen.append(hidden.detach().float().clone())}):
        with steer(inner, plan, quiet=True):
            logits = _logits(inner, ids)
    return logits, seen[0].reshape(-1, seen[0].shape[-1])


def _logits(inner: Any, ids: Tensor) -> Tensor:
    return inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
