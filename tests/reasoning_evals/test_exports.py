"""Exports, read back by the tools that are meant to read them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest

from reasoning_evals.comparing.statistics import mean_estimate
from reasoning_evals.engines.sampling import SamplingConfig
from reasoning_evals.exports import export_inspect, export_lm_eval, export_parquet
from reasoning_evals.exports.graded_run import clean, file_name
from reasoning_evals.problems import Problem
from reasoning_evals.runs.grading_pass import GradeRow, grade_run
from reasoning_evals.runs.run import Arm, run_arms
from reasoning_evals.runs.run_folder import read_generations
from scripted_sampler import ScriptedSampler, arms, problems

PARTS = {
    "log": "EvalConfig EvalDataset EvalLog EvalMetric EvalResults EvalSample EvalScore EvalSpec",
    "model": "ChatCompletionChoice ChatMessageAssistant ChatMessageUser ContentReasoning ContentText GenerateConfig "
    "ModelOutput ModelUsage",
    "scorer": "Score",
}
LINE_KEYS = [
    "doc_id",
    "doc",
    "target",
    "arguments",
    "resps",
    "filtered_resps",
    "filter",
    "metrics",
    "doc_hash",
    "prompt_hash",
    "target_hash",
    "avg@3",
    "pass@3",
    "maj@3",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "run"
    run_arms(arms(), problems(6), folder, 3, SamplingConfig(batch_size=8, top_k=5), seed=7, task="demo")
    return folder


@pytest.fixture(scope="module")
def grades(run_folder: Path) -> list[GradeRow]:
    return grade_run(run_folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_lm_eval_samples_field_by_field(run_folder: Path, grades: list[GradeRow], tmp_path: Path) -> None:
    paths = export_lm_eval(run_folder, tmp_path / "out")
    assert [path.parent.name for path in paths] == ["baseline", "baseline", "steered", "steered"]
    assert paths[0].name.startswith("samples_demo_20")
    assert paths[0].stem.split("_")[-1] == paths[1].stem.split("_")[-1]
    assert ":" not in paths[0].name
    generated = {(c.arm, c.problem_id, c.sample_idx): c for c in read_generations(run_folder)}
    for arm, path in (("baseline", paths[0]), ("steered", paths[2])):
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        assert [line["doc_id"] for line in lines] == list(range(6))
        for i, line in enumerate(lines):
            assert list(line) == LINE_KEYS
            mine = [row for row in grades if (row.arm, row.problem_id) == (arm, f"p{i}")]
            correct = [row.correct for row in mine]
            assert line["doc"] == problems(6)[i].to_dict()
            assert line["target"] == str(i)
            prompt = generated[arm, f"p{i}", 0].prompt
            settings = {"do_sample": True, "max_gen_toks": 32768, "temperature": 0.6, "top_p": 0.95, "top_k": 5}
            assert line["arguments"] == {"gen_args_0": {"arg_0": prompt, "arg_1": settings}}
            assert line["resps"] == [[generated[arm, f"p{i}", j].text for j in range(3)]]
            assert line["filtered_resps"] == [[row.extracted or "[invalid]" for row in mine]]
            assert (line["filter"], line["metrics"]) == ("none", ["avg@3", "pass@3", "maj@3"])
            assert line["doc_hash"] == sha256(json.dumps(line["doc"], indent=2, ensure_ascii=False))
            assert line["prompt_hash"] == sha256(prompt)
            assert line["target_hash"] == sha256(str(i))
            assert line["avg@3"] == sum(correct) / 3
            assert line["pass@3"] == float(any(correct))
            assert 0 <= line["maj@3"] <= 1


def test_lm_eval_results(run_folder: Path, grades: list[GradeRow], tmp_path: Path) -> None:
    paths = export_lm_eval(run_folder, tmp_path)
    results = json.loads(paths[3].read_text())
    means = [
        sum(row.correct for row in grades if (row.arm, row.problem_id) == ("steered", f"p{i}")) / 3 for i in range(6)
    ]
    numbers = results["results"]["demo"]
    assert numbers["avg@3,none"] == pytest.approx(sum(means) / 6)
    assert numbers["avg@3_stderr,none"] == pytest.approx(mean_estimate(means).se)
    assert (numbers.pop("name"), numbers.pop("sample_len")) == ("demo", 6)
    assert set(numbers) == {"alias"} | {f"{m}@3{e},none" for m in ("avg", "pass", "maj") for e in ("", "_stderr")}
    assert results["versions"] == {"demo": 1}
    assert results["n-shot"] == {"demo": 0}
    assert results["n-samples"] == {"demo": {"original": 6, "effective": 6}}
    assert results["higher_is_better"]["demo"]["avg@3"] is True
    assert results["config"]["model"] == "script"
    assert results["config"]["arm_details"] == {"plan": "abc"}
    assert results["configs"]["demo"]["repeats"] == 3
    lines = [json.loads(line) for line in paths[2].read_text().split("\n")[:-1]]
    hashes = "".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)
    assert results["task_hashes"] == {"demo": sha256(hashes)}


def test_lm_eval_files_load_and_are_the_same_twice(run_folder: Path, tmp_path: Path) -> None:
    first, second = export_lm_eval(run_folder, tmp_path / "a"), export_lm_eval(run_folder, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    table = datasets.Dataset.from_json(str(first[0]))
    assert table.column_names == LINE_KEYS
    assert len(table) == 6
    assert table[0]["resps"][0][0].startswith("hm ")


def test_one_problem_has_no_standard_error_and_clusters_count(tmp_path: Path) -> None:
    def results(name: str, ids: list[str | None]) -> dict[str, object]:
        asked = [Problem(f"p{i}", f"what is {i}?", str(i), "integer", cluster_id=one) for i, one in enumerate(ids)]
        run_arms(
            [Arm("baseline", ScriptedSampler())], asked, tmp_path / name, 2, SamplingConfig(greedy=True), 1, task="t"
        )
        found: dict[str, object] = json.loads(export_lm_eval(tmp_path / name, tmp_path / f"{name}_out")[1].read_text())
        return found["results"]["t"]  # type: ignore[index, no-any-return]

    assert results("one", [None])["avg@2_stderr,none"] == "N/A"
    assert results("shared", ["a", "a", "b", "b"]) != results("apart", [None] * 4)


def test_parquet_is_read_by_datasets(run_folder: Path, grades: list[GradeRow], tmp_path: Path) -> None:
    path = export_parquet(run_folder, tmp_path / "new" / "samples.parquet")
    table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 36
    generated = {(c.arm, c.problem_id, c.sample_idx): c for c in read_generations(run_folder)}
    for row, grade in zip(table, grades, strict=True):
        completion = generated[row["arm"], row["problem_id"], row["sample_idx"]]
        for name, value in grade.to_dict().items():
            assert row[name] == value
        assert row["text"] == completion.text
        assert tuple(row["token_ids"]) == completion.token_ids
        assert (row["seed"], row["prompt"], row["correct"]) == (completion.seed, completion.prompt, grade.correct)
        assert (row["answer"] == "") == (row["state"] == "truncated")
        assert row["thought"].startswith("hm ")
    assert table.features["unit"].dtype == "string", "a column without a value has its type"
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.parquet"]


def test_broken_text_is_exported(tmp_path: Path) -> None:
    class Broken(ScriptedSampler):
        def sample(self, requests, config):  # type: ignore[no-untyped-def]
            for sample in super().sample(requests, config):
                yield type(sample)(sample.key, sample.token_ids, "\ud800 \u2028</think>x", sample.finish_reason)

    run_arms([Arm("a/b: c", Broken())], problems(2), tmp_path / "run", 1, SamplingConfig(), seed=1, task="my task/1")
    path = export_parquet(tmp_path / "run", tmp_path / "x.parquet")
    table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert table[0]["text"] == "\ufffd \u2028</think>x"
    paths = export_lm_eval(tmp_path / "run", tmp_path / "lm")
    assert paths[0].parent.name == "a_b_c"
    assert paths[0].name.startswith("samples_my_task_1_")
    assert len(datasets.Dataset.from_json(str(paths[0]))) == 2


def test_arms_with_like_names_do_not_overwrite_each_other(tmp_path: Path) -> None:
    both = [Arm("gain 8", ScriptedSampler(0.1)), Arm("gain/8", ScriptedSampler(0.9)), Arm("Gain_8", ScriptedSampler())]
    run_arms(both, problems(2), tmp_path / "run", 1, SamplingConfig(), seed=1, task="t")
    paths = export_lm_eval(tmp_path / "run", tmp_path / "lm")
    assert [path.parent.name for path in paths[::2]] == ["gain_8", "gain_8-2", "Gain_8-3"]
    assert len({path.resolve() for path in paths}) == 6


def test_missing_samples_are_an_error(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    lines = (tmp_path / "run" / "generations.jsonl").read_bytes().split(b"\n")
    (tmp_path / "run" / "generations.jsonl").write_bytes(b"\n".join(lines[:-2]) + b"\n")
    for export in (export_lm_eval, export_parquet):
        with pytest.raises(ValueError, match="has 35 of 36 samples"):
            export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("task", "name"), [("gpqa_diamond_physics", "q"), ("renamed", "gpqa-rec1")])
def test_questions_that_must_not_be_published_stay(task: str, name: str, tmp_path: Path) -> None:
    asked = [Problem(name, "what is 1?", "1", "integer")]
    run_arms([Arm("baseline", ScriptedSampler())], asked, tmp_path / "run", 1, SamplingConfig(), seed=1, task=task)
    with pytest.raises(ValueError, match=r"questions of gpqa_diamond\w* are not to be published"):
        export_parquet(tmp_path / "run", tmp_path / "x.parquet")
    assert export_parquet(tmp_path / "run", tmp_path / "x.parquet", private=True).exists()


def test_only_lone_surrogates_are_replaced() -> None:
    assert clean("a\ud83d\ude00 \udc00b é\U0001f600") == "a\U0001f600 \ufffdb é\U0001f600"


def test_file_names() -> None:
    assert [file_name(text) for text in ("a b/c", "..", "é.x", "")] == ["a_b_c", "_", "é.x", "_"]


@pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is not None, reason="inspect-ai is installed")
def test_inspect_absent_is_one_line(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an Inspect log needs the package inspect-ai .*: pip install inspect-ai"):
        export_inspect(run_folder, tmp_path)


class Recorded(dict[str, Any]):
    """Takes any keywords, as the record classes of Inspect do."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def test_what_an_inspect_log_is_made_of(
    run_folder: Path, grades: list[GradeRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[Any, str, str]] = []
    stand_ins = {name: types.ModuleType(name) for name in ("inspect_ai", *map("inspect_ai.{}".format, PARTS))}
    for part, names in PARTS.items():
        for name in names.split():
            setattr(stand_ins[f"inspect_ai.{part}"], name, type(name, (Recorded,), {}))
        setattr(stand_ins["inspect_ai"], part, stand_ins[f"inspect_ai.{part}"])
    write = lambda log, location, format: written.append((log, location, format))  # noqa: E731
    monkeypatch.setattr(stand_ins["inspect_ai.log"], "write_eval_log", write, raising=False)
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert [path.name for path in export_inspect(run_folder, tmp_path)] == ["demo_baseline.eval", "demo_steered.eval"]
    log, location, kind = written[1]
    assert (Path(location).name, kind, log.version, log.status) == ("demo_steered.eval", "eval", 2, "success")
    mine = [row for row in grades if row.arm == "steered"]
    assert [(one.id, one.epoch) for one in log.samples] == [(row.problem_id, row.sample_idx + 1) for row in mine]
    assert [one.scores["reasoning_evals"].value for one in log.samples] == ["C" if row.correct else "I" for row in mine]
    assert [one.output.choices[0].stop_reason for one in log.samples] == [
        "stop" if row.finish_reason == "stop" else "max_tokens" for row in mine
    ]
    first = log.samples[0].messages[1].content
    assert type(first[0]).__name__ == "ContentReasoning"
    assert first[0].reasoning.startswith("hm ")
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(sum(row.correct for row in mine) / 18)
    assert log.eval.model_generate_config == {"max_tokens": 32768, "temperature": 0.6, "top_p": 0.95, "top_k": 5}


@pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect-ai, an extra, is not installed")
def test_inspect_log_is_read_by_inspect(run_folder: Path, grades: list[GradeRow], tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log

    paths = export_inspect(run_folder, tmp_path)
    assert [path.name for path in paths] == ["demo_baseline.eval", "demo_steered.eval"]
    log = read_eval_log(str(paths[1]))
    assert (log.version, log.status, log.eval.task, log.eval.config.epochs) == (2, "success", "demo", 3)
    assert log.samples is not None
    assert log.results is not None
    mine = {(row.problem_id, row.sample_idx + 1): row for row in grades if row.arm == "steered"}
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(
        sum(row.correct for row in mine.values()) / 18
    )
    assert {(sample.id, sample.epoch) for sample in log.samples} == set(mine)
    for sample in log.samples:
        row = mine[str(sample.id), sample.epoch]
        assert sample.scores is not None
        assert sample.scores["reasoning_evals"].value == ("C" if row.correct else "I")
        content = sample.output.message.content
        assert isinstance(content, list)
        assert content[0].type == "reasoning"
        assert sample.output.stop_reason == ("stop" if row.finish_reason == "stop" else "max_tokens")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (("sampling", "top_k"), "does not say the top_k of its sampling: restore the file"),
        (("arms", "steered", "details"), "does not say the details of arm 'steered': restore the file"),
        (("arms", "steered", "sampler"), "does not say the sampler of arm 'steered': restore the file"),
    ],
)
def test_a_run_json_that_lost_a_key_is_refused(
    run_folder: Path, tmp_path: Path, lost: tuple[str, ...], said: str
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    run = json.loads(path.read_text())
    place = run["config"]
    for key in lost[:-1]:
        place = place[key]
    del place[lost[-1]]
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=said):
        export_lm_eval(tmp_path / "run", tmp_path / "out")
