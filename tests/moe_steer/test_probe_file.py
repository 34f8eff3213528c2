"""The probe file: what is written is read, what cannot be used is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from moe_steer.gates import Probe
from moe_steer.layers import model_shape


def make(**changes: Any) -> Probe:
    weight_D = torch.arange(32, dtype=torch.float32) / 32 - 0.5
    return Probe(
        **{"weight_D": weight_D, "bias": -0.25, "layer": 1, "threshold": 0.7, "header": {"labels": "x"}} | changes
    )


def test_a_probe_survives_its_file(tmp_path: Path) -> None:
    probe = make()
    probe.save(tmp_path / "p.safetensors")
    read = Probe.load(tmp_path / "p.safetensors")
    assert torch.equal(read.weight_D, probe.weight_D)
    assert (read.bias, read.layer, read.threshold, dict(read.header)) == (-0.25, 1, 0.7, {"labels": "x"})
    assert read.digest() == probe.digest() != make(bias=0.25).digest()


def test_the_probability_is_the_sigmoid_of_a_linear_map() -> None:
    probe, hidden_TD = make(), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for hidden_D, found in zip(hidden_TD, probe.probability(hidden_TD), strict=True):
        odds = sum(float(w) * float(h) for w, h in zip(probe.weight_D, hidden_D, strict=True)) - 0.25
        assert float(found) == pytest.approx(1 / (1 + 2.718281828459045**-odds), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_D": torch.zeros(2, 2)}, "give one finite weight"),
        ({"weight_D": torch.tensor([float("nan")])}, "give one finite weight"),
        ({"layer": -1}, "layer of a probe is -1"),
        ({"site": "mlp"}, "probes read 'residual'"),
        ({"bias": float("inf")}, "bias of a probe"),
        ({"threshold": 1.5}, "from 0 to 1"),
        ({"header": {"bias": 1}}, "may not hold 'bias'"),
    ],
)
def test_what_is_no_probe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    head = {"version": 2, "layer": 1, "site": "residual", "bias": 0.0, "threshold": 0.5}
    with pytest.raises(ValueError, match="there is no probe file .*moe-steer probe"):
        Probe.load(file)
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="and no probe"):
        Probe.load(file)
    save_file({"weight": torch.zeros(3)}, file, {"probe": json.dumps(head)})
    with pytest.raises(ValueError, match="its version is 2, this program reads version 1"):
        Probe.load(file)
    save_file({"weight": torch.zeros(3)}, file, {"probe": json.dumps({"version": 1, "layer": 1})})
    with pytest.raises(ValueError, match="cannot be used"):
        Probe.load(file)


def test_a_probe_of_another_model_is_refused() -> None:
    shape = model_shape(tiny.qwen2())
    make().check(shape)
    for probe, message in (
        (make(layer=3), "has layers 0-2"),
        (make(weight_D=torch.zeros(8)), "has width 8"),
        (make(header={"model": {"num_layers": 5}}), "num_layers 5"),
    ):
        with pytest.raises(ValueError, match=message):
            probe.check(shape)
