"""Residual vectors as a GGUF control vector, read back by the package's reader and by a naive decoder."""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gguf_files import WIDTH, certificate, write_gguf
from moe_steer.baking import bake, unbake
from moe_steer.gguf import export_control_vector
from moe_steer.plan import ExpertGain, ResidualVector, SteeringPlan


def plan_with(
    folder: Path, *entries: tuple[int, float], scope: str = "all", width: int = WIDTH, **more: object
) -> SteeringPlan:
    residual = []
    for index, (layer, strength) in enumerate(entries):
        vector_D = torch.randn(width, generator=torch.Generator().manual_seed(index))
        save_file({"vector": vector_D}, folder / f"v{index}.safetensors")
        residual.append(ResidualVector(layer, f"v{index}.safetensors", strength, scope))
    return SteeringPlan(residual=residual, base_dir=str(folder), **more)  # type: ignore[arg-type]


def loaded(path: Path) -> dict[int, np.ndarray]:
    """As llama.cpp loads it: 1-D float32 tensors ``direction.N`` with N > 0, all of one width."""
    reader = gguf.GGUFReader(str(path))
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    assert architecture.contents() == "controlvector"
    found = {}
    for item in reader.tensors:
        prefix, _, layer = item.name.partition(".")
        assert prefix == "direction"
        assert int(layer) > 0
        assert item.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(item.shape) == 1
        found[int(layer)] = np.array(item.data)
    return found


def test_each_direction_is_the_vector_times_its_strength_at_its_own_layer(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, (2, 1.5), (4, -3.0), (2, 0.1), (3, 0.0), model={"model_type": "qwen3_moe"})
    report = export_control_vector(plan, tmp_path / "cv.gguf")
    assert report["layers"] == [2, 4]
    directions = loaded(tmp_path / "cv.gguf")
    first, second, third = (plan.vector(entry).vector_D.numpy() for entry in plan.residual[:3])
    assert sorted(directions) == [1, 2, 3, 4]
    assert np.array_equal(directions[2], first * np.float32(1.5) + third * np.float32(0.1))
    assert np.array_equal(directions[4], second * np.float32(-3.0))
    assert not directions[1].any()
    assert not directions[3].any()
    hint = gguf.GGUFReader(str(tmp_path / "cv.gguf")).get_field("controlvector.model_hint")
    assert hint is not None
    assert hint.contents() == "qwen3moe"


def test_a_strength_in_residual_norms_becomes_a_length(tmp_path: Path) -> None:
    vector_D = torch.arange(1.0, 5.0)
    header = {"direction": json.dumps({"layer": 2, "site": "residual", "residual_norm": 12.0})}
    save_file({"vector": vector_D}, tmp_path / "d.safetensors", header)
    entry = ResidualVector(2, "d.safetensors", -0.5, "all", "residual_norm")
    plan = SteeringPlan(residual=[entry], base_dir=str(tmp_path))
    export_control_vector(plan, tmp_path / "cv.gguf")
    written_D = loaded(tmp_path / "cv.gguf")[2]
    assert np.linalg.norm(written_D) == pytest.approx(0.5 * 12.0, rel=1e-6)
    assert np.allclose(written_D, -6.0 * vector_D.numpy() / np.sqrt(30.0), rtol=1e-6)
    save_file({"vector": vector_D}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="has no residual_norm in its header"):
        export_control_vector(dataclasses.replace(plan), tmp_path / "again.gguf")
    assert not (tmp_path / "again.gguf").exists()


@pytest.mark.parametrize(
    ("entries", "more", "message"),
    [
        ([], {}, "the plan holds no residual vector of non-zero strength: there is nothing to export"),
        ([(2, 1.0)], {"scope": "thought"}, "layer 2 has the scope 'thought', a control vector acts on all tokens"),
        ([(2, 1.0)], {"scope": "after:0"}, "layer 2 has the scope 'after:0', a control vector acts on all tokens"),
        ([(0, 1.0)], {}, "layer 0 cannot be exported: llama.cpp's control vectors begin at layer 1"),
        ([(1, 1.0), (512, 1.0)], {}, "layer 512 cannot be exported: .* its models have at most 512"),
        ([(10**40, 1.0)], {}, "layer 1000000000000000.* cannot be exported"),
        ([(2, 1.0)], {"experts": [ExpertGain(1, 1, 2.0)]}, "also names 1 experts, which a control vector cannot hold: use bake"),
    ],
)  # fmt: skip
def test_what_a_control_vector_cannot_hold_is_refused(entries: list, more: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_control_vector(plan_with(tmp_path, *entries, **more), tmp_path / "cv.gguf")
    assert not list(tmp_path.glob("*cv.gguf*"))


def test_widths_must_agree_and_files_are_not_overwritten(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, (1, 1.0), (2, 1.0))
    save_file({"vector": torch.ones(WIDTH + 1)}, tmp_path / "v1.safetensors")
    with pytest.raises(ValueError, match=r"have the widths \[8, 9\]: they must all fit one model"):
        export_control_vector(plan, tmp_path / "cv.gguf")
    plan = plan_with(tmp_path, (1, 1.0))
    export_control_vector(plan, tmp_path / "cv.gguf")
    with pytest.raises(ValueError, match="exists: give the control vector another name"):
        export_control_vector(plan, tmp_path / "cv.gguf")


def test_a_bake_writes_both_or_says_what_is_missing(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "out.gguf"
    plan = plan_with(tmp_path, (1, 2.0), experts=[ExpertGain(2, 1, 64.0)])
    with pytest.raises(ValueError, match="has no place for the plan's 1 residual vectors: give --control-vector FILE"):
        bake(source, plan, target)
    bake(source, plan, target, control_vector=tmp_path / "cv.gguf")
    said = certificate(target)
    assert said["control_vector"]["file"] == "cv.gguf"
    assert len(said["slices"]) == 1
    assert sorted(loaded(tmp_path / "cv.gguf")) == [1]
    vector = unbake(target).control_vector
    assert vector is not None
    assert vector["file"] == "cv.gguf"
    wide = plan_with(tmp_path, (1, 2.0), width=WIDTH + 1)
    with pytest.raises(ValueError, match="has width 9, the model's residual stream has 8"):
        bake(source, wide, tmp_path / "wide.gguf", control_vector=tmp_path / "wide_cv.gguf")


def test_a_failed_bake_takes_its_control_vector_along(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "Q8_0")
    plan = plan_with(tmp_path, (1, 2.0), experts=[ExpertGain(2, 1, 64.0)])
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="out.gguf was not written: Not a directory"):
        bake(source, plan, tmp_path / "file" / "out.gguf", control_vector=tmp_path / "cv.gguf")
    assert not (tmp_path / "cv.gguf").exists()
