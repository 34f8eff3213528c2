"""Plan files with forced experts, biases on logits and another k: read strictly, written as read, the same digest as before
without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_files import write_gguf
from moe_steer import ExpertGain, SteeringPlan, TopK, bake
from moe_steer.entries.audit import Audit, row_lines
from moe_steer.gguf import export_control_vector

ENTRY = {"layer": 1, "expert": 2}
FORCES = st.sampled_from([None, "in", "out"])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    cells=st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(FORCES, st.floats(-9, 9))),
    numbers=st.dictionaries(st.integers(0, 9), st.tuples(st.integers(1, 9), st.sampled_from(["all", "thought"]))),
)
def test_json_round_trip(cells: dict[Any, Any], numbers: dict[int, Any]) -> None:
    entries = [
        ExpertGain(*key, **({"force": "out"} if force == "out" else {"gain": 2.0, "force": force, "logit_bias": bias}))
        for key, (force, bias) in cells.items()
    ]
    plan = SteeringPlan(experts=entries, top_k=[TopK(layer, *number) for layer, number in numbers.items()])
    text = json.loads(json.dumps(plan.to_dict()))
    assert SteeringPlan.from_dict(text) == plan
    assert text["version"] == 1
    assert plan.is_neutral == (not cells and not numbers)


def test_plans_without_them_are_what_they_were() -> None:
    plan = SteeringPlan(
        experts=[ExpertGain(3, 6, 64.0), ExpertGain(4, 7, 0.5)],
        scope="thought",
        renormalize=True,
        model={"model_type": "deepseek_v3"},
    )
    assert plan.digest() == "37c767b9f300426a8f140f9ee522f4daffd8351af173334cda2e4b6d8a8b0372", "of a version before"
    assert list(plan.to_dict()["experts"][0]) == ["layer", "expert", "gain"]
    assert "top_k" not in plan.to_dict()


def test_each_of_them_counts_in_the_digest() -> None:
    plans = [
        SteeringPlan(experts=[ExpertGain(3, 6, 1.0)]),
        SteeringPlan(experts=[ExpertGain(3, 6, force="in")]),
        SteeringPlan(experts=[ExpertGain(3, 6, force="out")]),
        SteeringPlan(experts=[ExpertGain(3, 6, logit_bias=1.0)]),
        SteeringPlan(experts=[ExpertGain(3, 6, 1.0)], top_k=[TopK(3, 2)]),
        SteeringPlan(experts=[ExpertGain(3, 6, 1.0)], top_k=[TopK(3, 2, "thought")]),
    ]
    assert len({plan.digest() for plan in plans}) == len(plans)


def test_a_gain_may_be_left_out_beside_them() -> None:
    plan = SteeringPlan.from_dict(
        {"version": 1, "experts": [{**ENTRY, "force": "in"}], "top_k": [{"layer": 1, "k": 3}]}
    )
    assert plan.experts == (ExpertGain(1, 2, 1.0, force="in"),)
    assert plan.top_k == (TopK(1, 3, "all"),)
    assert SteeringPlan.from_dict({"version": 1, "experts": [{**ENTRY, "logit_bias": -1}]}).experts[0].gain == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": [{**ENTRY, "force": "on"}]}, "force of layer 1 expert 2 is 'on': give 'in' or 'out'"),
        ({"experts": [{**ENTRY, "force": True}]}, "give 'in' or 'out'"),
        ({"experts": [{**ENTRY, "logit_bias": "2"}]}, "logit_bias of layer 1 expert 2 is '2': give a finite number"),
        ({"experts": [{**ENTRY, "logit_bias": float("inf")}]}, "give a finite number"),
        ({"experts": [{**ENTRY, "logit_bias": True}]}, "give a finite number"),
        ({"experts": [{**ENTRY, "force": "out", "gain": 2}]}, "has a gain or logit_bias, which would act nowhere"),
        ({"experts": [{**ENTRY, "force": "out", "logit_bias": 2}]}, "which would act nowhere: keep one"),
        ({"experts": [{**ENTRY, "force": "in", "scope": "all"}]}, r"unknown key 'scope' in experts\[0\]"),
        ({"experts": [{**ENTRY, "force": "in"}, {**ENTRY, "gain": 2}]}, "occurs twice in the plan"),
        ({"top_k": {"layer": 1, "k": 2}}, "'top_k' is dict: give a JSON list"),
        ({"top_k": [3]}, r"top_k\[0\] is 3: give a JSON object"),
        ({"top_k": [{"layer": 1}]}, r"top_k\[0\] is not complete: give layer, k"),
        ({"top_k": [{"layer": 1, "k": 0}]}, "k of the top_k entry at layer 1 is 0: give a whole number >= 1"),
        ({"top_k": [{"layer": 1, "k": 2.0}]}, "give a whole number >= 1"),
        ({"top_k": [{"layer": -1, "k": 2}]}, "layer of TopK is -1"),
        ({"top_k": [{"layer": 1, "k": 2, "scope": "thinking"}]}, "scope 'thinking' is unknown"),
        ({"top_k": [{"layer": 1, "k": 2, "gain": 2}]}, r"unknown key 'gain' in top_k\[0\]"),
        ({"top_k": [{"layer": 1, "k": 2}, {"layer": 1, "k": 3}]}, "top_k names a layer twice: keep one k for each"),
    ],
)
def test_wrong_entries_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SteeringPlan.from_dict({"version": 1, **change})
    assert "\n" not in str(error.value)


def test_what_is_done_in_words() -> None:
    entries = [
        ExpertGain(1, 0, 64.0),
        ExpertGain(1, 1, force="out"),
        ExpertGain(1, 2, 0.5, force="in", logit_bias=-2),
        ExpertGain(1, 3, 1.0),
    ]
    assert [entry.action for entry in entries] == ["x64", "forced out", "forced in logit -2 x0.5", "x1"]
    audit = Audit(entries[:3], (), [TopK(1, 4, "thought")])
    assert row_lines(audit.to_rows()) == [
        "layer 1 expert 0 x64: selected by 0 tokens, weight added 0",
        "layer 1 expert 1 forced out: 0 tokens in scope, selections 0 before and 0 after",
        "layer 1 expert 2 forced in logit -2 x0.5: 0 tokens in scope, selections 0 before and 0 after, weight added 0",
        "layer 1 top 4: 0 tokens in scope, selections 0 before and 0 after",
    ]


def test_what_gguf_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf")
    with pytest.raises(
        ValueError, match="layer 1 expert 2 forced out is not baked into GGUF files: bake the safetensors"
    ):
        bake(source, SteeringPlan(experts=[ExpertGain(1, 2, force="out")]), tmp_path / "out.gguf")
    with pytest.raises(ValueError, match="top_k of layer 1 cannot be baked"):
        bake(source, SteeringPlan(top_k=[TopK(1, 2)]), tmp_path / "out.gguf")
    with pytest.raises(ValueError, match="top_k entries, which a control vector cannot hold"):
        export_control_vector(SteeringPlan(top_k=[TopK(1, 2)]), tmp_path / "v.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
