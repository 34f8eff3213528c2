"""Vectors in memory: arithmetic on directions, and plans that steer with them as with files, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import tiny
from moe_steer import Direction, ResidualVector, SteeringPlan, steer
from moe_steer.direction import VectorFile
from moe_steer.layers import ModelShape

SHAPE = ModelShape("qwen2", 6, 0, 0, (), 4)
WHOLE = st.integers(-50, 50)
VECTORS = st.lists(WHOLE, min_size=4, max_size=4).map(lambda values: made(torch.tensor(values)))
FACTORS = st.sampled_from([-3, -0.5, 0.25, 1, 2, 7])


def made(vector_D: torch.Tensor, layer: int = 3, **header: Any) -> Direction:
    return Direction(vector_D=vector_D, layer=layer, method="caa", header=header)


def same(one: Direction, other: Direction) -> bool:
    return bool((one.vector_D == other.vector_D).all()) and (one.layer, one.site) == (other.layer, other.site)


@given(a=VECTORS, b=VECTORS, c=VECTORS, x=FACTORS, y=FACTORS)
def test_directions_are_a_vector_space(a: Direction, b: Direction, c: Direction, x: float, y: float) -> None:
    """Whole numbers and short fractions, so that float32 rounds nothing."""
    assert same(a + b, b + a)
    assert same((a + b) + c, a + (b + c))
    assert same(a - b, a + (-b))
    assert same(a * x, x * a)
    assert same((a + b) * x, a * x + b * x)
    assert same(a * x + a * y, a * (x + y))
    assert same((a * x) * y, a * (x * y))
    assert same(a * x / x, a)
    assert same(-(a * -1), a)
    assert (a - a).norm == 0
    assert (a * x).norm == pytest.approx(abs(x) * a.norm)


def test_the_header_says_how_it_was_made(tmp_path: Path) -> None:
    a, b = (made(torch.full((4,), value), notes={"x": 1}, norm=9.0) for value in (1.0, 2.0))
    mixed = (2 * a - b / 4) * np.float32(2)
    assert mixed.vector_D.tolist() == [3.0] * 4
    assert mixed.method == "combined"
    assert [term["factor"] for term in mixed.header["terms"]] == [4.0, -0.5]
    assert [term["method"] for term in mixed.header["terms"]] == ["caa", "caa"]
    assert mixed.header["terms"][0]["sha256"] == (-a).header["terms"][0]["sha256"], "of the vector that was there"
    assert mixed.header["norm"] == mixed.norm == 6.0
    assert set(mixed.header) == {"terms", "norm"}, "notes of one side are not true of the sum"
    mixed.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert dict(again.header) == dict(mixed.header)
    assert len((again + a).header["terms"]) == 3, "a combination of combinations is flat"


def test_what_holds_for_both_sides_is_kept() -> None:
    model = {"model_type": "qwen2", "num_layers": 6}
    a = made(torch.ones(4), residual_norm=2.5, model={**model, "name": "folder"})
    b = made(torch.ones(4), residual_norm=2.5, model={**model, "name": "folder"})
    assert (a + b).header["residual_norm"] == (a * 7).header["residual_norm"] == 2.5
    assert (a - b).header["model"] == {**model, "name": "folder"}
    other = made(torch.ones(4), residual_norm=2.6)
    assert "residual_norm" not in (a + other).header, "the mean norm of two sets of texts is that of neither"
    assert (a + other).header["model"]["model_type"] == (other + a).header["model"]["model_type"] == "qwen2"
    moved = made(torch.ones(4), model={**model, "name": "elsewhere"})
    assert (a + moved).header["model"] == (moved + a).header["model"] == model, "one model in two folders"
    with pytest.raises(ValueError, match="has no residual_norm in its header, .*: use unit 'vector'"):
        SteeringPlan(residual=[ResidualVector(3, unit="residual_norm", vector=a + other)]).check(SHAPE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: a + made(torch.ones(4), layer=4), "directions of layer 3 and 4 cannot be added: give directions of one"),
        (lambda a: a - made(torch.ones(5)), "directions of width 4 and 5 cannot be added"),
        (lambda a: a + dataclasses.replace(a, site="mlp_out"), "directions of site 'residual' and 'mlp_out' cannot be"),
        (lambda a: a + made(torch.ones(4), model={"model_type": "llama"}), "directions of model .* cannot be added"),
        (lambda a: a * float("nan"), "is multiplied or divided by nan: give a finite number"),
        (lambda a: a * 10**400, "is multiplied or divided by 1000.*: give a finite number"),
        (lambda a: a / 0, "the direction for layer 3 is divided by 0: give another number"),
        (lambda a: a * 1e30 * 1e30, "give one finite vector"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_one_line(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        wrong(made(torch.ones(4), model={"model_type": "qwen2"}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("other", ["2", None, True, [2.0]])
def test_other_types_are_type_errors(other: Any) -> None:
    for wrong in (lambda: made(torch.ones(4)) * other, lambda: made(torch.ones(4)) + other):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize("unit", ["vector", "residual_norm"])
def test_memory_steers_as_the_file_does_bit_for_bit(unit: str, tmp_path: Path) -> None:
    model = tiny.qwen2()
    ids = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    vector_D = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    direction = made(vector_D, layer=1, residual_norm=3.0) * 0.3
    direction.save(tmp_path / "d.safetensors")
    from_file = SteeringPlan(residual=[ResidualVector(1, "d.safetensors", 0.7, unit=unit)], base_dir=str(tmp_path))
    in_memory = SteeringPlan(residual=[ResidualVector(layer=1, vector=direction, strength=0.7, unit=unit)])
    in_memory.save(tmp_path / "new" / "my.json")
    saved = SteeringPlan.load(tmp_path / "new" / "my.json")
    outputs = []
    for plan in (from_file, in_memory, saved):
        with steer(model, plan) as audit:
            outputs.append(model(ids).logits)
        assert dict(audit.residual) == {0: ids.numel()}
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], model(ids).logits)
    assert from_file.digest() == in_memory.digest() == saved.digest()
    assert saved.residual[0].file == "my-L1.safetensors"
    assert (tmp_path / "new" / "my-L1.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    assert in_memory.digest() != dataclasses.replace(from_file, residual=[]).digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bare_tensor_is_what_its_file_would_be(dtype: torch.dtype, tmp_path: Path) -> None:
    vector_D = torch.tensor([1.0, 2.5, -3.0, 0.1], dtype=dtype)
    save_file({"vector": vector_D}, tmp_path / "v.safetensors")
    from_file = SteeringPlan(residual=[ResidualVector(3, "v.safetensors", 2.0)], base_dir=str(tmp_path))
    plan = SteeringPlan(residual=[ResidualVector(3, vector=vector_D, strength=2.0)])
    vector_D.zero_()  # the plan holds a copy
    plan.check(SHAPE)
    assert torch.equal(plan.load_shift(plan.residual[0]), from_file.load_shift(from_file.residual[0]))
    assert (plan.digest() == from_file.digest()) == (dtype == torch.float32), "a file of 16 bits has other bytes"


def test_entries_with_vectors_are_equal_where_the_vectors_are() -> None:
    one, same_one, other = (ResidualVector(3, vector=torch.full((4,), value)) for value in (1.0, 1.0, 2.0))
    assert one == same_one
    assert one != other
    assert len({one, same_one, other}) == 2
    stronger = dataclasses.replace(one, strength=3.0)
    assert torch.equal(SteeringPlan().vector(stronger).vector_D, torch.ones(4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "file of the residual vector at layer 3 is '': give the path of a safetensors file, or a vector"),
        ({"file": "v", "vector": torch.ones(4)}, "has both a vector and the file 'v': give one of them"),
        ({"vector": torch.ones(2, 2)}, r"a vector of shape \(2, 2\) cannot be added .*: give one finite tensor \[D\]"),
        ({"vector": torch.tensor([1.0, float("inf")])}, r"a vector of shape \(2,\) cannot"),
        ({"vector": "v"}, "a vector 'v' cannot be added"),
        ({"vector": made(torch.ones(4), layer=2)}, "the vector at layer 3 was made for layer 2 and the plan adds it at"),
        ({"vector": dataclasses.replace(made(torch.ones(4)), site="mlp_out")}, "made for site 'mlp_out'"),
    ],
)  # fmt: skip
def test_wrong_vectors_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualVector(3, **given)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(5), "the vector at layer 3 has width 5, the model's residual stream has 4"),
        (torch.zeros(4), "the vector at layer 3 holds a vector of zeros"),
        (
            made(torch.ones(4), model={"model_type": "llama"}),
            "was made on a model with model_type 'llama', this one has",
        ),
    ],
)
def test_a_vector_in_memory_is_checked_against_the_model(vector: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteeringPlan(residual=[ResidualVector(3, vector=vector)]).check(SHAPE)


def test_saving_names_every_vector_and_overwrites_none(tmp_path: Path) -> None:
    first, second = torch.ones(4), torch.full((4,), 2.0)
    save_file({"vector": first}, tmp_path / "p-L3.safetensors")
    plan = SteeringPlan(
        residual=[
            ResidualVector(3, "p-L3.safetensors"),
            ResidualVector(3, vector=second, scope="prompt"),
            ResidualVector(3, vector=second, scope="answer"),
            ResidualVector(2, vector=first),
            ResidualVector(3, vector=-second),
        ],
        base_dir=str(tmp_path),
    )
    plan.save(tmp_path / "p.json")
    saved = SteeringPlan.load(tmp_path / "p.json")
    names = ["p-L3", "p-L3-2", "p-L3-2", "p-L2", "p-L3-3"]
    assert [entry.file for entry in saved.residual] == [f"{name}.safetensors" for name in names]
    assert saved.digest() == plan.digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*(f"{n}.safetensors" for n in names), "p.json"})
    assert "vector" not in json.loads((tmp_path / "p.json").read_text())["residual"][1]


def test_a_plan_in_memory_has_no_json() -> None:
    plan = SteeringPlan(residual=[ResidualVector(3, vector=torch.ones(4))])
    with pytest.raises(ValueError, match=r"is in memory, and a plan in JSON names files: write both with SteeringPlan"):
        plan.to_dict()
    with pytest.raises(ValueError, match="is in memory and has no file"):
        plan.vector_path(plan.residual[0])
    with pytest.raises(ValueError, match=r"unknown key 'vector' in residual\[0\]"):
        SteeringPlan.from_dict({"version": 1, "residual": [{"layer": 3, "vector": [1.0]}]})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a file was opened as safetensors, and read as bytes."""
    counted: Counter[str] = Counter()
    opened, read_bytes = safetensors.safe_open, Path.read_bytes

    def count_open(name: str, **how: Any) -> Any:
        counted[f"open {Path(name).name}"] += 1
        return opened(name, **how)

    def count_bytes(path: Path) -> bytes:
        counted[f"bytes {path.name}"] += 1
        return read_bytes(path)

    monkeypatch.setattr(safetensors, "safe_open", count_open)
    monkeypatch.setattr(Path, "read_bytes", count_bytes)
    return counted


def test_a_file_is_read_once_in_the_life_of_a_plan(tmp_path: Path, reads: Counter[str]) -> None:
    model = tiny.qwen2()
    ids = torch.ones(1, 3, dtype=torch.long)
    width = model.config.hidden_size
    save_file({"vector": torch.ones(width)}, tmp_path / "v.safetensors")
    entries = [ResidualVector(1, "v.safetensors", scope=scope) for scope in ("prompt", "all")]
    SteeringPlan(residual=entries).save(tmp_path / "p.json")
    plan = SteeringPlan.load(tmp_path / "p.json")
    reads.clear()
    for _ in range(5):
        with steer(model, plan):
            before = model(ids).logits
        plan.digest()
    assert reads == {"open v.safetensors": 1, "bytes v.safetensors": 1}
    save_file({"vector": torch.full((width,), -2.0)}, tmp_path / "v.safetensors")
    again = SteeringPlan.load(tmp_path / "p.json")
    with steer(model, again):
        assert not torch.equal(model(ids).logits, before), "a plan that is loaded anew sees the new file"
    assert reads["open v.safetensors"] == 2
    assert again.digest() != plan.digest()


def test_the_reads_are_counted(tmp_path: Path, reads: Counter[str]) -> None:
    """The counter above can fail."""
    save_file({"vector": torch.ones(4)}, tmp_path / "v.safetensors")
    for _ in range(2):
        VectorFile.read(tmp_path / "v.safetensors")
    assert reads == {"open v.safetensors": 2, "bytes v.safetensors": 2}
