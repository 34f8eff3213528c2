"""Forced experts, biases and another k in scopes: cached decoding, left padding, whole texts; and what the audit counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from families import batch
from family_cases import busiest, case, collect_routing, logits, padded
from moe_steer import ExpertGain, SteeringPlan, TopK, load_model, observe_routing, steer
from moe_steer.entries.audit import NothingFired, SteeringWarning
from moe_steer.lab import LAB_MODEL
from moe_steer.layers import model_shape, moe_layers

NAMES = ["deepseek_v3", "gpt_oss", "llama4", "qwen3_moe"]
every_kind = pytest.mark.parametrize("name", NAMES)


def entries_of(name: str) -> tuple[int, int, list[ExpertGain]]:
    """Layer, the family's k, and entries that force its rarest expert in and its commonest out."""
    prepared = case(name)
    layer = max(prepared.blocks)
    ids_TK = prepared.routing[layer][0][0]
    ranked = busiest(ids_TK)
    return (
        layer,
        ids_TK.shape[1],
        [ExpertGain(layer, ranked[-1], force="in"), ExpertGain(layer, ranked[0], force="out")],
    )


@every_kind
@pytest.mark.parametrize(
    ("scope", "wanted"),
    [
        ("all", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("prompt", [1, 1, 1, 0, 0, 0, 0, 0]),
        ("generated", [0, 0, 0, 1, 1, 1, 1, 1]),
        ("after:2", [0, 0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_only_tokens_in_scope_choose_otherwise(name: str, scope: str, wanted: list[int]) -> None:
    prepared = case(name)
    layer, k, entries = entries_of(name)
    ids_BS = batch(2, 8)
    with collect_routing(prepared.model) as plain:
        logits(prepared.model, ids_BS)
    with (
        steer(prepared.model, SteeringPlan(experts=entries, scope=scope), prompt_lengths=[3, 3]) as audit,
        collect_routing(prepared.model) as routing,
    ):
        logits(prepared.model, ids_BS)
    (old_TK, old_weights_TK), (ids_TK, weights_TK) = plain[layer][0], routing[layer][0]
    scoped_T = torch.tensor(wanted * 2).bool()
    assert bool((ids_TK[scoped_T] == entries[0].expert).any(1).all())
    assert not bool((ids_TK[scoped_T] == entries[1].expert).any())
    assert torch.equal(ids_TK[~scoped_T], old_TK[~scoped_T]), "bit for bit the router's own"
    assert torch.equal(weights_TK[~scoped_T], old_weights_TK[~scoped_T])
    assert ids_TK.shape[1] == k
    for entry in entries:
        before = int((old_TK[scoped_T] == entry.expert).sum())
        after = int(scoped_T.sum()) if entry.force == "in" else 0
        assert audit.chosen[layer, entry.expert] == (int(scoped_T.sum()), before, after)
    tokens = {row["force"]: row["tokens"] for row in audit.to_rows()}
    assert tokens == {"in": int(scoped_T.sum()), "out": int((old_TK[scoped_T] == entries[1].expert).sum())}


@every_kind
@pytest.mark.parametrize(("scope", "k_scope"), [("generated", "all"), ("all", "generated"), ("prompt", "generated")])
@pytest.mark.parametrize("more", [1, -1])
def test_each_scope_for_itself(name: str, scope: str, k_scope: str, more: int) -> None:
    """Experts are forced in one scope, k is another in the other: places without a selection are no expert's."""
    prepared = case(name)
    layer, k, entries = entries_of(name)
    ids_BS = batch(2, 8)
    plan = SteeringPlan(experts=entries, top_k=[TopK(layer, k + more, k_scope)], scope=scope)
    with steer(prepared.model, plan, prompt_lengths=[3, 3]) as audit, collect_routing(prepared.model) as routing:
        steered = logits(prepared.model, ids_BS)
    ids_TK, weights_TK = routing[layer][0]
    num_experts = model_shape(prepared.model).num_experts
    in_prompt_T = torch.arange(16) % 8 < 3
    scopes = {"all": torch.ones(16).bool(), "prompt": in_prompt_T, "generated": ~in_prompt_T}
    number_T = (ids_TK < num_experts).sum(1)
    assert torch.equal(number_T, torch.where(scopes[k_scope], k + more, k))
    assert bool((weights_TK[ids_TK >= num_experts] == 0).all())
    assert torch.equal((ids_TK == entries[0].expert).any(1) & scopes[scope], scopes[scope])
    assert not bool((ids_TK[scopes[scope]] == entries[1].expert).any())
    scoped = int(scopes[k_scope].sum())
    assert audit.top_k[layer] == (scoped, scoped * k, scoped * (k + more))
    assert audit.problems() == []
    # Token by token the same as two whole forwards, each with one k and one choice everywhere.
    for t in (0, 15):
        one = SteeringPlan(
            experts=entries if scopes[scope][t] else (), top_k=[TopK(layer, k + more)] if scopes[k_scope][t] else ()
        )
        with steer(prepared.model, one, quiet=True), collect_routing(prepared.model) as alone:
            logits(prepared.model, ids_BS)
        ids_K, weights_K = alone[layer][0][0][t], alone[layer][0][1][t]
        real_K = ids_TK[t] < num_experts
        assert dict(zip(ids_TK[t][real_K].tolist(), weights_TK[t][real_K].tolist(), strict=True)) == pytest.approx(
            dict(zip(ids_K.tolist(), weights_K.tolist(), strict=True)), rel=1e-5
        )
    assert torch.isfinite(steered).all()


@every_kind
def test_cached_decoding_with_left_padding_equals_each_row_alone(name: str) -> None:
    prepared = case(name)
    layer, k, entries = entries_of(name)
    bias = ExpertGain(layer, next(e for e in range(8) if e not in [x.expert for x in entries]), logit_bias=2.0)
    plan = SteeringPlan(experts=[*entries, bias], top_k=[TopK(layer, k + 1, "after:1")], scope="generated")
    rows = [batch(1, 7)[0], batch(1, 4, seed=9)[0]]

    def generate(inputs: dict[str, Tensor], num_rows: int) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []

        def sink(at: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
            if at == layer:
                seen.append(ids_TK.reshape(num_rows, -1, ids_TK.shape[-1]))

        with torch.no_grad(), steer(prepared.model, plan, strict=True), observe_routing(prepared.model, sink):
            out = prepared.model.generate(
                **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=1
            )
        return out[:, -5:], seen

    inputs = padded(rows, "left")
    del inputs["position_ids"]
    together, seen = generate(inputs, 2)
    for b, row in enumerate(rows):
        alone, _ = generate({"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}, 1)
        assert torch.equal(alone[0], together[b])
    assert [ids.shape[1] for ids in seen] == [7, 1, 1, 1, 1]
    forced, out = entries[0].expert, entries[1].expert
    assert not bool((seen[0] == forced).any(-1).all()), "the prompt is out of scope"
    for step in seen[1:]:
        assert bool((step == forced).any(-1).all())
        assert not bool((step == out).any())
    assert [int((ids < 8).sum(-1).max()) for ids in seen] == [k, k, k + 1, k + 1, k + 1]


def test_more_than_k_and_too_few_left_are_refused_in_one_line() -> None:
    prepared = case("deepseek_v3")
    layer = max(prepared.blocks)
    four = [ExpertGain(layer, expert, force="in") for expert in range(4)]
    six = [ExpertGain(layer, expert, force="out") for expert in range(6)]
    cases = [
        (SteeringPlan(experts=four), "4 experts are forced in, and a token has 3: force at most so many"),
        (
            SteeringPlan(experts=four[:3], top_k=[TopK(layer, 2, "thought")]),
            "3 experts are forced in, and a token has 2",
        ),
        (SteeringPlan(experts=six), "6 of 8 experts are forced out, and a token needs 3"),
        (SteeringPlan(top_k=[TopK(layer, 9)]), "0 of 8 experts are forced out, and a token needs 9"),
        (SteeringPlan(top_k=[TopK(0, 2)]), r"layer 0 \(top_k entry\) has no experts in this model"),
    ]
    for plan, message in cases:
        for model in (prepared.model, model_shape(prepared.model)):
            with pytest.raises(ValueError, match=message) as error:
                plan.check(model)
            assert "\n" not in str(error.value)
    SteeringPlan(experts=four, top_k=[TopK(layer, 4)]).check(prepared.model)


def test_two_plans_on_one_router_are_refused() -> None:
    prepared = case("qwen3_moe")
    _, _, entries = entries_of("qwen3_moe")
    plan = SteeringPlan(experts=entries)
    with steer(prepared.model, plan, quiet=True):
        with pytest.raises(ValueError, match="under another plan: put both in one plan"):
            with steer(prepared.model, plan):
                pass
    with steer(prepared.model, plan):
        logits(prepared.model, prepared.ids_BS)


def test_a_forced_entry_that_never_fires_fails_like_gains_do() -> None:
    prepared = case("qwen3_moe")
    layer, k, entries = entries_of("qwen3_moe")
    for plan in (SteeringPlan(experts=entries, scope="after:50"), SteeringPlan(top_k=[TopK(layer, k + 1, "after:50")])):
        with (
            pytest.raises(NothingFired, match="nothing was steered"),
            steer(prepared.model, plan, prompt_lengths=[3, 3], strict=True),
        ):
            logits(prepared.model, prepared.ids_BS)
        with (
            pytest.warns(SteeringWarning, match="nothing was steered"),
            steer(prepared.model, plan, prompt_lengths=[3, 3]),
        ):
            logits(prepared.model, prepared.ids_BS)
        with pytest.raises(NothingFired, match=f"layer {layer} is named in the plan and never ran"):
            with steer(prepared.model, plan, prompt_lengths=[3, 3], strict=True):
                pass
    # Beside another entry that fires, too.
    never = SteeringPlan(experts=entries[:1], scope="after:50", top_k=[TopK(min(prepared.blocks), k + 1)])
    with (
        pytest.raises(NothingFired, match="forces in: nothing was forced"),
        steer(prepared.model, never, prompt_lengths=[3, 3], strict=True),
    ):
        logits(prepared.model, prepared.ids_BS)


def test_the_audit_notices_a_choice_that_was_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_steer.entries import acting

    prepared = case("qwen3_moe")
    _, _, entries = entries_of("qwen3_moe")
    monkeypatch.setattr(acting, "merge", lambda layer, kept, new, mask_T: kept)
    with pytest.raises(NothingFired, match="was forced in and selected by"):
        with steer(prepared.model, SteeringPlan(experts=entries), strict=True):
            logits(prepared.model, prepared.ids_BS)


def test_a_router_of_an_unknown_build_is_refused_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = case("qwen3_moe")
    layer, _, entries = entries_of("qwen3_moe")
    router = next(found.router for found in moe_layers(prepared.model) if found.index == layer)

    def sorting(topk: object) -> object:
        def other(scores: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
            values, indices = scores.sort(dim, descending=True)
            return values[..., :k], indices[..., :k]

        return other

    monkeypatch.setattr(torch, "topk", sorting(torch.topk))
    with pytest.raises(RuntimeError, match=f"its {type(router).__name__} is of an unknown build, so use gains alone"):
        with steer(prepared.model, SteeringPlan(experts=entries)):
            logits(prepared.model, prepared.ids_BS)


def test_gains_and_renormalising_come_after_the_choice() -> None:
    prepared = case("deepseek_v3")
    layer, _, entries = entries_of("deepseek_v3")
    forced = entries[0].expert

    def weights(plan: SteeringPlan) -> Tensor:
        with steer(prepared.model, plan), collect_routing(prepared.model) as routing:
            logits(prepared.model, prepared.ids_BS)
        ids_TK, weights_TK = routing[layer][0]
        return torch.cat([weights_TK[ids_TK == forced][:, None], weights_TK.sum(1, keepdim=True)], 1)

    plain = weights(SteeringPlan(experts=entries))
    louder = [ExpertGain(layer, forced, 8.0, force="in"), entries[1]]
    loud = weights(SteeringPlan(experts=louder))
    torch.testing.assert_close(loud[:, 0], plain[:, 0] * 8)
    same_sum = weights(SteeringPlan(experts=louder, renormalize=True))
    torch.testing.assert_close(same_sum[:, 1], plain[:, 1])
    assert bool((same_sum[:, 0] > plain[:, 0]).all())


def test_a_thought_is_a_scope_of_forced_experts() -> None:
    """The lab's model, whole way: the embedded model thinks, and chooses otherwise only there."""
    model, tokenizer = load_model(LAB_MODEL)
    layer = moe_layers(model)[-1]
    plan = SteeringPlan(experts=[ExpertGain(layer.index, 1, force="in")], scope="thought")
    text = "What is 2 + 3?<think>\n2 + 3 = 5.\n</think>\n5"
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad(), steer(model, plan, tokenizer=tokenizer, strict=True) as audit:
        with collect_routing(model) as routing:
            model(**inputs)
    chosen_T = (routing[layer.index][0][0] == 1).any(1)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    begin = next(i for i, token in enumerate(tokens) if "<think>" in token)
    end = next(i for i, token in enumerate(tokens) if "</think>" in token)
    assert bool(chosen_T[begin:end].all())
    assert audit.chosen[layer.index, 1].scoped == end - begin
