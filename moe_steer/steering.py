"""Run a model under a steering plan."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moe_steer.entries.acting import choice_functions, residual_functions
from moe_steer.entries.audit import Audit, NothingFired, SteeringWarning
from moe_steer.entries.expert_entry import ExpertGain
from moe_steer.entries.residual_entry import ResidualVector
from moe_steer.gates.counting import GateCounts
from moe_steer.gates.following import Gates, logits_of
from moe_steer.hooks import RoutingFn, call_hooks, choice_hooks, input_hooks, output_hooks, routing_hooks
from moe_steer.inside import cache_of, prompts_in_one_part
from moe_steer.layers import MoELayer, decoder, decoder_layers, moe_layers, refuse_loops, text_config, unwrap
from moe_steer.plan import SteeringPlan
from moe_steer.tokens import MarkerSet, PositionTracker, SpecialTokens, special_tokens, tag_scopes, tokenizer_of

_OPEN: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
"""Model -> the threads of the blocks that it is in."""


@contextmanager
def steer(
    model: Any,
    plan: SteeringPlan,
    *,
    tokenizer: Any = None,
    prompt_lengths: Sequence[int] | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> Iterator[Audit]:
    """Apply ``plan`` to every forward inside the with-block; yields the audit of what fired.

    Gains multiply the final weights of experts that the router selected (RICE, Eq. 7: after top-k and normalisation); with
    ``plan.renormalize`` the weights of a token are then rescaled to their former sum. Residual entries are added at the
    outputs of their layers, in the plan's order, each in its own unit and scope. ``force``, ``logit_bias`` and ``top_k`` change the
    router's choice before that (see ``moe_steer.entries.expert_entry``): each named router runs once more. Layers that the plan does not name, and a
    neutral plan altogether, are not hooked: their outputs are bit for bit the unsteered ones. A layer that a model runs several times
    in a forward (Inkling-2's loop) is steered, and counted, each time.

    ``tokenizer``: needed by the scopes thought, answer and step_end, unless the model came from ``load_model``.
    ``prompt_lengths``: real tokens of each row's prompt, for forwards over whole texts (see ``moe_steer.tokens.positions``).
    Threads that run the model inside one block take turns; a block of another thread is refused while one is open.
    On leaving, a plan that changed nothing is a ``SteeringWarning``; with ``strict`` it is ``NothingFired``; with ``quiet``
    the caller looks at ``audit.problems()`` itself. ValueError if the plan does not fit the model, before anything is hooked.
    """
    if not isinstance(plan, SteeringPlan):
        raise TypeError(f"plan is {plan!r}: give a SteeringPlan, such as SteeringPlan.load('plan.json')")
    plan.check(model)
    layers = moe_layers(model) if plan.active_experts or plan.top_k else []
    own_k = {layer.index: layer.top_k for layer in layers}
    if any(entry.k == own_k[entry.layer] for entry in plan.top_k):  # a copy would read the plan's files again
        plan = dataclasses.replace(plan, top_k=[entry for entry in plan.top_k if entry.k != own_k[entry.layer]])
    entries: list[ExpertGain | ResidualVector] = [*plan.active_experts, *plan.active_residual]
    whens = [entry.when for entry in entries if entry.when is not None]
    counts = GateCounts(whens) if whens else None
    audit = Audit(plan.active_experts, plan.active_residual, plan.top_k, counts)
    if plan.is_neutral:
        yield audit
        return
    gates = Gates(whens, plan.probe, _word_forms(model, tokenizer), counts) if counts else None
    scopes = {plan.scope} if plan.active_experts else set()
    scopes |= {entry.scope for entry in plan.active_residual} | {entry.scope for entry in plan.top_k}
    scopes |= gates.scopes if gates else set()
    special = _special(model, tokenizer, scopes)
    cache_by_default = bool(getattr(text_config(model), "use_cache", True))
    tracker = PositionTracker(scopes, special, prompt_lengths, cache_by_default, gates)
    with ExitStack() as stack:
        stack.enter_context(_of_one_thread(unwrap(model)))
        _follow(stack, model, tracker, gates, needs_ids=special is not None or (gates is not None and gates.reads_ids))
        if gates is not None:
            _, modules = decoder_layers(model)
            refuse_loops(model, gates.readers)
            stack.enter_context(output_hooks({modules[layer]: read for layer, read in gates.readers.items()}))
        if layers:
            stack.enter_context(choice_hooks(choice_functions(layers, plan, tracker.mask, audit, gates)))
            stack.enter_context(routing_hooks(_expert_functions(layers, plan, tracker, audit, gates)))
        if plan.active_residual:
            outputs, inputs = residual_functions(model, plan, tracker.mask, audit, gates)
            stack.enter_context(output_hooks(outputs))
            stack.enter_context(input_hooks(inputs))
        yield audit
    problems = audit.problems()
    if problems and strict:
        raise NothingFired("; ".join(problems))
    if problems and not quiet:
        warnings.warn("; ".join(problems), SteeringWarning, stacklevel=3)


@contextmanager
def _of_one_thread(model: Any) -> Iterator[None]:
    """ValueError while a block of another thread is open: both plans would act on the texts of both threads."""
    threads, mine = _OPEN.setdefault(model, []), get_ident()
    threads.append(mine)  # before the look at the others: of two that enter in the same instant none passes unseen
    try:
        if any(other != mine for other in threads):
            raise ValueError(
                "the model is in a with-block of steer() in another thread, and a plan acts on every forward of a model: enter one block around all "
                "threads, let them take turns, or give each a copy.deepcopy of the model (its weights may be shared)"
            )
        yield
    finally:
        threads.remove(mine)


def _follow(stack: ExitStack, model: Any, tracker: PositionTracker, gates: Gates | None, needs_ids: bool) -> None:
    """Let the tracker see every call of the decoder, and gates the logits. A model with images and text gives its decoder
    embeddings: the token ids are those of the call of the whole model."""
    whole, body = unwrap(model), decoder(model)
    turns = RLock()  # tracker, gates and audit keep what belongs to one forward
    ids_BS: list[Tensor | None] = [None]

    def enter_whole(call: dict[str, Any]) -> None:
        ids_BS[0] = call.get("input_ids")

    def leave_whole(call: dict[str, Any], output: Any) -> None:
        ids_BS[0] = None
        if gates is not None and gates.reads_logits:
            gates.take_logits(logits_of(output), cache_of(call, output))

    def enter_body(call: dict[str, Any]) -> None:
        embeds_BSD = call.get("inputs_embeds")
        given = ids_BS[0]
        if given is not None and embeds_BSD is not None and given.shape == embeds_BSD.shape[:2]:
            call = {**call, "input_ids": given}
        tracker.before(call)

    reads_logits = gates is not None and gates.reads_logits
    if reads_logits and whole is body:
        raise ValueError("a gate on entropy or margin reads the logits: pass the model with its head")
    if tracker.finds_prompts:
        stack.enter_context(prompts_in_one_part(whole))
    if (needs_ids or reads_logits) and whole is not body:
        stack.enter_context(call_hooks(whole, enter_whole if needs_ids else None, leave_whole, turns=turns))
    stack.enter_context(call_hooks(body, enter_body, tracker.after, turns=turns))


def _special(model: Any, tokenizer: Any, scopes: set[str]) -> SpecialTokens | None:
    named = tag_scopes(scopes)
    if not named:
        return None
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    if tokenizer is None:
        raise ValueError(
            f"scope {', '.join(named)} needs a tokenizer: pass tokenizer=, or load the model with load_model"
        )
    return special_tokens(tokenizer)


def _word_forms(model: Any, tokenizer: Any) -> Callable[[str], Sequence[Any]]:
    """Word -> its token forms."""

    def forms(word: str) -> Sequence[Any]:
        named = tokenizer if tokenizer is not None else tokenizer_of(model)
        if named is None:
            raise ValueError(f"a gate that counts from {word!r} needs a tokenizer: pass tokenizer=, or use load_model")
        return MarkerSet.from_tokenizer(named, (word,), whole_words=False).markers[0].forms

    return forms


def _expert_functions(
    layers: Sequence[MoELayer], plan: SteeringPlan, tracker: PositionTracker, audit: Audit, gates: Gates | None
) -> dict[MoELayer, RoutingFn]:
    by_layer: dict[int, list[ExpertGain]] = {}
    for entry in plan.active_experts:
        by_layer.setdefault(entry.layer, []).append(entry)
    return {
        layer: _gain_function(layer, by_layer[layer.index], plan, tracker, audit, gates)
        for layer in layers
        if layer.index in by_layer
    }


def _gain_function(
    layer: MoELayer,
    entries: Sequence[ExpertGain],
    plan: SteeringPlan,
    tracker: PositionTracker,
    audit: Audit,
    gates: Gates | None,
) -> RoutingFn:
    num_experts = layer.num_experts
    gain_E = torch.ones(num_experts + 1, dtype=torch.float64)  # the last row is for ids of experts on another rank
    for entry in entries:
        gain_E[entry.expert] = entry.gain
    parts = None if gates is None else gates.of_experts(entries, num_experts)
    tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def function(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        key = (ids_TK.device, weights_TK.dtype)
        if key not in tables:
            dtype = torch.promote_types(weights_TK.dtype, torch.float32)
            tables[key] = (gain_E.to(ids_TK.device, dtype), torch.ones((), device=ids_TK.device, dtype=dtype))
        table_E, one = tables[key]
        here_TK = ids_TK.clamp(max=num_experts)
        gain_TK = table_E[here_TK]
        mask_T = tracker.mask(plan.scope)
        in_scope_TK = None if mask_T is None else mask_T.to(here_TK.device)[:, None]
        if parts is not None:
            open_TK = parts.opened(here_TK).to(here_TK.device)
            if parts.part is not None:
                gain_TK = torch.lerp(one, gain_TK, parts.part(here_TK).to(gain_TK))
            if parts.part is None or in_scope_TK is not None:
                in_scope_TK = open_TK if in_scope_TK is None else in_scope_TK & open_TK
                gain_TK = torch.where(in_scope_TK, gain_TK, one)
            in_scope_TK = open_TK if in_scope_TK is None else in_scope_TK
        elif in_scope_TK is not None:
            gain_TK = torch.where(in_scope_TK, gain_TK, one)
        old_TK = weights_TK.to(table_E.dtype)
        new_TK = old_TK * gain_TK
        if plan.renormalize:
            new_TK = _rescale(new_TK, old_TK)
        audit.count_experts(layer.index, num_experts, here_TK, in_scope_TK, new_TK - old_TK)
        return new_TK

    return function


def _rescale(new_TK: Tensor, old_TK: Tensor) -> Tensor:
    """Scale each token's weights back to their former sum; a token whose weights are all 0 is not changed."""
    sum_T1 = new_TK.sum(-1, keepdim=True)
    return new_TK * torch.where(sum_T1 > 0, old_TK.sum(-1, keepdim=True) / sum_T1, 1.0)
