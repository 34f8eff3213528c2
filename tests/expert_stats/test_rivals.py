"""Rivals of nPMI, each against a naive re-implementation; what they need; how rankings are compared; the file of measures."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from expert_stats import RoutingCounts, Trace, collect_counts, score_experts, select_experts
from expert_stats.causes import Causes
from expert_stats.evidence import Ratio, RatioEstimate
from expert_stats.rivals import Measures, Sources, compare_rankings, measure_experts, rival_of
from naive_experts import swiglu
from stats_helpers import ALTERNATIVELY, END_THINK, MARKERS, THINK, random_counts, random_traces
from tiny import deepseek_v3, qwen3_moe

MODELS = {"deepseek_v3": deepseek_v3, "qwen3_moe": qwen3_moe}
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module", params=list(MODELS))
def measured(request: pytest.FixtureRequest) -> tuple[Any, list[Trace], Measures]:
    model = MODELS[request.param]()
    traces = random_traces(4, seed=3, longest=8)
    return model, traces, measure_experts(model, traces, tokens_per_batch=40)


def routing_of(model: Any, trace: Trace) -> dict[int, tuple[Array, Array, torch.Tensor]]:
    """Layer -> (ids [T, K], final weights [T, K], inputs of the experts [T, D]), from one forward of one trace."""
    found: dict[int, tuple[Array, Array, torch.Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):

            def note(_: Any, args: Any, at: int = index) -> None:
                hidden, ids, weights = args
                found[at] = (ids.numpy().copy(), weights.double().numpy().copy(), hidden.double().clone())

            handles.append(layer.mlp.experts.register_forward_pre_hook(note))
    with torch.no_grad():
        model(torch.tensor([trace.token_ids]))
    for handle in handles:
        handle.remove()
    return found


def test_weights_and_norms_are_those_of_a_loop_over_tokens(measured: tuple[Any, list[Trace], Measures]) -> None:
    model, traces, found = measured
    mass, norm, picked = (np.zeros(found.selected_PLE.shape) for _ in range(3))
    for trace in traces:
        row = found.problems.index(trace.trace_id.rpartition("#")[0])
        for layer, (ids_TK, weights_TK, hidden_TD) in routing_of(model, trace).items():
            at = found.model["moe_layers"].index(layer)
            experts = model.model.layers[layer].mlp.experts
            for token in range(trace.prompt_length, len(trace.token_ids)):
                for expert, weight in zip(ids_TK[token], weights_TK[token], strict=True):
                    output_D = swiglu(experts, int(expert), hidden_TD[token])
                    mass[row, at, expert] += weight
                    norm[row, at, expert] += abs(weight) * float(output_D.norm())
                    picked[row, at, expert] += 1
    np.testing.assert_array_equal(found.selected_PLE, picked)
    np.testing.assert_allclose(found.sums["weights"], mass, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sums["outputs"], norm, rtol=1e-4, atol=1e-6)
    assert found.tokens_P.tolist() == [
        sum(len(t.token_ids) - t.prompt_length for t in traces if t.trace_id.startswith(f"{name}#"))
        for name in found.problems
    ]


def test_the_divergence_is_that_of_a_model_whose_expert_writes_nothing(
    measured: tuple[Any, list[Trace], Measures],
) -> None:
    """Its down projection at 0, whole traces one by one, softmax in float64."""
    model, traces, found = measured
    layers, (num_layers, num_experts) = found.model["moe_layers"], found.selected_PLE.shape[1:]
    rng = np.random.default_rng(0)
    for cell in rng.choice(num_layers * num_experts, 6, replace=False).tolist():
        row, expert = divmod(cell, num_experts)
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.model.layers[layers[row]].mlp.experts.down_proj[expert] = 0
        wanted = np.zeros(len(found.problems))
        for trace in traces:
            with torch.no_grad():
                log_p, log_q = (
                    one(torch.tensor([trace.token_ids])).logits[0, trace.prompt_length :].double().log_softmax(-1)
                    for one in (model, without)
                )
            wanted[found.problems.index(trace.trace_id.rpartition("#")[0])] += float(
                (log_p.exp() * (log_p - log_q)).sum()
            )
        np.testing.assert_allclose(found.sums["divergence"][:, row, expert], wanted, rtol=2e-3, atol=2e-5)


def test_scores_by_measures_are_ratios_of_their_sums(
    measured: tuple[Any, list[Trace], Measures], tmp_path: Path
) -> None:
    model, traces, found = measured
    counts = collect_counts(model, traces, MARKERS)
    found.save(tmp_path / "m.safetensors")
    again = Measures.load(tmp_path / "m.safetensors")
    assert again.problems == found.problems
    np.testing.assert_allclose(again.sums["outputs"], found.sums["outputs"], rtol=1e-6)
    sources = Sources(measures=again)
    tokens = found.tokens_P.sum()
    wanted = {
        "mass": found.sums["weights"].sum(0) / tokens,
        "norm": found.sums["outputs"].sum(0) / np.maximum(found.selected_PLE.sum(0), 1),
        "influence": found.sums["divergence"].sum(0) / tokens,
    }
    for by, table in wanted.items():
        scores = score_experts(counts, missing_marker="skip", rival=rival_of(by, counts, sources))
        seen = found.selected_PLE.sum(0) > 0
        np.testing.assert_allclose(scores.score_LE[seen], table[seen], rtol=1e-4, atol=1e-7)
        assert scores.options["by"] == by
        assert scores.method["claim"].endswith("than the mean expert of its layer")


def test_the_risk_difference_is_that_of_a_loop_over_tokens() -> None:
    model, traces = qwen3_moe(), random_traces(6, seed=1)
    counts = collect_counts(model, traces, MARKERS)
    scores = score_experts(counts, missing_marker="skip", rival=rival_of("risk", counts, Sources()))
    at_marker: dict[int, list[Array]] = {0: [], 1: [], 2: []}
    elsewhere: dict[int, list[Array]] = {0: [], 1: [], 2: []}
    for trace in traces:
        routing = routing_of(model, trace)
        ids = list(trace.token_ids)
        fired_TLE = np.zeros((len(ids), *scores.score_LE.shape), bool)
        for row, layer in enumerate(scores.layers):
            for token, chosen in enumerate(routing[layer][0]):
                fired_TLE[token, row, chosen] = True
        sites = {0: [], 1: [], 2: []}  # type: ignore[var-annotated]
        for token, one in enumerate(ids):
            if one == THINK and token >= trace.prompt_length - 4:
                sites[0].append(token)
            if one == END_THINK and token >= trace.prompt_length - 4:
                sites[1].append(token)
        sites[2] = [span.stop - 1 for span in MARKERS.find_occurrences(trace.token_ids)["Alternatively"]]
        sites[2] = [token for token in sites[2] if token >= trace.prompt_length - 4]
        base = set(range(trace.prompt_length, len(ids))).union(*sites.values())
        for marker, own in sites.items():
            at_marker[marker] += [fired_TLE[token] for token in own]
            elsewhere[marker] += [fired_TLE[token] for token in base - set(own)]
    assert len(ALTERNATIVELY) == 2
    wanted = np.zeros(scores.score_LE.shape)
    for marker, weight in enumerate(scores.coefficients):
        wanted += weight * (np.mean(at_marker[marker], axis=0) - np.mean(elsewhere[marker], axis=0))
    np.testing.assert_allclose(scores.score_LE, wanted, atol=1e-12)
    plain = score_experts(counts, missing_marker="skip")
    np.testing.assert_array_equal(scores.q_LE, plain.q_LE, "its evidence is that of the markers")


def test_right_against_wrong_is_a_mean_over_problems() -> None:
    counts = random_counts(5, num_problems=9, samples=3, num_experts=6)
    right = {trace.trace_id: number % 4 == 0 for number, trace in enumerate(counts.traces)}
    scores = score_experts(counts, missing_marker="skip", rival=rival_of("contrast", counts, Sources(right=right)))
    differences = []
    for problem in sorted({trace.problem for trace in counts.traces}):
        sides: dict[bool, list[Array]] = {True: [], False: []}
        for trace, expert, _ in counts.unpacked():
            if trace.problem == problem:
                sides[right[trace.trace_id]].append(expert.sum(0) / trace.total_B.sum())
        if sides[True] and sides[False]:
            differences.append(np.mean(sides[True], axis=0) - np.mean(sides[False], axis=0))
    assert 3 < len(differences) < 9
    np.testing.assert_allclose(scores.score_LE, np.mean(differences, axis=0), atol=1e-15)
    p = stats.ttest_1samp(np.array(differences), 0).pvalue
    np.testing.assert_allclose(scores.q_LE, stats.false_discovery_control(p.ravel()).reshape(p.shape))
    assert scores.method == {
        "words": "share of tokens that select the expert, in right answers minus wrong ones of the same problem",
        "claim": "another rate in right answers than in wrong ones",
        "signed": True,
        "problems": len(differences),
    }


def causes_for(counts: RoutingCounts, gradient_PLE: Array, wanted: str = "lower") -> Causes:
    num = len(gradient_PLE)
    return Causes(
        model=counts.signature.model,
        outcome={"kind": "loss", "words": "loss of the texts", "places": 1},
        wanted=wanted,
        problems=tuple(f"5-{n}" for n in range(num)),
        value_P=np.zeros(num),
        gradient_PLE=gradient_PLE,
        selected_LE=np.ones(gradient_PLE.shape[1:], int),
    )


def test_causes_score_towards_the_side_that_is_wanted_and_plans_take_the_end_that_the_gain_is_for() -> None:
    counts = random_counts(5, num_problems=12)
    rng = np.random.default_rng(0)
    gradient = rng.normal(0, 0.1, (12, 2, 4))
    gradient[:, 0, 1] += 2.0
    gradient[:, 1, 3] -= 1.0
    scores = score_experts(
        counts, missing_marker="skip", rival=rival_of("causes", counts, Sources(causes=causes_for(counts, gradient)))
    )
    np.testing.assert_allclose(scores.score_LE, -gradient.mean(0))
    up, down = (select_experts(scores, 1, gain) for gain in (4.0, 0.0))
    assert [(entry.layer, entry.expert) for entry in up.experts] == [(2, 3)]
    assert [(entry.layer, entry.expert) for entry in down.experts] == [(1, 1)]
    assert up.provenance["method"].startswith("d outcome / d log gain, above 0 where more gain makes it lower")
    with pytest.raises(ValueError, match="2 of 8 supported experts show an effect on the outcome"):
        select_experts(scores, 2)


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("mass", "--by mass reads weights of experts, which counts do not hold: give --measures with a file of "
         "'moe-steer measure --of weights'"),
        ("norm", "'moe-steer measure --of outputs'"),
        ("influence", "'moe-steer measure --of divergence'"),
        ("contrast", "--by contrast reads which answers are right: give --graded with the folder of a run"),
        ("causes", "--by causes reads derivatives of an outcome: give --causes with a file of 'moe-steer causes'"),
    ],
)  # fmt: skip
def test_what_a_method_lacks_is_said_with_the_command_that_makes_it(by: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        rival_of(by, random_counts(1), Sources())
    assert "\n" not in str(caught.value)


def test_files_of_another_model_and_runs_without_both_sides_are_refused() -> None:
    counts, other = random_counts(5), random_counts(5, num_experts=6)
    causes = causes_for(other, np.zeros((3, 2, 6)))
    with pytest.raises(ValueError, match="the causes are of a model with num_experts 6, the counts of one with 4"):
        rival_of("causes", counts, Sources(causes=causes))
    right = {trace.trace_id: True for trace in counts.traces}
    with pytest.raises(ValueError, match="of 4 problems counted and graded none has both a right and a wrong answer"):
        rival_of("contrast", counts, Sources(right=right))


def test_measures_of_a_dense_model_and_of_no_response_are_refused(tmp_path: Path) -> None:
    from tiny import qwen2

    with pytest.raises(ValueError, match="is a dense model: it has no experts to measure"):
        measure_experts(qwen2(), random_traces(1))
    bare = dataclasses.replace(random_traces(1)[0], thought_start=None, thought_end=None)
    bare = dataclasses.replace(bare, prompt_length=len(bare.token_ids))
    with pytest.raises(ValueError, match="has no response: there is nothing to measure, leave it out"):
        measure_experts(qwen3_moe(), [bare])
    (tmp_path / "m").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Measures.load(tmp_path / "m")


def ratio(value_PC: Array, experts: int, names: str = "p") -> RatioEstimate:
    num = len(value_PC)
    return RatioEstimate(
        problems=tuple(f"{names}{n:03d}" for n in range(num)),
        families=("",) * num,
        terms=(Ratio(1.0, value_PC, np.ones((num, 1))),),
        selected_PC=np.ones(value_PC.shape, bool),
        num_experts=experts,
        signed=True,
    )


def test_influence_of_a_ratio_is_its_derivative_in_a_problems_weight() -> None:
    rng = np.random.default_rng(0)
    above, below = rng.gamma(2, 1, (5, 3)), rng.gamma(3, 1, (5, 3))
    one = dataclasses.replace(ratio(above, 3), terms=(Ratio(2.0, above, below), Ratio(-1.0, below, above + 1)))
    step = 1e-6
    for problem in range(5):
        weights = np.ones((1, 5))
        weights[0, problem] += step
        moved = one.replicates(np.arange(3), weights)[0] - one.score(slice(None))
        np.testing.assert_allclose(one.influence(slice(None))[problem], moved / step, rtol=1e-4)


def test_rankings_are_compared_over_the_same_problems() -> None:
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=40), rng.normal(size=40)
    noise = rng.normal(size=(30, 40))
    tables = {
        "a": ratio(shared + noise, 40),
        "b": ratio(shared + noise + 0.01 * rng.normal(size=(30, 40)), 40),
        "c": ratio(own + rng.normal(size=(20, 40)), 40, "q"),
    }
    found = compare_rankings(tables, top=5)
    means = [table.score(slice(None)) for table in tables.values()]
    for one in range(3):
        for other in range(3):
            value, low, high = found.spearman[one][other]
            assert value == pytest.approx(stats.spearmanr(means[one], means[other]).statistic)
            assert low <= value + 1e-12
            assert value <= high + 1e-12
            best = [set(np.argsort(-means[side])[:5].tolist()) for side in (one, other)]
            assert found.overlap[one][other][0] == pytest.approx(len(best[0] & best[1]) / 5)
    same, apart = found.spearman[0][1], found.spearman[0][2]
    assert same[2] - same[1] < 0.01, "noise that both share cancels"
    assert apart[2] - apart[1] > 0.1
    assert found.by_chance == 5 / 40
    assert found.rank_NC[0].tolist() == stats.rankdata(-means[0]).astype(int).tolist()
    with pytest.raises(ValueError, match="rankings by a cannot be compared"):
        compare_rankings({"a": tables["a"]})
    with pytest.raises(ValueError, match="only 40 experts are scored by all of a, b, and the best 41 are asked for"):
        compare_rankings({"a": tables["a"], "b": tables["b"]}, top=41)
