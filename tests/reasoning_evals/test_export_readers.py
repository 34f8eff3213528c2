"""Exports opened by the tools they are made for: Inspect's log readers and the code of lm-evaluation-harness.

Each part runs where its package is installed; neither is needed by the project itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.json import ReadOptions, read_json

from reasoning_evals.engines.sampling import SamplingConfig
from reasoning_evals.exports import export_inspect, export_lm_eval, export_parquet
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs.grading_pass import GradeRow, grade_run
from reasoning_evals.runs.run import Arm, run_arms
from scripted_sampler import ScriptedSampler, arms, problems

HOSTILE = "</textarea><script>alert(1)</script>\ud800\u2028\x00\x1b[31m"


class Hostile(ScriptedSampler):
    """Half a surrogate pair, control characters and markup in every answer."""

    def sample(self, requests, config):  # type: ignore[no-untyped-def]
        for sample in super().sample(requests, config):
            yield type(sample)(sample.key, sample.token_ids, HOSTILE + sample.text, sample.finish_reason)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read") / "run"
    all_arms = [*arms(), Arm("hostile arm/1", Hostile(0.4))]
    run_arms(all_arms, problems(6), folder, 3, SamplingConfig(batch_size=8, top_k=5), seed=7, task="demo")
    return folder


@pytest.fixture(scope="module")
def grades(run_folder: Path) -> list[GradeRow]:
    return grade_run(run_folder)


def test_thoughts_are_told_apart_as_in_grading(tmp_path: Path) -> None:
    """An arm whose prompt goes on after ``<think>``: only its details say that the completion starts inside the thought."""

    def render(question: str) -> RenderedPrompt:
        text = f"{question}<think>\nOkay, I will be brief."
        return RenderedPrompt(text, tuple(text.encode()))

    arm = Arm("briefly", ScriptedSampler(1.0), details={"prompt_opens_thought": True}, render=render)
    run_arms([arm], problems(2), tmp_path / "run", 2, SamplingConfig(), seed=7, task="demo")
    datasets = pytest.importorskip("datasets")
    path = export_parquet(tmp_path / "run", tmp_path / "x.parquet")
    table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert all(row["thought"].startswith("hm ") for row in table)
    assert {row["state"] for row in table} <= {"closed", "truncated"}


def test_any_way_to_split_lines_gives_the_samples(run_folder: Path, tmp_path: Path) -> None:
    """``str.splitlines`` also splits at U+2028 and its like, which models do write."""
    for path in export_lm_eval(run_folder, tmp_path)[::2]:
        text = path.read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.splitlines()] == [json.loads(line) for line in text.split("\n")[:-1]]
    lines = (run_folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 * 6 * 3
    assert all("\u2028" in json.loads(line)["text"] for line in lines if json.loads(line)["finish_reason"] == "stop")


# --- Inspect -------------------------------------------------------------------------------------------------------------


def test_inspect_reads_every_log(run_folder: Path, grades: list[GradeRow], tmp_path: Path) -> None:
    logs = pytest.importorskip("inspect_ai.log", reason="inspect-ai, an extra, is not installed")
    paths = export_inspect(run_folder, tmp_path)
    assert [path.name for path in paths] == ["demo_baseline.eval", "demo_steered.eval", "demo_hostile_arm_1.eval"]
    assert {Path(info.name).name for info in logs.list_eval_logs(str(tmp_path))} == {path.name for path in paths}
    for path, arm in zip(paths, ("baseline", "steered", "hostile arm/1"), strict=True):
        mine = {(row.problem_id, row.sample_idx + 1): row for row in grades if row.arm == arm}
        header = logs.read_eval_log(str(path), header_only=True)
        assert (header.status, header.version, header.eval.task) == ("success", 2, "demo")
        assert header.eval.metadata["arm"] == arm
        accuracy = header.results.scores[0].metrics["accuracy"].value
        assert accuracy == pytest.approx(sum(row.correct for row in mine.values()) / len(mine))
        assert header.results.completed_samples == len(mine)
        summaries = logs.read_eval_log_sample_summaries(str(path))
        assert {(one.id, one.epoch) for one in summaries} == set(mine)
        for sample in logs.read_eval_log_samples(str(path)):
            row = mine[str(sample.id), sample.epoch]
            score = sample.scores["reasoning_evals"]
            assert (score.value, score.metadata["outcome"]) == ("C" if row.correct else "I", row.outcome)
            assert score.answer == row.extracted
            reasoning = sample.output.message.content[0].reasoning
            assert ("alert(1)" in reasoning) == (arm == "hostile arm/1")
            assert sample.output.usage.reasoning_tokens == row.thinking_tokens


def test_inspects_own_metrics_agree_with_the_logs(run_folder: Path, tmp_path: Path) -> None:
    """Inspect scores the log anew from its samples and comes to the accuracy that was written."""
    logs = pytest.importorskip("inspect_ai.log", reason="inspect-ai, an extra, is not installed")
    from inspect_ai.scorer import accuracy, mean_score, value_to_float

    for path in export_inspect(run_folder, tmp_path):
        log = logs.read_eval_log(str(path))
        reduce, as_float = mean_score(), value_to_float()
        by_problem: dict[str, list[Any]] = {}
        for sample in log.samples:
            by_problem.setdefault(str(sample.id), []).append(sample.scores["reasoning_evals"])
        reduced = [SimpleNamespace(score=reduce(scores), scorer="reasoning_evals") for scores in by_problem.values()]
        for one in reduced:
            one.score.value = as_float(one.score.value)
        written = log.results.scores[0].metrics["accuracy"].value
        assert accuracy()(reduced) == pytest.approx(written)


def test_inspects_tables_hold_a_row_a_sample(run_folder: Path, tmp_path: Path) -> None:
    analysis = pytest.importorskip("inspect_ai.analysis", reason="inspect-ai, an extra, is not installed")
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    export_inspect(run_folder, tmp_path)
    assert len(analysis.evals_df(str(tmp_path))) == 3
    assert len(analysis.samples_df(str(tmp_path))) == 3 * 6 * 3


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------------


def test_lm_evals_table_shows_the_results(run_folder: Path, grades: list[GradeRow], tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    for path, arm in zip(
        export_lm_eval(run_folder, tmp_path)[1::2], ("baseline", "steered", "hostile arm/1"), strict=True
    ):
        table = utils.make_table(json.loads(path.read_text()))
        mean = sum(row.correct for row in grades if row.arm == arm) / 18
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "@3" in line]
        assert [(row[4], row[5], row[2]) for row in rows] == [
            (f"{name}@3", "↑", "none") for name in ("avg", "maj", "pass")
        ]
        assert rows[0][:2] == ["demo", "1"]
        assert float(rows[0][6]) == pytest.approx(mean, abs=1e-4)
        assert all(float(row[8]) >= 0 for row in rows)


def test_samples_follow_lm_evals_schema(run_folder: Path, tmp_path: Path) -> None:
    schema = pytest.importorskip("lm_eval.result_schema", reason="lm-eval is not installed, or has no schema yet")
    pydantic = pytest.importorskip("pydantic")
    checker = pydantic.TypeAdapter(schema.SampleResult)
    for path in export_lm_eval(run_folder, tmp_path)[::2]:
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            assert checker.validate_python(sample, strict=True) == sample
    results = json.loads(export_lm_eval(run_folder, tmp_path)[1].read_text())
    assert set(results) <= set(schema.EvalResults.__annotations__)
    assert set(schema._TaskMetrics.__annotations__) - {"sample_count"} <= set(results["results"]["demo"])


def test_results_are_a_table_to_what_lm_eval_reads_with(run_folder: Path, tmp_path: Path) -> None:
    """A model's thinking tokens are lists of lists, numbers and truths, which are no column."""
    path = export_lm_eval(run_folder, tmp_path)[1]
    table = read_json(path, read_options=ReadOptions(block_size=path.stat().st_size))
    (config,) = table["config"].to_pylist()
    assert json.loads(config["model_args"]["thinking_tokens"]["forms"])[0][1:] == [1, False]


def test_lm_evals_tracker_finds_and_loads_the_files(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one place where lm-eval reads its files again: the card of a data set of results, here from a folder."""
    loggers = pytest.importorskip("lm_eval.loggers", reason="lm-eval is not installed")
    import datasets
    import huggingface_hub

    paths = export_lm_eval(run_folder, tmp_path / "out")
    cards = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_url", lambda repo_id, filename, repo_type: str(tmp_path / "out" / filename)
    )
    monkeypatch.setattr(huggingface_hub.DatasetCard, "push_to_hub", lambda card, *_, **__: cards.append(card))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tracker = loggers.EvaluationTracker(output_path=str(tmp_path / "unused"))
    names = [str(path.relative_to(tmp_path / "out")) for path in paths]
    tracker.api = SimpleNamespace(list_repo_files=lambda **_: names)
    tracker.public_repo, tracker.details_repo = True, "nobody/results"
    tracker.general_config_tracker.model_source = "script"
    tracker.general_config_tracker.model_name = "scripted"
    tracker.recreate_metadata_card()
    (card,) = cards
    configs = {config["config_name"] for config in card.data.to_dict()["configs"]}
    arms_of = {"baseline", "steered", "hostile_arm_1"}
    assert {f"{arm}__demo" for arm in arms_of} <= configs  # lm-eval 0.4.13 does not match its own results files by date
    assert '"avg@3,none"' in card.content
