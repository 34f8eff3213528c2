"""Baking, verifying and unbaking whole GGUF files."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import INNER, NUM_EXPERTS, WIDTH, certificate, dequantised, tensors, write_gguf
from moe_steer.baking import bake, folder_files, unbake, verify_bake
from moe_steer.baking.gguf_model import BLOCK_FORMATS, read_gguf
from moe_steer.baking.gguf_record import read_gguf_record
from moe_steer.baking.record import sealed
from moe_steer.plan import ExpertGain, SteeringPlan

ALL = sorted(BLOCK_FORMATS)
PLAN = SteeringPlan(experts=[ExpertGain(1, 2, 64.0), ExpertGain(2, 0, 0.25)])


def plan(gain: float, layer: int = 1, expert: int = 2) -> SteeringPlan:
    return SteeringPlan(experts=[ExpertGain(layer, expert, gain)])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differing_bytes(old: Path, new: Path) -> np.ndarray:
    return np.nonzero(np.fromfile(old, dtype=np.uint8) != np.fromfile(new, dtype=np.uint8))[0]


@pytest.mark.parametrize("type_name", ALL)
def test_a_slice_after_is_the_slice_before_times_the_gain_and_all_else_is_untouched(
    type_name: str, tmp_path: Path
) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", type_name), tmp_path / "out.gguf"
    original = digest(source)
    returned = bake(source, PLAN, target)
    said = certificate(target)
    assert (said["verdict"], said["bound"], said["reversible"]) == ("bit-exact", 0.0, True)
    assert (returned.verdict, returned.bound, returned.reversible) == ("exact", 0.0, True)
    old, new = tensors(source), tensors(target)
    for entry in PLAN.experts:
        name = f"blk.{entry.layer}.ffn_down_exps.weight"
        before, after = (dequantised(side[name][1][entry.expert], type_name) for side in (old, new))
        assert np.array_equal(after.view(np.uint32), (before * np.float32(entry.gain)).view(np.uint32))
    ranges = [(item["offset"], item["offset"] + item["num_bytes"]) for item in said["slices"]]
    changed = differing_bytes(source, target)
    assert len(changed) > 0
    assert all(any(start <= byte < end for start, end in ranges) for byte in changed)
    assert digest(source) == original
    assert verify_bake(target, source).compared_bytes == target.stat().st_size
    assert verify_bake(target).certificate == replace(returned, bytes_written=0)
    unbake(target)
    assert digest(target) == original
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out.gguf"]


def test_another_gain_is_certified_with_its_bound(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q6_K"), tmp_path / "out.gguf"
    bake(source, plan(10.0), target)
    said = certificate(target)
    assert (said["verdict"], said["bound"]) == ("exact to rounding", 2.0**-11)
    name = "blk.1.ffn_down_exps.weight"
    before, after = (dequantised(tensors(path)[name][1][2], "Q6_K") for path in (source, target))
    wanted = before.astype(np.float64) * 10
    assert (np.abs(after - wanted) <= (2.0**-11 + 2.0**-22) * np.abs(wanted)).all()
    verify_bake(target, source)
    with pytest.raises(
        ValueError,
        match="expert 2, cannot be restored bit for bit: gain 10 was rounded .*; take the original checkpoint, m.gguf",
    ):
        unbake(target)


def test_the_down_bias_is_scaled_as_well(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "MXFP4", "gpt-oss", bias=True), tmp_path / "out.gguf"
    bake(source, plan(64.0), target)
    x_I = np.random.default_rng(1).standard_normal(INNER).astype(np.float32)
    outputs = []
    for path in (source, target):
        held = tensors(path)
        down_EDI = dequantised(held["blk.1.ffn_down_exps.weight"][1], "MXFP4").astype(np.float64)
        bias_ED = dequantised(held["blk.1.ffn_down_exps.bias"][1], "F32")
        outputs.append(down_EDI @ x_I + bias_ED)
    factor = np.ones((NUM_EXPERTS, 1))
    factor[2] = 64.0
    assert np.array_equal(outputs[1], outputs[0] * factor)
    assert outputs[0].shape == (NUM_EXPERTS, WIDTH)


@pytest.mark.parametrize("type_name", ["NVFP4", "Q4_K"])
def test_a_scale_per_expert_is_the_native_place(type_name: str, tmp_path: Path) -> None:
    # the quantiser of the package has no NVFP4: any bytes will do, they must not change
    source = write_gguf(tmp_path / "m.gguf", "Q4_K", "gemma4", scale=True)
    if type_name == "NVFP4":
        raw = source.read_bytes()
        header, rest = raw[: raw.index(b"token_embd.weight")], raw[raw.index(b"token_embd.weight") :]
        old = int(gguf.GGMLQuantizationType.Q4_K).to_bytes(4, "little")
        source.write_bytes(header + rest.replace(old, int(gguf.GGMLQuantizationType.NVFP4).to_bytes(4, "little"), 2))
    target = tmp_path / "out.gguf"
    bake(source, plan(3.0), target)
    said = certificate(target)
    assert [item["tensor"] for item in said["slices"]] == ["blk.1.ffn_down_exps.scale"]
    before, after = (tensors(path)["blk.1.ffn_down_exps.scale"][1].view(np.float32) for path in (source, target))
    assert after.tolist() == [before[0], before[1], np.float32(before[2] * 3.0), before[3]]
    assert len(differing_bytes(source, target)) <= 4


def test_a_model_in_parts_changes_only_the_parts_that_hold_the_experts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = write_gguf(tmp_path / "a" / "m.gguf", "Q8_0", split=3)
    names = sorted(path.name for path in source.parent.iterdir())
    assert len(names) == 3
    original = [digest(source.with_name(name)) for name in names]
    bake(source, plan(64.0), tmp_path / "b" / "out.gguf")
    said = certificate(tmp_path / "b" / "out-00001-of-00003.gguf")
    parts = [tmp_path / "b" / f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        *[part.name for part in parts][:1],
        "out-00001-of-00003.gguf.steering.json",
        *[part.name for part in parts][1:],
    ]
    changed = said["slices"][0]["part"]
    for index, part in enumerate(parts):
        assert (digest(part) == original[index]) == (index != changed)
        assert part.samefile(source.with_name(names[index])) == (index != changed)
    assert verify_bake(parts[0], source).hashed == 1
    whole = write_gguf(tmp_path / "whole.gguf", "Q8_0")
    with pytest.raises(ValueError, match="the source has no file for .*out-00002-of-00003.gguf"):
        verify_bake(parts[0], whole)
    unbake(parts[0])
    assert [digest(part) for part in parts] == original
    bake(source, plan(64.0), tmp_path / "c" / "out.gguf", copy=True)
    assert not any(path.samefile(other) for path in (tmp_path / "c").iterdir() for other in source.parent.iterdir())


@pytest.mark.parametrize("type_name", ["Q4_K", "IQ1_M", "F16"])
def test_the_size_of_the_pieces_does_not_matter(
    type_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", type_name), tmp_path / "out.gguf"
    original = digest(source)
    bake(source, plan(10.0), target)
    bake(source, plan(64.0), tmp_path / "exact.gguf")
    monkeypatch.setattr(folder_files, "PIECE", 500)
    bake(source, plan(10.0), tmp_path / "again.gguf")
    assert digest(tmp_path / "again.gguf") == digest(target)
    assert verify_bake(target).hashed == 1
    assert certificate(tmp_path / "again.gguf")["slices"] == certificate(target)["slices"]
    unbake(tmp_path / "exact.gguf")
    assert digest(tmp_path / "exact.gguf") == original
    assert verify_bake(target, source).compared_bytes == source.stat().st_size


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (SteeringPlan(experts=PLAN.experts, renormalize=True), "a plan with renormalize cannot be baked: the other experts' weights change from token to token"),
        (SteeringPlan(experts=PLAN.experts, scope="thought"), "a plan with scope 'thought' cannot be baked: weights act at every token"),
        (plan(2.0, layer=0), "layer 0 .expert 2. has no experts in this model: layers with experts are 1-2"),
        (plan(2.0, layer=7), "layer 7 .expert 2. has no experts in this model"),
        (plan(2.0, expert=4), "expert 4 at layer 1 does not exist: this model has experts 0-3"),
        (SteeringPlan(experts=PLAN.experts, model={"model_type": "qwen3_moe"}), "was made for 'qwen3_moe', which GGUF calls qwen3moe; this file is 'deepseek2'"),
        (SteeringPlan(experts=PLAN.experts, model={"num_experts": 8}), "made for num_experts 8, this model has 4"),
        (SteeringPlan(experts=PLAN.experts, model={"num_layers": 61}), "made for num_layers 61, this model has 3"),
        (plan(1e7), r"layer 1 expert 2: blk.1.ffn_down_exps.weight .Q4_0. cannot hold the gain 10000000: \d+ scales would pass float16's largest"),
        (plan(2.0**-20), "scales fall below what float16 holds exactly .relative error up to .*: use a larger gain, or allow rounding"),
    ],
)  # fmt: skip
def test_what_cannot_be_baked_is_refused_before_anything_is_written(
    wanted: SteeringPlan, message: str, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "m.gguf", "Q4_0")
    original = digest(source)
    with pytest.raises(ValueError, match=message) as caught:
        bake(source, wanted, tmp_path / "new" / "out.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert digest(source) == original


def test_the_power_of_two_that_fits_is_offered_and_fits(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "Q4_0")
    with pytest.raises(ValueError, match="the largest power of two that fits is") as caught:
        bake(source, plan(2.0**30), tmp_path / "out.gguf")
    fits = float(str(caught.value).rsplit(" ", 1)[1])
    with pytest.raises(ValueError, match="would pass float16's largest number"):
        bake(source, plan(2 * fits), tmp_path / "out.gguf")
    assert bake(source, plan(fits), tmp_path / "out.gguf").verdict == "exact"


def test_rounding_is_asked_for_and_certified(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "MXFP4", "gpt-oss", bias=True)
    with pytest.raises(
        ValueError,
        match="is stored as MXFP4, whose scales hold only powers of two, and gain 10 is not one: take 8, or let --round",
    ):
        bake(source, plan(10.0), tmp_path / "out.gguf")
    bake(source, plan(10.0), tmp_path / "out.gguf", round_gains=True)
    said = certificate(tmp_path / "out.gguf")
    assert [(item["asked"], item["gain"]) for item in said["slices"]] == [(10.0, 8.0), (10.0, 8.0)]
    assert (said["verdict"], said["bound"]) == ("exact to rounding", pytest.approx(0.2))
    low = write_gguf(tmp_path / "low.gguf", "Q8_0")
    bake(low, plan(2.0**-14), tmp_path / "low_out.gguf", round_gains=True)
    said = certificate(tmp_path / "low_out.gguf")
    assert said["verdict"] == "exact to rounding"
    assert said["bound"] == said["slices"][0]["max_relative_error"] > 2.0**-11
    assert not said["reversible"]
    verify_bake(tmp_path / "low_out.gguf", low)


def test_a_neutral_plan_changes_nothing(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q4_0"), tmp_path / "out.gguf"
    bake(source, SteeringPlan(experts=[ExpertGain(1, 1, 1.0)]), target)
    said = certificate(target)
    assert (said["verdict"], said["slices"]) == ("bit-exact", [])
    assert digest(source) == digest(target)
    assert verify_bake(target, source).tensors == 0


def test_families_whose_experts_are_not_linear_in_the_gate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="llama4 scales the input of an expert, not its output"):
        bake(write_gguf(tmp_path / "l.gguf", arch="llama4"), PLAN, tmp_path / "out.gguf")
    chunk = {"blk.1.ffn_down_chexps.weight": np.zeros((2, WIDTH, INNER), dtype=np.float32)}
    with pytest.raises(
        ValueError, match="grovemoe has chunk experts .ffn_down_chexps. that share the router's weights"
    ):
        bake(write_gguf(tmp_path / "g.gguf", arch="grovemoe", extra=chunk), PLAN, tmp_path / "out.gguf")


def test_the_family_is_compared_by_llama_cpps_names(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    known = SteeringPlan(experts=PLAN.experts, model={"model_type": "deepseek_v3", "num_layers": 3, "num_experts": 4})
    assert bake(source, known, tmp_path / "1.gguf").notes == ()
    strange = SteeringPlan(experts=PLAN.experts, model={"model_type": "brand_new"})
    assert bake(source, strange, tmp_path / "2.gguf").notes == (
        "the plan was made for 'brand_new'; that 'deepseek2' is the same family could not be checked",
    )
    with pytest.raises(ValueError, match="made for 'mixtral', which GGUF calls llama; this file is 'deepseek2'"):
        bake(source, SteeringPlan(experts=PLAN.experts, model={"model_type": "mixtral"}), tmp_path / "3.gguf")
    newer = write_gguf(tmp_path / "n.gguf", arch="tomorrow")
    assert "architecture 'tomorrow' is newer than the gguf package" in bake(newer, PLAN, tmp_path / "4.gguf").notes[0]


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names no deepseek2.expert_count: it is a dense model"):
        bake(write_gguf(tmp_path / "m.gguf", expert_count=None), PLAN, tmp_path / "out.gguf")


def test_an_expert_count_that_lies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the shape \[512, 8, 4\], whose last number should be expert_count = 8"):
        bake(write_gguf(tmp_path / "m.gguf", expert_count=8), PLAN, tmp_path / "out.gguf")


def test_source_and_target_are_looked_at_first(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    for option in ("overlay", "symlink", "hash_all"):
        name = option.replace("_", "-")
        with pytest.raises(ValueError, match=f"--{name} is for checkpoint folders, and .*m.gguf is a GGUF file"):
            bake(source, PLAN, target, **{option: True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source and target are the same file"):
        bake(source, PLAN, source)
    with pytest.raises(ValueError, match="is a folder: give the name of the GGUF file to write"):
        bake(source, PLAN, tmp_path)
    bake(source, PLAN, target)
    with pytest.raises(ValueError, match="out.gguf' exists: give another name, or remove it first"):
        bake(source, PLAN, target)
    with pytest.raises(ValueError, match="already has a plan baked in .out.gguf.steering.json.: unbake it first"):
        bake(target, PLAN, tmp_path / "again.gguf")
    with pytest.raises(ValueError, match="is itself baked: give the original model as the source"):
        verify_bake(target, target)
    with pytest.raises(ValueError, match="there is no certificate"):
        verify_bake(source)
    with pytest.raises(ValueError, match="there is no certificate"):
        unbake(source)


def test_verify_finds_one_flipped_byte_wherever_it_is(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q4_K"), tmp_path / "out.gguf"
    bake(source, PLAN, target)
    said = certificate(target)
    whole = target.read_bytes()
    inside = said["slices"][0]["offset"]
    embedding = next(item for item in gguf.GGUFReader(str(target)).tensors if item.name == "token_embd.weight")
    for byte, alone, compared in (
        (
            inside + 5,
            "blk.1.ffn_down_exps.weight, expert 2, in .* was changed after baking",
            "expert 2, in .* was changed after baking",
        ),
        (
            int(embedding.data_offset) + 3,
            "out.gguf was changed after baking: its hash differs",
            "out.gguf was changed after baking",
        ),
        (whole.index(b"t13") + 1, "the header of .* was changed after the bake", "the header of"),
    ):
        target.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        with pytest.raises(ValueError, match=alone):
            verify_bake(target)
        with pytest.raises(ValueError, match=compared):
            verify_bake(target, source)
    target.write_bytes(whole)
    verify_bake(target, source)


def test_verify_against_the_source_covers_what_carries_no_hash(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q4_K"), tmp_path / "out.gguf"
    bake(source, PLAN, target)
    said = certificate(target)
    said["files"][0]["sha256"] = None
    rewrite(target, said)
    assert verify_bake(target, source).hashed == 0
    item = next(item for item in gguf.GGUFReader(str(target)).tensors if item.name == "token_embd.weight")
    byte = int(item.data_offset) + 3
    whole = target.read_bytes()
    target.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
    with pytest.raises(
        ValueError, match=f"out.gguf differs from .* at byte {byte}, where nothing was baked .token_embd.weight."
    ):
        verify_bake(target, source)
    target.write_bytes(whole)
    other = write_gguf(tmp_path / "other.gguf", "Q4_K", seed=7)
    with pytest.raises(ValueError, match="expert 2, of the source is not the tensor that was baked"):
        verify_bake(target, other)


def rewrite(target: Path, said: dict[str, Any]) -> None:
    """The record of a baked file with other words, and the hash that fits them."""
    body = {key: value for key, value in said.items() if key != "sha256"}
    target.with_name(f"{target.name}.steering.json").write_text(sealed(body, indent=2))


def test_every_byte_of_the_record_is_held(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "out.gguf"
    bake(source, PLAN, target)
    record = tmp_path / "out.gguf.steering.json"
    whole = record.read_bytes()
    model = read_gguf(target)
    for at in range(len(whole)):
        record.write_bytes(whole[:at] + bytes([whole[at] ^ (1, 0x20, 0x40, 0xFF)[at % 4]]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="out.gguf.steering.json"):
            read_gguf_record(model)
    record.write_bytes(whole.replace(b"  ", b" "))
    for use in (verify_bake, unbake):
        with pytest.raises(ValueError, match="is not as it was written"):
            use(target)
    record.write_bytes(whole)
    verify_bake(target, source)


def test_a_record_of_the_version_without_a_hash_is_read(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "out.gguf"
    bake(source, PLAN, target)
    original = digest(source)
    said = certificate(target)
    old = {**{key: value for key, value in said.items() if key != "sha256"}, "version": 1}
    record = tmp_path / "out.gguf.steering.json"
    record.write_text(json.dumps({**old, "sha256": said["sha256"]}))
    with pytest.raises(ValueError, match="is not as it was written"):
        verify_bake(target)
    record.write_text(json.dumps({**old, "slices": [{}]}))
    with pytest.raises(ValueError, match="steering.json cannot be used"):
        verify_bake(target)
    record.write_text(json.dumps(old))
    verify_bake(target)
    unbake(target)
    assert digest(target) == original


def test_unbake_refuses_what_was_changed_since(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "out.gguf"
    bake(source, PLAN, target)
    offset = certificate(target)["slices"][1]["offset"]
    whole = target.read_bytes()
    target.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
    changed = digest(target)
    with pytest.raises(ValueError, match=r"blk.2.ffn_down_exps.weight, expert 0, is not what the bake wrote"):
        unbake(target)
    assert digest(target) == changed


def test_a_certificate_of_another_file_is_refused(tmp_path: Path) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "out.gguf"
    bake(source, PLAN, target)
    other = write_gguf(tmp_path / "other.gguf", "Q4_K")
    beside = tmp_path / "other.gguf.steering.json"
    beside.write_text((tmp_path / "out.gguf.steering.json").read_text())
    with pytest.raises(ValueError, match="which this file does not hold there: they do not belong together"):
        verify_bake(other)
    beside.write_text("{}")
    with pytest.raises(ValueError, match="is not a GGUF certificate of version 2: it lacks 'bound'"):
        verify_bake(other)
    beside.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        verify_bake(other)


def test_without_the_gguf_package_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from moe_steer.baking import bake\n"
        "from moe_steer.plan import SteeringPlan\n"
        f"try: bake({str(source)!r}, SteeringPlan(), 'x.gguf')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert (
        done.stdout.strip()
        == "GGUF files are read with the package 'gguf', which is not installed: pip install 'moe-steer[gguf]'"
    )


def test_importing_the_package_loads_neither_gguf_nor_torch() -> None:
    code = "import sys, moe_steer.baking; print(sorted({'gguf', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == "[]"
