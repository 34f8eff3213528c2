import dataclasses
import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer.layers import ModelShape

SHAPE = ModelShape("deepseek_v3", 61, 256, 8, tuple(range(3, 61)), 7168)
GAINS = st.floats(min_value=0, max_value=1e6, allow_nan=False)


@given(
    cells=st.dictionaries(st.tuples(st.integers(0, 60), st.integers(0, 255)), GAINS, max_size=6),
    scope=st.sampled_from(["all", "prompt", "thought", "step_end", "step_end:line+paragraph", "after:64"]),
    unit=st.sampled_from(["vector", "residual_norm"]),
    renormalize=st.booleans(),
)
def test_json_round_trip(cells: dict, scope: str, unit: str, renormalize: bool) -> None:
    plan = SteeringPlan(
        experts=[ExpertGain(layer, expert, gain) for (layer, expert), gain in cells.items()],
        residual=[
            ResidualVector(5, "v.safetensors", 0.5, "answer"),
            ResidualVector(6, "w.safetensors", -1, scope, unit),
        ],
        scope=scope,
        renormalize=renormalize,
        model={"model_type": "deepseek_v3"},
        provenance={"by": "test"},
    )
    assert SteeringPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_file_round_trip_and_digest(tmp_path) -> None:
    plan = SteeringPlan(experts=[ExpertGain(3, 6, 64.0)], provenance={"made": "now"})
    plan.save(tmp_path / "plan.json")
    loaded = SteeringPlan.load(tmp_path / "plan.json")
    assert loaded.experts == plan.experts
    assert loaded.digest() == SteeringPlan(experts=[ExpertGain(3, 6, 64.0)]).digest(), "provenance does not count"
    assert loaded.digest() != SteeringPlan(experts=[ExpertGain(3, 6, 32.0)]).digest()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"], "nothing written aside is left"


def test_the_published_example_reads() -> None:
    plan = SteeringPlan.from_dict(
        {
            "version": 1,
            "model": {
                "model_type": "deepseek_v3",
                "num_layers": 61,
                "num_experts": 256,
                "name": "deepseek-ai/DeepSeek-R1",
            },
            "experts": [{"layer": 39, "expert": 182, "gain": 64.0}, {"layer": 29, "expert": 126, "gain": 64}],
            "residual": [],
            "scope": "all",
            "renormalize": False,
            "provenance": {},
        }
    )
    plan.check(SHAPE)
    assert plan.experts[1] == ExpertGain(29, 126, 64.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gains": 3}, "unknown key 'gains' in plan"),
        ({"version": 3}, "plan version 3 cannot be read: .*make the plan again with 'moe-steer plan'"),
        ({"scope": "thinking"}, "scope 'thinking' is unknown: choose one of all, prompt"),
        ({"experts": {"layer": 1}}, "'experts' is dict: give a JSON list"),
        ({"experts": [{"layer": 1, "expert": 2}]}, r"experts\[0\] is not complete: give layer, expert, gain"),
        ({"experts": [{"layer": 1, "expert": 2, "gain": 2, "beta": 1}]}, r"unknown key 'beta' in experts\[0\]"),
        ({"experts": [{"layer": 1, "expert": 2, "gain": math.nan}]}, "gain of layer 1 expert 2 is nan"),
        ({"experts": [{"layer": 1, "expert": 2, "gain": -1}]}, "give a finite number >= 0"),
        ({"experts": [{"layer": 1.5, "expert": 2, "gain": 1}]}, "layer of ExpertGain is 1.5"),
        ({"experts": [{"layer": 1, "expert": 2, "gain": 1}] * 2}, "layer 1 expert 2 occurs twice"),
        ({"model": {"layers": 61}}, "unknown key 'layers' in plan.model"),
        ({"renormalize": "no"}, "renormalize is 'no'"),
    ],
)
def test_wrong_plans_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteeringPlan.from_dict({"version": 1, "experts": [], **change})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            SteeringPlan(experts=[ExpertGain(2, 0, 2)]),
            r"layer 2 \(expert 0\) has no experts in this model: layers with experts are 3-60, name one of them",
        ),
        (
            SteeringPlan(experts=[ExpertGain(3, 256, 2)]),
            "expert 256 at layer 3 does not exist: this model has experts 0-255, name one of them",
        ),
        (
            SteeringPlan(model={"model_type": "qwen3_moe"}),
            "made for model_type 'qwen3_moe', this model has 'deepseek_v3'",
        ),
        (SteeringPlan(model={"num_experts": 128}), "this model has 256: give that model, or a plan for this one"),
        (
            SteeringPlan(residual=[ResidualVector(61, "v.safetensors")]),
            "residual layer 61 does not exist: this model has layers 0-60, name one of them",
        ),
        (
            SteeringPlan(residual=[ResidualVector(5, "nowhere.safetensors")]),
            "no file 'nowhere.safetensors': put it there",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: SteeringPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.check(SHAPE)


def test_dense_model_is_refused_for_experts() -> None:
    dense = ModelShape("qwen2", 28, 0, 0, (), 3584)
    with pytest.raises(ValueError, match="qwen2 is a dense model: use residual vectors"):
        SteeringPlan(experts=[ExpertGain(3, 1, 2.0)]).check(dense)
    SteeringPlan().check(dense)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"vector": torch.zeros(8)},
            "has width 8, the model's residual stream has 7168: make a direction on this model",
        ),
        ({"other": torch.zeros(7168)}, "needs one 1-D tensor named 'vector'"),
        ({"vector": torch.full((7168,), math.inf)}, "NaN or infinite"),
        ({"vector": torch.ones(7168, dtype=torch.int32)}, "of int32: a residual file needs one"),
        ({"vector": torch.ones(7168), "more": torch.ones(2)}, "needs one 1-D tensor named 'vector'"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path, tensors: dict, message: str) -> None:
    save_file(tensors, tmp_path / "v.safetensors")
    plan = SteeringPlan(residual=[ResidualVector(5, "v.safetensors")], base_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        plan.check(SHAPE)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"version": 99}, "version 99, this program reads version 1"),
        ({"version": "1"}, "version '1'"),
        ({"residual_norm": -1.0}, "says residual_norm is -1.0, which is not a length"),
        ({"norm": "x"}, "says norm is 'x', which is not a length"),
    ],
)
def test_headers_of_directions_that_would_be_misread(tmp_path, said: dict, message: str) -> None:
    head = {"version": 1, "layer": 5, "site": "output", "method": "caa", **said}
    save_file({"vector": torch.ones(7168)}, tmp_path / "v.safetensors", {"direction": json.dumps(head)})
    with pytest.raises(ValueError, match=message):
        SteeringPlan(residual=[ResidualVector(5, "v.safetensors")], base_dir=str(tmp_path)).check(SHAPE)


def test_broken_files(tmp_path) -> None:
    with pytest.raises(ValueError, match="no plan file at"):
        SteeringPlan.load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"version": 1, "experts": [')
    with pytest.raises(ValueError, match="torn.json is not JSON .*: correct it there, or give a file of"):
        SteeringPlan.load(tmp_path / "torn.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list.json holds \[\]: a JSON object is expected"):
        SteeringPlan.load(tmp_path / "list.json")
    with pytest.raises(ValueError, match="cannot be read .*: correct it there, or give a file of 'moe-steer plan'"):
        SteeringPlan.load(tmp_path)
    (tmp_path / "v.safetensors").write_text("no tensors")
    plan = SteeringPlan(residual=[ResidualVector(5, "v.safetensors")], base_dir=str(tmp_path))
    with pytest.raises(ValueError, match="v.safetensors is not a whole safetensors file .*: make the direction again"):
        plan.check(SHAPE)


def test_neutral() -> None:
    assert SteeringPlan().is_neutral
    assert SteeringPlan(experts=[ExpertGain(3, 1, 1.0)], residual=[ResidualVector(1, "x", 0.0)]).is_neutral
    assert not SteeringPlan(experts=[ExpertGain(3, 1, 0.0)]).is_neutral


def written(folder, *, metadata: dict | None = None, name: str = "v.safetensors", vector=None) -> str:
    save_file({"vector": torch.tensor([3.0, 0.0, 4.0]) if vector is None else vector}, folder / name, metadata)
    return name


def direction(**header: object) -> dict[str, str]:
    return {"direction": json.dumps(header)}


def test_a_plan_without_units_reads_and_keeps_its_digest(tmp_path) -> None:
    written(tmp_path)
    old = {"version": 1, "residual": [{"layer": 5, "file": "v.safetensors", "strength": 0.5, "scope": "all"}]}
    plan = SteeringPlan.from_dict(old, base_dir=tmp_path)
    assert plan.residual[0].unit == "vector"
    assert plan.to_dict()["residual"] == [{**old["residual"][0], "unit": "vector"}]
    sha256 = hashlib.sha256((tmp_path / "v.safetensors").read_bytes()).hexdigest()
    before_units = {
        "version": 1,
        "model": None,
        "experts": [],
        "residual": [
            {"layer": 5, "strength": 0.5, "scope": "all", "sha256": sha256}
        ],  # what it holds, not where it lies
        "scope": "all",
        "renormalize": False,
    }
    assert plan.digest() == hashlib.sha256(json.dumps(before_units, sort_keys=True).encode()).hexdigest()
    in_norms = dataclasses.replace(plan, residual=[dataclasses.replace(plan.residual[0], unit="residual_norm")])
    assert in_norms.digest() != plan.digest()


def test_what_an_entry_adds_in_either_unit(tmp_path) -> None:
    plan = SteeringPlan(base_dir=str(tmp_path))
    written(tmp_path, metadata=direction(layer=5, site="residual", residual_norm=20))
    in_vectors = ResidualVector(5, "v.safetensors", 0.5)
    in_norms = ResidualVector(5, "v.safetensors", -0.1, unit="residual_norm")
    assert plan.vector(in_norms).vector_D.tolist() == [3.0, 0.0, 4.0]
    assert plan.load_shift(in_vectors).tolist() == [1.5, 0.0, 2.0]
    assert plan.load_shift(in_norms).tolist() == pytest.approx([-0.1 * 20 * 3 / 5, 0.0, -0.1 * 20 * 4 / 5], abs=1e-15)
    assert plan.load_shift(in_norms).dtype is torch.float64


def test_a_file_of_the_directions_room_can_be_named(tmp_path) -> None:
    from moe_steer.directions import Direction

    made = Direction(vector_D=torch.tensor([0.0, 2.0]), layer=5, method="caa", header={"residual_norm": 8.0})
    made.save(tmp_path / "v.safetensors")
    entry = ResidualVector(5, "v.safetensors", 0.25, "all", "residual_norm")
    assert SteeringPlan(base_dir=str(tmp_path)).load_shift(entry).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("metadata", "vector", "message"),
    [
        (direction(layer=4), None, "was made for layer 4 and the plan adds it at layer 5: name layer 4 in the plan, or make"),
        (direction(site="mlp_out"), None, r"made for site 'mlp_out' and a plan adds vectors at site 'residual' .*at that site"),
        (direction(layer=5), None, "has no residual_norm in its header, which unit 'residual_norm' needs: use unit 'vector'"),
        (None, None, "has no residual_norm in its header"),
        (direction(residual_norm="big"), None, "says residual_norm is 'big', which is not a length"),
        (direction(residual_norm=0.0), None, "says residual_norm is 0.0, which is not a length"),
        (direction(residual_norm=2.0), torch.zeros(3), "holds a vector of zeros, which has no direction"),
        ({"direction": "{half"}, None, "has a header that is not JSON"),
        ({"direction": "[1]"}, None, "which is not a JSON object"),
    ],
)  # fmt: skip
def test_headers_that_do_not_fit_are_refused_in_one_line(tmp_path, metadata, vector, message: str) -> None:
    written(tmp_path, metadata=metadata, vector=vector)
    plan = SteeringPlan(residual=[ResidualVector(5, "v.safetensors", unit="residual_norm")], base_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        plan.check(dataclasses.replace(SHAPE, hidden_size=3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"unit": "percent"},
            "unit of the residual vector at layer 5 is 'percent': choose one of vector, residual_norm",
        ),
        ({"unit": None}, "unit of the residual vector at layer 5 is None"),
        ({"file": 7}, "file of the residual vector at layer 5 is 7: give the path"),
        ({"scope": "step_end:word"}, "step_end takes sentence, line, paragraph"),
        ({"strength": "1"}, "strength of the residual vector at layer 5 is '1': give a finite number"),
        ({"beta": 1}, r"unknown key 'beta' in residual\[0\]"),
    ],
)
def test_wrong_residual_entries_are_refused(entry: dict, message: str) -> None:
    data = {"version": 1, "residual": [{"layer": 5, "file": "v.safetensors", **entry}]}
    with pytest.raises(ValueError, match=message):
        SteeringPlan.from_dict(data)


@pytest.mark.parametrize("unit", ["vector", "residual_norm"])
def test_a_vector_made_on_another_model_is_refused(tmp_path, unit: str) -> None:
    shape = dataclasses.replace(SHAPE, hidden_size=3)
    entry = ResidualVector(5, "v.safetensors", unit=unit)
    plan = SteeringPlan(residual=[entry], base_dir=str(tmp_path))
    written(tmp_path, metadata=direction(residual_norm=2.0, model=shape.to_dict()))
    plan.check(shape)
    written(tmp_path, metadata=direction(residual_norm=2.0, model={**shape.to_dict(), "model_type": "qwen2"}))
    with pytest.raises(
        ValueError, match="was made on a model with model_type 'qwen2', this one has 'deepseek_v3': give"
    ):
        dataclasses.replace(plan).check(shape)


def test_zeros_are_no_direction_in_any_unit(tmp_path) -> None:
    written(tmp_path, metadata=None, vector=torch.zeros(3))
    plan = SteeringPlan(residual=[ResidualVector(5, "v.safetensors")], base_dir=str(tmp_path))
    with pytest.raises(ValueError, match="holds a vector of zeros, which has no direction"):
        plan.check(dataclasses.replace(SHAPE, hidden_size=3))


def test_a_plan_is_read_without_torch() -> None:
    """Commands that only read plans, and their help, start in a fraction of a second."""
    heavy = "{'torch', 'numpy', 'scipy', 'transformers'}"
    code = f"import sys, moe_steer.entries.presets, launch.cli.bake; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", f"import numpy; {code}"], check=False, capture_output=True).returncode
