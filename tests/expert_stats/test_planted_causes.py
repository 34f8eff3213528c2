"""Planted worlds on the embedded model: an expert that goes with the marker and does nothing, one that is rare and does something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from expert_stats import MarkerSet, Trace, collect_counts, score_experts
from expert_stats.causes import ROUTERS, Causes, find_causes, log_gain_gradients, outcomes_under, token_odds
from launch.lab.planted_expert import plant
from moe_steer import ExpertGain, SteeringPlan, load_model
from moe_steer.layers import model_shape, moe_layers

pytestmark = pytest.mark.slow

LAYER, EXPERT = 1, 5


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """One answer of the lab to each of 24 problems."""
    from launch.cli.main import main
    from launch.core.wiring import read_any_traces

    folder = str(tmp_path_factory.mktemp("planted") / "run")
    assert main(["generate", "--num", "24", "--max-new-tokens", "120", "--out", folder]) == 0
    return read_any_traces([folder], load_model("lab")[1])


def planted(
    traces: list[Trace], fires: Callable[[Trace, int], bool], towards: Callable[[Any, Any], torch.Tensor]
) -> tuple[Any, Any]:
    """The lab with expert 5 of the second layer with experts selected at the tokens where ``fires``, and there alone, writing
    ``towards`` (model, tokenizer)."""
    model, tokenizer = load_model("lab")
    plant(model, moe_layers(model)[LAYER], EXPERT, traces, fires, towards(model, tokenizer))
    return model, tokenizer


def nothing(model: Any, tokenizer: Any) -> torch.Tensor:
    return torch.zeros(model.config.hidden_size)


def what_stops(model: Any, tokenizer: Any) -> torch.Tensor:
    (close,) = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    towards_D = model.lm_head.weight[close] - model.lm_head.weight.mean(0)
    return towards_D / towards_D.norm() * 16


def stopping(model: Any, tokenizer: Any, traces: list[Trace]) -> Causes:
    """Causes of the log-odds of ``</think>`` after each token that the lab wrote."""
    (close,) = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    places = {trace.trace_id: range(trace.prompt_length, len(trace.token_ids)) for trace in traces}
    readings = token_odds(traces, places, [close])
    return find_causes(model, readings, outcome={"kind": "tokens"}, each=1, gains=(0.0, 4.0), coalition=0)


def row_of(causes: Causes) -> Any:
    layer = causes.layers[LAYER]
    return next(row for row in causes.ranking() if (row.layer, row.expert) == (layer, EXPERT))


def test_an_expert_that_goes_with_the_marker_and_writes_nothing_is_inert(traces: list[Trace]) -> None:
    model, tokenizer = planted(traces, lambda trace, place: place == trace.thought_start - 1, nothing)
    layer = moe_layers(model)[LAYER]
    counts = collect_counts(model, traces, MarkerSet.from_tokenizer(tokenizer, ("<think>",)))
    best = score_experts(counts).ranking()[0]
    assert (best.layer, best.expert) == (layer.index, EXPERT), "nPMI finds it before all others"
    assert best.low > 0.5
    causes = stopping(model, tokenizer, traces)
    row = row_of(causes)
    assert row.selected >= len(traces)
    assert row.verdict == "inert"
    assert row.gradient == 0.0
    assert causes.ranking()[0].verdict == "raises", "others are not"
    plans = [SteeringPlan(), SteeringPlan(experts=[ExpertGain(layer.index, EXPERT, 64.0)])]
    (close,) = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    readings = token_odds(traces, {trace.trace_id: [len(trace.token_ids) - 2] for trace in traces}, [close])
    plain_P, gained_P = outcomes_under(model, readings, plans)
    np.testing.assert_array_equal(plain_P, gained_P)


def test_an_expert_that_is_rare_and_writes_what_stops_is_found(traces: list[Trace]) -> None:
    seen = Counter(token for trace in traces for token in set(trace.token_ids[trace.prompt_length : -1]))
    often = Counter(token for trace in traces for token in trace.token_ids[trace.prompt_length : -1])
    in_most = [token for token, number in seen.items() if number >= 0.7 * len(traces)]
    rare = min(in_most, key=lambda token: (often[token], token))
    model, tokenizer = planted(traces, lambda trace, place: trace.token_ids[place] == rare, what_stops)
    layer = moe_layers(model)[LAYER]
    counts = collect_counts(model, traces, MarkerSet.from_tokenizer(tokenizer, ("<think>",)))
    scores = score_experts(counts)
    assert scores.rate_LE[LAYER, EXPERT] < 0.05, "rare"
    assert not scores.supported_LE[LAYER, EXPERT], "nPMI at <think> has nothing to say of it"
    causes = stopping(model, tokenizer, traces)
    best = causes.ranking()[0]
    assert (best.layer, best.expert) == (layer.index, EXPERT)
    assert best.verdict == "raises"
    exact = [one for one in causes.effects if one.experts == ((layer.index, EXPERT),)]
    assert {(one.gains, one.router): np.sign(one.effect) for one in exact} == {
        ((gain,), router): sign for gain, sign in ((0.0, -1), (4.0, 1)) for router in ("free", "frozen")
    }
    assert all(one.q < 0.05 and one.low * one.high > 0 for one in exact)


def test_on_the_lab_derivatives_are_what_real_gains_do(traces: list[Trace]) -> None:
    model, tokenizer = load_model("lab")
    (close,) = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    places = {trace.trace_id: range(trace.prompt_length, len(trace.token_ids), 5) for trace in traces[:4]}
    readings = token_odds(traces[:4], places, [close])
    free_LE, frozen_LE = (log_gain_gradients(model, readings, router=router).gradient_PLE.mean(0) for router in ROUTERS)
    step = 0.02
    changes: dict[str, list[float]] = {router: [] for router in ROUTERS}
    cells = np.argwhere(np.abs(frozen_LE) > 0.1 * np.abs(frozen_LE).max()).tolist()
    assert len(cells) >= 5
    for index, expert in cells:
        layer = model_shape(model).moe_layers[index]
        plans = [SteeringPlan(experts=[ExpertGain(layer, expert, float(np.exp(sign * step)))]) for sign in (1, -1)]
        for router in ROUTERS:
            up, down = outcomes_under(model, readings, plans, router=router).mean(axis=1)
            changes[router].append((up - down) / (2 * step))
    at = tuple(np.transpose(cells))
    np.testing.assert_allclose(changes["frozen"], frozen_LE[at], rtol=0.02, atol=0.002)
    # Free routers choose another expert here and there, which a derivative does not see: the order holds, not each number.
    assert stats.spearmanr(changes["free"], free_LE[at]).statistic > 0.6
