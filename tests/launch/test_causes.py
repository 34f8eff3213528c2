"""``moe-steer causes``: from traces on disk to a plan and steered answers; planted experts; what is refused; several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expert_stats import ExpertScores
from expert_stats.causes import Causes
from launch.cli.main import main
from launch.core.outcomes import loop_readings
from launch.core.wiring import read_any_traces
from moe_steer import SteeringPlan, load_model
from moe_steer.tokens import Trace
from rank_processes import ROOT, run_ranks

pytestmark = pytest.mark.slow

FAST = ["--each", "1", "--gains", "0", "4", "--routers", "free", "--coalition", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded model: 16 problems, two answers each."""
    folder = tmp_path_factory.mktemp("causes")
    assert (
        main(["generate", "--num", "16", "--samples", "2", "--max-new-tokens", "120", "--out", str(folder / "run")])
        == 0
    )
    counted = ["collect", "--traces", str(folder / "run"), "--markers", "<think>", "</think>", "--out"]
    assert main([*counted, str(folder / "counts.safetensors")]) == 0
    return folder


def test_from_traces_to_steered_answers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plan, counts = str(tmp_path / "causes.json"), str(tmp_path / "plan.json"), str(run / "counts.safetensors")
    words = [
        "causes",
        "lab",
        "--traces",
        str(run / "run"),
        "--outcome",
        "tokens",
        "--out",
        out,
        "--counts",
        counts,
        *FAST,
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "log-odds that </think> comes next, at step_end" in said
    assert "of 48 experts were selected and tested" in said
    assert "on 8 problems (the other half of the problems)" in said
    assert "agreement with nPMI: rank correlation" in said
    causes = Causes.load(out)
    assert len(causes.problems) == 16
    assert len(causes.tested_on) == 8
    assert len(causes.effects) == 4
    row = causes.ranking()[-1]
    assert row.verdict == "lowers", "with </think> at stake one expert of the lab holds it back strongly"
    assert main(["plan", "--by", "causes", out, "--top", "1", "--gain", "0", "--out", plan]) == 0
    chosen = SteeringPlan.load(plan)
    assert [(entry.layer, entry.expert, entry.gain) for entry in chosen.experts] == [(row.layer, row.expert, 0.0)]
    assert chosen.provenance["outcome"]["kind"] == "tokens"
    capsys.readouterr()
    words = ["generate", "--num", "4", "--max-new-tokens", "40", "--out", str(tmp_path / "steered"), "--plan", plan]
    assert main([*words, "--strict"]) == 0
    assert f"layer {row.layer} expert {row.expert} x0: selected by" in capsys.readouterr().out


def test_each_rival_scores_plans_and_stands_on_the_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, measures, causes = (
        str(run / "counts.safetensors"),
        str(tmp_path / "measures.safetensors"),
        str(tmp_path / "causes.json"),
    )
    traces = read_any_traces([str(run / "run")], load_model("lab")[1])
    from moe_steer.tokens import write_traces

    write_traces(tmp_path / "few.jsonl", sorted(traces, key=lambda trace: len(trace.token_ids))[:5])
    few = ["--traces", str(tmp_path / "few.jsonl")]
    assert main(["measure", "lab", *few, "--out", measures]) == 0
    assert "next: moe-steer score --by mass --measures" in capsys.readouterr().out
    assert main(["causes", "lab", *few, "--outcome", "tokens", "--out", causes, *FAST]) == 0
    files = {
        "risk": [],
        "mass": ["--measures", measures],
        "norm": ["--measures", measures],
        "influence": ["--measures", measures],
        "contrast": ["--graded", str(run / "run")],
        "causes": ["--causes", causes],
    }
    for by, given in files.items():
        scores, plan = str(tmp_path / f"{by}-scores.json"), str(tmp_path / f"{by}-plan.json")
        assert main(["score", "--by", by, "--counts", counts, "--out", scores, *given]) == 0, by
        chosen = ["plan", "--by", by, scores, "--top", "1", "--gain", "2", "--out", plan, "--min-support", "1"]
        assert main([*chosen, "--unproven"]) == 0, by
        best = next(row for row in ExpertScores.load(scores).ranking() if row.support >= (by == "risk"))
        assert [(entry.layer, entry.expert) for entry in SteeringPlan.load(plan).experts] == [(best.layer, best.expert)]
        if given:
            assert main(["score", "--by", by, "--counts", counts, "--out", scores]) == 1
            assert "moe-steer " in capsys.readouterr().err
    assert main(["plan", "--by", "mass", str(tmp_path / "norm-scores.json"), "--out", str(tmp_path / "p.json")]) == 1
    assert "holds scores by norm, not by mass: make them with 'moe-steer score --by mass'" in capsys.readouterr().err
    assert main(["plan", "--by", "luck", str(tmp_path / "norm-scores.json"), "--out", str(tmp_path / "p.json")]) == 1
    assert "write --by METHOD FILE" in capsys.readouterr().err
    assert main(["score", "--by", "risk", "--counts", counts, "--out", "x", "--measures", measures]) == 1
    assert "--measures is for --by mass or norm or influence" in capsys.readouterr().err
    assert (
        main(
            [
                "score",
                "--by",
                "mass",
                "--counts",
                counts,
                "--out",
                "x",
                "--measures",
                measures,
                "--coefficients",
                "<think>=1",
            ]
        )
        == 1
    )
    assert "--coefficients is for scores at markers, and mass is none" in capsys.readouterr().err
    assert (
        main(["score", "--by", "mass", "--counts", counts, "--out", "x", "--measures", measures, "--measure-on", "y"])
        == 1
    )
    assert "--measure-on is for --by npmi, rice or risk" in capsys.readouterr().err
    page = tmp_path / "page"
    compared = [
        "rivals",
        "--counts",
        counts,
        "--measures",
        measures,
        "--causes",
        causes,
        "--top",
        "3",
        "--out",
        str(page),
    ]
    assert main(compared) == 0
    said = capsys.readouterr().out
    assert "left out: --by contrast reads which answers are right: give --graded" in said
    html, markdown = ((page / f"rivals.{kind}").read_text() for kind in ("html", "md"))
    assert html.count("<img ") == 10, "agreement, causes against npmi and rice, a heat map a method"
    assert "http" not in html.replace("http-equiv", "").split("<style>")[0], "it loads nothing"
    assert "## Rank correlation" in markdown
    assert "| causes |" in markdown
    assert main(["rivals", "--counts", counts, "--by", "npmi", "contrast", "--out", str(page)]) == 1
    assert "--by contrast reads which answers are right" in capsys.readouterr().err


def test_every_outcome_runs_and_names_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Alice has 3 apples.\n\nBob has 12 pears and 4 plums.\nWhat is 5 + 6?\n")
    traces = read_any_traces([str(run / "run")], load_model("lab")[1])
    from moe_steer.tokens import write_traces

    first = [trace for trace in traces if trace.trace_id.endswith("#0")]
    write_traces(tmp_path / "right.jsonl", first)
    write_traces(tmp_path / "wrong.jsonl", [trace for trace in traces if trace.trace_id.endswith("#1")])
    write_traces(tmp_path / "loops.jsonl", [_looping(trace) for trace in first[:3]])
    right = ["--traces", str(tmp_path / "right.jsonl"), "--against", str(tmp_path / "wrong.jsonl")]
    cases = {
        "right-wrong": (right, "log p(right trace) - log p(wrong trace)", "higher"),
        "loss": (["--texts", str(texts)], "loss of the texts", "lower"),
        "loop": (["--traces", str(tmp_path / "loops.jsonl")], "log-odds that a loop goes on", "lower"),
    }
    for outcome, (source, words, wanted) in cases.items():
        out = tmp_path / f"{outcome}.json"
        assert main(["causes", "lab", "--outcome", outcome, "--out", str(out), *source, *FAST]) == 0, outcome
        assert words in capsys.readouterr().out
        causes = Causes.load(out)
        assert causes.wanted == wanted
        assert len(causes.problems) == {"right-wrong": 16, "loss": 3, "loop": 3}[outcome]
    assert Causes.load(tmp_path / "loss.json").value_P.min() > 0


def _looping(trace: Trace) -> Trace:
    ids = (
        trace.token_ids[: trace.prompt_length + 20]
        + trace.token_ids[trace.prompt_length + 14 : trace.prompt_length + 20] * 6
    )
    return Trace(trace.trace_id, ids, trace.prompt_length, trace.thought_start)


def test_a_loop_is_read_where_it_repeats() -> None:
    (found,) = loop_readings([Trace("a#0", tuple([9] * 5 + [1, 2, 3] * 12), 2)])
    assert found.problem == "a"
    assert found.odds
    assert found.at == tuple(range(5 + 3 - 1, 5 + 36 - 1))
    assert [one[0] for one in found.tokens] == [([1, 2, 3] * 12)[place - 5 + 1] for place in found.at]
    with pytest.raises(ValueError, match="end in no loop"):
        loop_readings([Trace("a#0", tuple(range(40)), 2)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--outcome", "tokens"], "--outcome tokens is read from --traces"),
        (["--outcome", "loss", "--traces", "x"], "--outcome loss is read from --texts"),
        (["--outcome", "loop", "--traces", "x", "--tokens", "Wait"], "--tokens is for --outcome tokens"),
        (["--outcome", "loop", "--traces", "x", "--against", "y"], "--against is for --outcome right-wrong"),
        (["--outcome", "loop", "--traces", "x", "--gains", "1"], "other than 1, which changes nothing"),
        (["--outcome", "loop", "--traces", "x", "--scores", "s", "--counts", "c"], "give one"),
        (["--outcome", "loop", "--traces", "x", "--no-thinking"], "--no-thinking is for prompts"),
        (["--outcome", "right-wrong", "--traces", "x.jsonl"], "x.jsonl is no folder of a run"),
    ],
)  # fmt: skip
def test_what_would_not_be_followed_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["causes", "lab", *words, "--out", str(tmp_path / "c.json")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_dense_model_and_other_files_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\nand another\n")
    out = str(tmp_path / "c.json")
    assert main(["causes", "lab-dense", "--outcome", "loss", "--texts", str(texts), "--out", out]) == 1
    assert "dense model" in capsys.readouterr().err
    (tmp_path / "c.json").write_text('{"kind": "scores"}')
    for words, message in (
        (["causes", out], "holds no expert scores"),
        (["reap", out], "write --by METHOD FILE"),
        (["causes", str(tmp_path / "none.json")], "there are no causes at"),
    ):
        assert main(["plan", "--by", *words, "--out", str(tmp_path / "p.json")]) == 1
        assert message in capsys.readouterr().err


def test_backends_over_two_ranks_find_the_same(tmp_path: Path) -> None:
    few = ["generate", "--num", "6", "--max-new-tokens", "60", "--out", str(tmp_path / "run")]
    assert main(few) == 0
    words = [
        "causes",
        "lab",
        "--outcome",
        "tokens",
        "--traces",
        str(tmp_path / "run"),
        "--tokens-per-batch",
        "300",
        *FAST,
    ]
    assert main([*words, "--out", str(tmp_path / "one.json")]) == 0
    one = Causes.load(tmp_path / "one.json")
    for backend in ("plain", "zero3", "autoep", "tp_ep"):
        done = run_ranks(
            ROOT / "launch" / "cli" / "main.py",
            2,
            [*words, "--out", str(tmp_path / "two.json"), "--backend", backend],
            200,
        )
        assert done.codes == [0, 0], done.text[-3000:]
        assert done.text.count("were selected and tested") == 1, "rank 0 alone talks"
        two = Causes.load(tmp_path / "two.json")
        np.testing.assert_allclose(two.gradient_PLE, one.gradient_PLE, rtol=1e-3, atol=1e-4, err_msg=backend)
        np.testing.assert_array_equal(two.selected_LE, one.selected_LE, err_msg=backend)
        assert [item.experts for item in two.effects] == [item.experts for item in one.effects]
        np.testing.assert_allclose(
            [item.effect for item in two.effects], [item.effect for item in one.effects], rtol=1e-3
        )
