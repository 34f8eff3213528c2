"""Gated plans from the user's command to the report: a probe, a plan, an evaluation; and who refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli.main import main
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, load_model, steer
from moe_steer.baking import bake
from moe_steer.gates import Probe
from moe_steer.gguf import export_control_vector
from moe_steer.lab import LAB_MODEL
from moe_steer_sglang import _refuse_plan
from moe_steer_vllm.served import Served
from reasoning_evals.engines import InProcessSampler, SamplingConfig
from reasoning_evals.engines.sampling import Request
from reasoning_evals.runs import read_audit

pytestmark = pytest.mark.slow

SMALL = ["--samples", "2", "--max-new-tokens", "60", "--batch-size", "12"]
GATES: list[dict[str, Any]] = [
    {"on": "probe", "file": "probes/probe-L2.safetensors", "above": 0.5, "until": 0.1, "ramp": 2},
    {"on": "entropy", "above": 0.5},
    {"any": [{"on": "loop", "above": 9, "copies": 2}, {"on": "spent", "above": 12}]},
    {"on": "margin", "below": 0.6, "ramp": 2},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graded run of the lab model and probes made from it."""
    folder = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["generate", "--split", "tuning", "--num", "9", *SMALL, "--out", "base"]) == 0
        assert main(["probe", "--traces", "base", "--labels", "check", "--layers", "1", "2", "--out", "probes"]) == 0
        vector_D = torch.randn(128, generator=torch.Generator().manual_seed(0))
        ones = [ResidualVector(2, vector=10 * vector_D, scope="generated")]
        SteeringPlan(residual=ones, experts=[ExpertGain(3, 4, 6.0)]).save("ungated.json")
    return folder


def test_a_gated_plan_runs_from_the_command_to_the_report(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    when = json.dumps({**GATES[0], "above": 0.02, "until": 0.01})
    direction = ["--residual", "2:ungated-L2.safetensors=1@thought"]
    assert main(["plan", *direction, "--experts", "3:4=6", "--when", when, "--out", "gated.json"]) == 0
    assert "when probe probes/probe-L2.safetensors >= 0.02 until < 0.01, over 2 tokens" in capsys.readouterr().out
    assert json.loads(Path("gated.json").read_text())["version"] == 2
    arms = ["--arms", "baseline", "plan:gated.json", "--num-problems", "6", *SMALL, "--out", "run"]
    assert main(["evaluate", *arms]) == 0
    gain, vector = read_audit("run").rows["plan:gated"]
    assert gain["rows"] == vector["rows"] == 12
    assert vector["openings"] >= vector["opened_rows"] > 0
    assert vector["tokens"] > 0
    assert vector["norm_added"] > 0
    for page in ("report.md", "report.html"):
        assert "openings" in Path("run", page).read_text()
    told = read_audit("run").gates
    assert len({key[1:] for key in told}) == len(told) == 12
    for place, row in enumerate((gain, vector)):
        assert row["openings"] == sum(acts[place]["openings"] for acts in told.values())
        assert row["tokens"] <= sum(acts[place]["tokens"] for acts in told.values())  # a prompt that samples share
    lines = ["generate", "--split", "tuning", "--num", "2", "--plan", "gated.json", *SMALL, "--out", "some"]
    assert main(lines) == 0
    said, gate = capsys.readouterr().out, "gate probe probes/probe-L2.safetensors >= 0.02 until < 0.01, over 2 tokens"
    assert f"; {gate}: opened" in said
    assert " sample 1: layer 3 expert 4: gate opened " in said
    assert "; layer 2 vector ungated-L2.safetensors: gate opened " in said


def test_rows_that_leave_and_join_are_gated_as_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    model, tokenizer = load_model("lab")
    vector_D = 8 * torch.randn(128, generator=torch.Generator().manual_seed(1))
    Probe(weight_D=vector_D / 100, bias=0.0, layer=2).save("random.safetensors")
    low = [{**GATES[0], "file": "random.safetensors", "above": 0.6, "until": 0.5}, *GATES[1:]]
    residual = [ResidualVector(2 if "file" in gate else 1, vector=vector_D, when=gate) for gate in low]
    plan = SteeringPlan(residual=residual, experts=[ExpertGain(2, 3, logit_bias=4.0, when=GATES[1])])
    questions = [
        "What is 3 + 4?",
        "Find x: 2x + 3 = 11.",
        "A car drives 30 km in 2 h. What is its speed?",
        "What is 12 - 5?",
    ]
    sampler = InProcessSampler(model, tokenizer)
    prompts = [sampler.render(text) for text in questions + questions[:2]]
    requests = [Request(tuple(prompt.token_ids), 0, key=str(i)) for i, prompt in enumerate(prompts)]
    found: list[Any] = []
    samples: list[dict[str, Any]] = []
    for rows in (3, 1):
        config = SamplingConfig(max_new_tokens=30, greedy=True, batch_size=rows, temperature=1.0, top_p=1.0)
        with steer(model, plan, tokenizer=tokenizer) as audit:
            found.append({one.key: one.token_ids for one in sampler.sample(requests, config)})
        samples.append(audit.to_samples())
        said = [
            {k: v for k, v in row.items() if k in ("rows", "opened_rows", "reopened_rows", "openings", "tokens")}
            for row in audit.to_rows()
        ]
        found.append(said)
    assert found[0] == found[2]
    assert [row["openings"] for row in found[1]] == [row["openings"] for row in found[3]]
    assert all(row["openings"] for row in found[1]), found[1]
    assert set(samples[0]) == {key for key, ids in found[0].items() if len(ids) > 1} == set(samples[1])
    for key, acts in samples[0].items():
        for act, alone in zip(acts, samples[1][key], strict=True):
            assert act == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in alone.items()}, key
    for place, row in enumerate(found[1]):
        assert row["openings"] == sum(
            act["openings"] for acts in samples[0].values() for act in acts if act["row"] == place
        )


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, tuple[SteeringPlan, str]]:
    vector_D = torch.ones(128)
    gate = {"on": "loop", "above": 30}
    found = {
        "gate": (
            SteeringPlan(experts=[ExpertGain(1, 2, 3.0, when=gate)]),
            "expert 2 at layer 1 is gated .when: loop 3 64 >= 30.",
        ),
        "gated vector": (SteeringPlan(residual=[ResidualVector(1, vector=vector_D, when=gate)]), "at layer 1 is gated"),
        "deed": (
            SteeringPlan(residual=[ResidualVector(1, vector=vector_D, do="ablate")]),
            "is to ablate at the site output",
        ),
        "site": (SteeringPlan(residual=[ResidualVector(1, vector=vector_D, site="mlp")]), "is to add at the site mlp"),
    }
    for name, (plan, _) in found.items():
        plan.save(tmp_path / f"{name.replace(' ', '-')}.json")
    return found


@pytest.mark.parametrize("name", ["gate", "gated vector", "deed", "site"])
def test_what_only_this_process_can_do_is_refused_elsewhere(
    name: str, plans: dict[str, tuple[SteeringPlan, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, words = plans[name]
    file = str(tmp_path / f"{name.replace(' ', '-')}.json")
    with pytest.raises(ValueError, match=f"{words}.*a baked model"):
        bake(LAB_MODEL, plan, tmp_path / "baked")
    with pytest.raises(ValueError, match=f"{words}.*a control vector"):
        export_control_vector(SteeringPlan.load(file), tmp_path / "v.gguf")
    with pytest.raises(ValueError, match=f"plan some: .*{words}.*an engine"):
        Served.of({"plans": {"some": file}})
    with pytest.raises(ValueError, match=f"{words}.*an engine"):
        _refuse_plan(plan, file)
    assert main(["serve", "lab", "--plan", f"some={file}"]) != 0
    said = capsys.readouterr().err
    assert "plan some: " in said
    assert "a server" in said
    assert "\n" not in said.strip()
    assert main(["bake", "--plan", file, "--model", "lab", "--out", str(tmp_path / "b")]) != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--labels", "nothing.jsonl"], "--labels nothing.jsonl is no file: give one, or one of check"),
        (["--labels", "right", "--switch-words", "So"], "--switch-words are for --labels check"),
        (["--layers", "9"], "layer 9 does not exist"),
        (["--layers", "1", "1"], "name each once"),
        (["--held-out", "1"], "give a share between 0 and 1"),
        (["--ridge", "0"], "--ridge is 0: give a number above 0"),
        (["--threshold", "2"], "--threshold is 2: give a probability"),
        (["--labels", "solved", "--held-out", "0.01"], "have one label only"),
        (["--labels", "one.jsonl"], "one.jsonl:1: there is no position 99999 of trace"),
        (["--labels", "two.jsonl"], "two.jsonl:1: label is 2: give 0 or 1"),
    ],
)
def test_probes_that_cannot_be_made_are_refused(
    change: list[str], message: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    Path("one.jsonl").write_text('{"trace": "x", "position": 99999, "label": 1}\n')
    Path("two.jsonl").write_text('{"trace": "x", "position": 1, "label": 2}\n')
    options = {"--traces": ["base"], "--labels": ["check"], "--layers": ["1"], "--out": ["refused"]}
    options[change[0]] = []
    words = [word for name, values in options.items() if name not in change for word in (name, *values)]
    assert main(["probe", *words, *change]) == 1
    assert message in capsys.readouterr().err


def test_labels_of_a_file_give_the_probe_that_they_describe(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every position is labelled by a token's id, which a probe of the first layer can read."""
    monkeypatch.chdir(home)
    from launch.core.wiring import read_any_traces

    _, tokenizer = load_model("lab")
    rows = [
        {"trace": trace.trace_id, "position": at, "label": int(trace.token_ids[at] % 2)}
        for trace in read_any_traces(["base"], tokenizer)
        for at in range(1, len(trace.token_ids), 5)
    ]
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = ["--max-positions", "200"]
    assert main(["probe", "--traces", "base", "--labels", "labels.jsonl", "--layers", "0", "--out", "odd", *limit]) == 0
    probe = Probe.load("odd/probe-L0.safetensors")
    judged = probe.header["held_out"]
    assert judged["low"] <= judged["auc"] <= judged["high"]
    assert judged["auc"] > 0.8
    assert judged["positions"] + probe.header["trained"]["positions"] == 200
    assert len(probe.trained_on or ()) == probe.header["trained"]["problems"], "so that early-exit knows them"
    assert sum(one["number"] for one in judged["bins"]) == judged["positions"]
    assert "labels_sha256" in probe.header
    assert Path("odd/probe-L0.svg").read_text().startswith("<svg")
