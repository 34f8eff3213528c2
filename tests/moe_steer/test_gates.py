"""Gates against a loop over rows and tokens: whole texts, cached decoding, left padding, rows that leave and come back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import tiny
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, TopK, steer
from moe_steer.gates import Probe
from moe_steer.gates.conditions import Condition, When
from moe_steer.gates.following import holds, tokens_open
from naive_gates import NaiveGate, NaiveGatedRow, WordTokenizer

TEXTS = [
    ([5, 97, 7], [10, 33, 7, 50, 8, 50, 8, 50, 8, 50, 9, 33, 40, 50, 98, 6]),
    ([5, 6, 7, 8, 97, 9], [11, 11, 11, 11, 11, 40, 30, 40, 12, 13, 12, 13, 12, 13, 12, 98]),
    ([4, 3], [97, 50, 21, 22, 50, 23, 24, 33, 50, 25, 98, 26, 26, 26, 26, 26]),
]
"""Prompt and generated tokens of three rows."""
PROBED = {"on": "probe", "file": "one.safetensors", "above": 0.55, "until": 0.45}
SPENT = {"on": "spent", "above": 6, "until": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("probes")
    for name, layer, seed in (("zero", 0, 3), ("one", 1, 1), ("two", 2, 2)):
        weight_D = 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(seed))
        Probe(weight_D=weight_D, bias=0.0, layer=layer).save(found / f"{name}.safetensors")
    return found


def shift(layer: int, when: Any, strength: float = 1.0, scope: str = "all") -> ResidualVector:
    vector_D = torch.randn(64, generator=torch.Generator().manual_seed(layer))
    return ResidualVector(layer, vector=vector_D, strength=strength, scope=scope, when=when)


PLANS: dict[str, dict[str, Any]] = {
    "probe": {"residual": [shift(1, PROBED), shift(2, {**PROBED, "ramp": 3})]},
    "two probes": {
        "residual": [shift(1, PROBED), shift(3, {"any": [{**PROBED, "file": "two.safetensors"}, SPENT], "ramp": 2})],
        "experts": [ExpertGain(2, 3, 8.0, when=PROBED), ExpertGain(2, 5, 0.0), ExpertGain(3, 1, 4.0, when=SPENT)],
    },
    "difficulty": {"residual": [shift(2, {"on": "difficulty", "file": "zero.safetensors", "below": 0.5})]},
    "loop": {"residual": [shift(2, {"on": "loop", "above": 4, "copies": 2, "period": 3}, scope="generated")]},
    "spent": {"experts": [ExpertGain(1, e, 5.0, when={**SPENT, "ramp": 4}) for e in range(8)], "scope": "thought"},
    "paragraphs": {"residual": [shift(0, {"on": "paragraphs_since", "word": "Wait", "above": 2})]},
    "choice": {
        "experts": [
            ExpertGain(2, 3, force="in", when=PROBED),
            ExpertGain(2, 4, force="out", when=SPENT),
            ExpertGain(2, 6, logit_bias=3.0, when={**SPENT, "ramp": 5}),
            ExpertGain(3, 2, 3.0, logit_bias=-2.0),
        ],
        "renormalize": True,
    },
    "entropy": {"residual": [shift(2, {"on": "entropy", "above": 2.6, "until": 2.4})], "experts": []},
    "margin": {
        "residual": [shift(0, {"all": [{"on": "margin", "below": 0.2}, {"on": "spent", "above": 3}], "ramp": 2})],
        "experts": [ExpertGain(2, e, 4.0, when={"on": "margin", "below": 0.15, "until": 0.3}) for e in range(6)],
    },
}
CONFIDENT = ("entropy", "margin")


def plan_of(name: str, folder: Path) -> SteeringPlan:
    return SteeringPlan(**PLANS[name], base_dir=str(folder))


def naive(name: str, folder: Path) -> list[tuple[Tensor, NaiveGatedRow]]:
    """Of each row its logits [S, V] and the row."""
    found = []
    for prompt, generated in TEXTS:
        row = NaiveGatedRow(tiny.deepseek_v3(), plan_of(name, folder), len(prompt))
        found.append((torch.stack([row.feed(token) for token in [*prompt, *generated]]), row))
    return found


@pytest.mark.parametrize("name", PLANS)
def test_gates_equal_a_loop_over_rows_and_tokens(name: str, folder: Path) -> None:
    model, plan = tiny.deepseek_v3(), plan_of(name, folder)
    rows = naive(name, folder)
    openings = [{when: gate.opened for when, gate in row.gates.items()} for _, row in rows]
    assert any(sum(row.values()) for row in openings), "a plan whose gates never open shows nothing"
    tokenizer = WordTokenizer()
    width = max(len(prompt) for prompt, _ in TEXTS)
    ids = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width + 16, dtype=torch.long)
    for at, (prompt, _) in enumerate(TEXTS):
        ids[at, width - len(prompt) :] = torch.tensor(prompt)
        mask[at, width - len(prompt) :] = 1
    # Cached, left-padded; the second row leaves after 6 tokens, the others change places.
    order = [0, 1, 2]
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), steer(model, plan, tokenizer=tokenizer, quiet=True) as audit:
        positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
        out = model(
            ids, attention_mask=mask[:, :width], position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        cache.name_rows(["first", "second", "third"])
        for step in range(16):
            for at, row in enumerate(order):
                wanted = rows[row][0][len(TEXTS[row][0]) + step - 1]
                assert torch.allclose(out.logits[at, -1], wanted, atol=2e-5), (name, step, row)
            if step == 6:
                order = [2, 0]
                cache.batch_select_indices(torch.tensor(order))
            token = torch.tensor([[TEXTS[row][1][step]] for row in order])
            lengths = torch.tensor([[len(TEXTS[row][0]) + step] for row in order])
            out = model(
                token, attention_mask=mask[order][:, : width + step + 1], position_ids=lengths, past_key_values=cache
            )
    for row in audit.to_rows():
        if row["kind"] == "residual":
            assert row["rows"] == 3
            assert row["openings"] >= row["opened_rows"] > 0
            assert row["norm_added"] > 0
    # By sample: the second row left after 6 tokens.
    samples = audit.to_samples()
    assert list(samples) == ["first", "second", "third"]
    for (_, row), (prompt, _), sample in zip(rows, TEXTS, samples, strict=True):
        wanted = row.told[len(prompt) + 5] if sample == "second" else row.told[-1]
        assert len(samples[sample]) == len(wanted) > 0
        for found, one in zip(samples[sample], wanted, strict=True):
            assert found == {key: pytest.approx(value, abs=1e-4) for key, value in one.items()}, (sample, found, one)
            assert audit.to_rows()[found["row"]]["when"]
    for place, total in enumerate(audit.to_rows()):
        if "when" in total:
            acts = [act for one in samples.values() for act in one if act["row"] == place]
            assert total["openings"] == sum(act["openings"] for act in acts)
            assert total["tokens"] == sum(act["tokens"] for act in acts)
    if name in CONFIDENT:
        return
    # Whole texts, right-padded, without a cache.
    longest = max(len(logits) for logits, _ in rows)
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for at, (prompt, generated) in enumerate(TEXTS):
        text = torch.tensor([*prompt, *generated])
        ids[at, : len(text)], mask[at, : len(text)] = text, 1
    lengths = [len(prompt) for prompt, _ in TEXTS]
    with torch.no_grad(), steer(model, plan, tokenizer=tokenizer, prompt_lengths=lengths, quiet=True) as audit:
        whole = model(ids, attention_mask=mask, use_cache=False).logits
    for at, (logits, _) in enumerate(rows):
        assert torch.allclose(whole[at, : len(logits)], logits, atol=2e-5), (name, at)
    for number, (row, entry) in enumerate(
        zip((r for r in audit.to_rows() if r["kind"] == "residual"), plan.residual, strict=True)
    ):
        counts = [one[entry.when] for one in openings]
        assert (row["rows"], row["openings"]) == (3, sum(counts))
        assert row["opened_rows"] == sum(count > 0 for count in counts)
        assert row["reopened_rows"] == sum(count > 1 for count in counts)
        assert row["tokens"] == sum(one.acted[number] for _, one in rows)


def test_a_gate_that_stays_closed_changes_no_bit(folder: Path) -> None:
    model, never = tiny.deepseek_v3(), {**PROBED, "above": 1.0, "until": 1.0}
    ids = torch.tensor([[5, 6, 7, 8]])
    entries = [ExpertGain(2, e, 9.0, when=never) for e in range(4)]
    entries += [ExpertGain(3, 1, force="in", when=never), ExpertGain(3, 2, force="out", when=never)]
    plan = SteeringPlan(experts=entries, residual=[shift(2, never)], renormalize=True, base_dir=str(folder))
    for use_cache in (True, False):
        with torch.no_grad():
            plain = model(ids, use_cache=use_cache).logits
            with steer(model, plan, prompt_lengths=None if use_cache else [2], quiet=True) as audit:
                assert torch.equal(model(ids, use_cache=use_cache).logits, plain)
            assert all("while its gate was open" in one for one in audit.problems())  # there were tokens in scope
    assert audit.problems()
    with torch.no_grad(), pytest.raises(AssertionError):  # the guard can fail
        wide = SteeringPlan(residual=[shift(2, {**PROBED, "above": 0.0, "until": 0.0})], base_dir=str(folder))
        with steer(model, wide):
            assert torch.equal(model(ids).logits, plain)


def test_a_plan_without_gates_keeps_none(folder: Path) -> None:
    cache = DynamicCache(config=tiny.deepseek_v3().config)
    plan = SteeringPlan(residual=[shift(2, None, scope="generated")])
    with torch.no_grad(), steer(tiny.deepseek_v3(), plan, quiet=True):
        tiny.deepseek_v3()(torch.tensor([[5, 6]]), past_key_values=cache)
    assert cache.steering_rows is not None
    assert cache.steering_rows.gates == {}


def test_rows_are_counted_wherever_they_move_and_tries_are_not(folder: Path) -> None:
    """One prompt, copied for two samples; one is tried on apart; one starts again."""
    model, (prompt, generated) = tiny.deepseek_v3(), TEXTS[0]
    plan = SteeringPlan(residual=[shift(1, PROBED)], base_dir=str(folder))
    rows = [NaiveGatedRow(model, plan, len(prompt)) for _ in (0, 1)]
    texts = [generated[:5], generated[5:10]]
    for row, text in zip(rows, texts, strict=True):
        for token in [*prompt, *text]:
            row.feed(token)
    with torch.no_grad(), steer(model, plan, quiet=True) as audit:
        for start in (["b"], ["a", "b"]):
            cache = DynamicCache(config=model.config)
            model(torch.tensor([prompt]), past_key_values=cache)
            cache.batch_select_indices(torch.tensor([0] * len(start)))
            cache.name_rows(start)
            for step in range(2 if len(start) == 1 else 5):
                model(torch.tensor([[text[step]] for text in texts[-len(start) :]]), past_key_values=cache)
                apart = copy.deepcopy(cache)
                apart.name_rows(None)
                model(torch.tensor([[50]] * len(start)), past_key_values=apart)
    found = audit.to_samples()
    for name, row in zip("ab", rows, strict=True):
        assert found[name] == [{key: pytest.approx(value) for key, value in row.told[-1][0].items()}]
    (total,) = audit.to_rows()
    assert total["rows"] == 3  # the one that did not end, too
    assert total["tokens"] > sum(row.done[0][0] for row in rows)


def test_nested_blocks_keep_their_own_states(folder: Path) -> None:
    model = tiny.deepseek_v3()
    first = SteeringPlan(residual=[shift(1, PROBED)], base_dir=str(folder))
    second = SteeringPlan(residual=[shift(3, {**SPENT, "above": 2}, scope="generated")])
    tokenizer, prompt, generated = WordTokenizer(), *TEXTS[0]
    found, counts = [], []
    for nested in (True, False):
        cache = DynamicCache(config=model.config)
        both = SteeringPlan(residual=[*first.residual, *second.residual], base_dir=str(folder))
        with torch.no_grad(), steer(model, first if nested else both, tokenizer=tokenizer, quiet=True) as outer:
            with steer(model, second if nested else SteeringPlan(), tokenizer=tokenizer, quiet=True) as inner:
                logits = [model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]]
                cache.name_rows(["one"])
                logits += [model(torch.tensor([[t]]), past_key_values=cache).logits[0, -1] for t in generated]
        found.append(torch.stack(logits))
        counts.append([*outer.to_rows(), *inner.to_rows()])
        acts = [*outer.to_samples()["one"], *inner.to_samples().get("one", [])]
        counts.append([{key: value for key, value in act.items() if key != "row"} for act in acts])
    assert torch.equal(*found)
    assert counts[:2] == counts[2:]


def test_what_a_gate_cannot_know_is_refused(folder: Path) -> None:
    model = tiny.deepseek_v3()
    late = SteeringPlan(residual=[shift(1, {**PROBED, "file": "two.safetensors"})], base_dir=str(folder))
    with pytest.raises(ValueError, match="reads the output of layer 2, and that comes later: gate entries of layer 2"):
        late.check(model)
    same = SteeringPlan(experts=[ExpertGain(1, 3, 2.0, when=PROBED)], base_dir=str(folder))
    with pytest.raises(ValueError, match="expert 3 at layer 1 .* gate entries of layer 2 and above"):
        same.check(model)
    with pytest.raises(ValueError, match="there is no probe file"):
        SteeringPlan(residual=[shift(1, {**PROBED, "file": "none.safetensors"})], base_dir=str(folder)).check(model)
    entropy = SteeringPlan(residual=[shift(1, {"on": "entropy", "above": 1})])
    with torch.no_grad(), steer(model, entropy, prompt_lengths=[2], quiet=True):
        with pytest.raises(ValueError, match="feed generated tokens one by one through a cache"):
            model(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    with pytest.raises(ValueError, match="pass the model with its head"):
        with steer(model.model, entropy):
            pass
    loops = SteeringPlan(residual=[shift(1, {"on": "loop", "above": 3})])
    with torch.no_grad(), steer(model, loops, quiet=True):
        with pytest.raises(ValueError, match="needs token ids"):
            model(inputs_embeds=torch.zeros(1, 2, 64))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), past_key_values=cache)
        with steer(model, loops, quiet=True), pytest.raises(ValueError, match="filled before steer"):
            model(torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        with steer(model, SteeringPlan(residual=[shift(1, SPENT)])):
            pass


VALUES = st.lists(
    st.lists(st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, math.nan, None]), min_size=12, max_size=12),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(
    values=VALUES,
    high=st.sampled_from([0.4, 0.5, 0.8]),
    width=st.sampled_from([0.0, 0.2, 0.4]),
    above=st.booleans(),
    ramp=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 12), max_size=3),
)
def test_hysteresis_and_ramps_equal_a_loop(
    values: list[list[float | None]], high: float, width: float, above: bool, ramp: int, cuts: list[int]
) -> None:
    """None is padding, anywhere, NaN a number that is not known; the texts are fed in pieces."""
    borders = {"above": high, "until": high - width} if above else {"below": high, "until": high + width}
    when = When((Condition("entropy", **borders),), ramp=ramp)
    wanted = []
    for row in values:
        gate = NaiveGate(when)
        wanted.append(
            [None if value is None else gate.advance([None if math.isnan(value) else value]) for value in row]
        )
    value_BS = torch.tensor(
        [[-1.0 if value is None else value for value in row] for row in values], dtype=torch.float64
    )
    real_BS = torch.tensor([[value is not None for value in row] for row in values])
    open_B1, count_B1 = torch.zeros(len(values), 1, dtype=torch.bool), torch.zeros(len(values), 1, dtype=torch.long)
    found = []
    for start, stop in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), 12], strict=True):
        if start == stop:
            continue
        piece = slice(start, stop)
        # Decoding one token a row has a shorter way of its own.
        real = real_BS[:, piece] if stop - start > 1 or not bool(real_BS[:, piece].all()) else None
        open_BS = holds(when.conditions[0], value_BS[:, piece], open_B1, real)
        count_BS = tokens_open(open_BS, count_B1, real)
        open_B1, count_B1 = open_BS[:, -1:], count_BS[:, -1:]
        found.append((count_BS / ramp).clamp(max=1.0) * open_BS)
    for row, line in zip(torch.cat(found, 1).tolist(), wanted, strict=True):
        assert [a for a, b in zip(row, line, strict=True) if b is not None] == pytest.approx(
            [b for b in line if b is not None]
        )


def test_top_k_goes_on_beside_gates(folder: Path) -> None:
    model = tiny.deepseek_v3()
    entry = ExpertGain(2, 3, force="in", when={"on": "loop", "above": 200})
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with steer(model, SteeringPlan(top_k=[TopK(2, 2)]), quiet=True):
            wanted = model(ids).logits
        with steer(model, SteeringPlan(experts=[entry], top_k=[TopK(2, 2)]), quiet=True):
            assert torch.equal(model(ids).logits, wanted)
