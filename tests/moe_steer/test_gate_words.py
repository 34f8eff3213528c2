"""The words of ``when`` in plan files: what is read comes back, everything else is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer.gates import Probe
from moe_steer.gates.conditions import Condition, When

GOOD = [
    {"on": "probe", "file": "p.safetensors", "above": 0.7},
    {"on": "difficulty", "file": "p.safetensors", "below": 0.3, "until": 0.5, "ramp": 3},
    {"on": "entropy", "above": 2, "until": 1.5},
    {"on": "margin", "below": 0.1, "until": 0.2},
    {"on": "loop", "above": 30, "copies": 4, "period": 8},
    {"all": [{"on": "spent", "above": 500}, {"on": "paragraphs_since", "word": "Wait", "above": 4}], "ramp": 16},
    {"any": [{"on": "spent", "above": 500}, {"on": "entropy", "above": 1}]},
]


def plan(when: Any, version: int = 2) -> dict[str, Any]:
    return {"version": version, "experts": [{"layer": 1, "expert": 2, "gain": 3.0, "when": when}]}


@pytest.mark.parametrize("when", GOOD, ids=str)
def test_what_is_said_comes_back(when: dict[str, Any]) -> None:
    read = SteeringPlan.from_dict(plan(when))
    said = read.to_dict()
    assert said["version"] == 2
    assert When.of(said["experts"][0]["when"]) == read.experts[0].when == When.of(when)
    assert SteeringPlan.from_dict(json.loads(json.dumps(said))) == read
    assert str(read.experts[0].when)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("entropy", "when is 'entropy': give a JSON object"),
        ({}, "when is {}: give an object with 'on' and a border"),
        ({"on": "mood", "above": 1}, "when: a condition on 'mood': choose one of probe, difficulty, entropy"),
        ({"on": ["probe"], "above": 1}, "a condition on .'probe'."),
        ({"on": "entropy"}, "when: the condition on entropy needs one border: give 'above' or 'below'"),
        ({"on": "entropy", "above": 1, "below": 2}, "needs one border"),
        ({"on": "entropy", "above": "high"}, "above of the condition on entropy is 'high': give a finite number"),
        ({"on": "entropy", "above": True}, "above of .* is True"),
        ({"on": "entropy", "above": -1}, "is -1, and it is never below 0"),
        ({"on": "margin", "below": 1.5}, "give a number from 0 to 1"),
        ({"on": "entropy", "above": 1, "until": 2}, "opens at 1 and would close at once at 2"),
        ({"on": "margin", "below": 0.2, "until": 0.1}, "give an 'until' at or over it"),
        (
            {"on": "entropy", "above": 1, "file": "p"},
            "when has the key 'file': on entropy it may hold above, below, on, until",
        ),
        ({"on": "probe", "above": 0.5}, "file of the condition on probe is '': give a text"),
        ({"on": "paragraphs_since", "above": 1, "word": 3}, "word of .* is 3: give a text"),
        ({"on": "loop", "above": 9, "copies": 1}, "copies of .* give a whole number from 2"),
        ({"on": "loop", "above": 9, "period": 1000}, "period of .* give a whole number from 1 to 256"),
        ({"on": "loop", "above": 9, "ramp": 0}, "ramp of a gate is 0"),
        ({"on": "loop", "above": 9, "ramp": 1.5}, "ramp of a gate is 1.5"),
        ({"all": []}, "a gate without a condition is no gate"),
        ({"all": {}}, "give a list under 'all' or under 'any'"),
        ({"all": [], "any": []}, "give a list under 'all' or under 'any'"),
        ({"any": [{"on": "spent", "above": 1}, {"on": "spent", "above": 1}]}, "names a condition twice"),
        ({"any": [{"all": []}]}, "when.any.0. is .* give an object with 'on'"),
        ({"any": [{"on": "spent", "above": 1, "ramp": 2}]}, "when.any.0. has the key 'ramp'"),
    ],
)
def test_other_words_are_refused(when: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SteeringPlan.from_dict(plan(when))
    assert "\n" not in str(error.value)


def test_older_readers_are_told_and_older_plans_stay() -> None:
    with pytest.raises(ValueError, match="'when', 'do' or 'site' and the plan says version 1"):
        SteeringPlan.from_dict(plan(GOOD[2], version=1))
    with pytest.raises(ValueError, match="plan version True cannot be read"):
        SteeringPlan.from_dict({"version": True})
    old = SteeringPlan(experts=[ExpertGain(1, 2, 3.0)])
    assert old.to_dict()["version"] == 1
    assert SteeringPlan.from_dict({**old.to_dict(), "version": 2}).digest() == old.digest()
    with pytest.raises(ValueError, match="forced in, and that has no half: leave the ramp out"):
        ExpertGain(1, 2, force="in", when={**GOOD[2], "ramp": 2})


def test_the_digest_is_of_what_a_probe_computes(tmp_path: Path) -> None:
    vector_D = torch.ones(4)
    digests = []
    for name, bias in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        Probe(weight_D=vector_D, bias=bias, layer=0).save(folder / f"{name}.safetensors")
        when = {"on": "probe", "file": f"{name}.safetensors", "above": 0.5}
        one = SteeringPlan(
            experts=[ExpertGain(1, 2, 3.0, when=when)],
            residual=[ResidualVector(1, vector=vector_D, when=when, do="set", to=1.0)],
            base_dir=str(folder),
        )
        one.save(folder / "plan.json")
        assert SteeringPlan.load(folder / "plan.json").digest() == one.digest()
        digests.append(one.digest())
    assert digests[0] == digests[1] != digests[2]
    # Named from another folder it is the same plan.
    read = SteeringPlan.load(tmp_path / "a" / "plan.json")
    moved = read.with_files(lambda path: f"a/{path.name}", tmp_path)
    assert moved.digest() == digests[0]
    moved.save(tmp_path / "plan.json")
    assert SteeringPlan.load(tmp_path / "plan.json").digest() == digests[0]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ValueError, match="there is no probe file"):
        SteeringPlan.load(tmp_path / "plan.json").digest()
    assert Condition("entropy", above=1.0).source == Condition("entropy", below=2.0).source


def test_a_dose_leaves_the_gate() -> None:
    gated = SteeringPlan(experts=[ExpertGain(1, 2, 3.0, when=GOOD[2])])
    assert gated.dosed(0.5).experts[0] == ExpertGain(1, 2, 2.0, when=GOOD[2])
