"""From the user's command to the user's numbers, for every way of thinking: published templates, texts as the models write them.

A server on this machine answers four problems: with a closed thought and the right answer; cut by the limit inside a thought that
already states the right answer; with a closed thought and a wrong answer; and by ending itself inside its thought.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main
from launch.core.prompt_options import PromptOptions, ask_prompts
from local_endpoint import Handler, serving
from published_templates import FOLDER, byte_tokenizer, needs_templates
from reasoning_evals import render_prompt
from reasoning_evals.runs import read_generations, read_grades, read_run

RIGHT, WRONG = "\\boxed{4}", "\\boxed{5}"
# (template, end of the prompt, opening text that the model writes, text between thought and answer, text after the answer)
MODELS = [
    ("llama-cpp-deepseek-r1", "<think>\n", "", "\n</think>\n\n", ""),
    ("deepseek-ai-DeepSeek-V3.1", "<think>", "", "</think>", ""),
    ("Qwen-Qwen3-0.6B", "assistant\n", "<think>\n", "\n</think>\n\n", ""),
    (
        "openai-gpt-oss-120b",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "",
    ),
    ("mistralai-Ministral-3-14B-Reasoning-2512", "[/INST]", "[THINK]", "[/THINK]", ""),
    ("google-gemma-4-31B-it-interleaved", "model\n", "<|channel>thought\n", "<channel|>", ""),
    (
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
        "<|CHATBOT_TOKEN|>",
        "<|START_THINKING|>",
        "<|END_THINKING|><|START_RESPONSE|>",
        "<|END_RESPONSE|>",
    ),
    ("Apriel-1.6-15b-Thinker-fixed", "Here are my reasoning steps:\n", "", "\n[BEGIN FINAL RESPONSE]\n", ""),
]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def model_folder(folder: Path, template: str) -> Path:
    """A tokenizer with a published template, as a user's folder holds it."""
    tokenizer = byte_tokenizer(template=(FOLDER / f"{template}.jinja").read_text(encoding="utf-8"))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


def problems_file(folder: Path) -> Path:
    path = folder / "sums.jsonl"
    rows = [
        {"problem_id": f"p{n}", "prompt": f"Case {n}: what is 2 + 2?", "target": "4", "answer_type": "integer"}
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def server_of(opening: str, between: str, end: str) -> Any:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        number = int(re.findall(r"Case (\d)", body["prompt"])[-1])
        thought = f"{opening}So it is {RIGHT}. Wait"
        text, finish = {
            0: (f"{thought}{between}The answer is {RIGHT}.{end}", "stop"),
            1: (thought, "length"),
            2: (f"{thought}{between}The answer is {WRONG}.{end}", "stop"),
            3: (thought, "stop"),
        }[number]
        handler.start()
        handler.event(text, finish)
        handler.write(b"data: [DONE]\n\n")

    return say


@needs_templates
@pytest.mark.parametrize(("template", "ends", "opening", "between", "end"), MODELS, ids=lambda value: str(value)[:24])
def test_generate_grade_and_count(
    template: str, ends: str, opening: str, between: str, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = model_folder(tmp_path / "model", template), tmp_path / "run"
    with serving(server_of(opening, between, end)) as server:
        command = ["generate", "--endpoint", server.url, "--model", "m", "--tokenizer", str(model), "--problems"]
        code = main([*command, str(problems_file(tmp_path)), "--max-new-tokens", "99", "--out", str(out)])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        assert all(body["prompt"].endswith(ends) for body in server.bodies)
    assert shown.out.startswith("thoughts between ")
    grades = {row.problem_id: row for row in read_grades(out)}
    assert {name: row.outcome for name, row in grades.items()} == {
        "p0": "correct", "p1": "truncated", "p2": "wrong", "p3": "unclosed",
    }  # fmt: skip
    assert {row.state for row in (grades["p0"], grades["p2"])} == {"closed"}
    thought = len(f"So it is {RIGHT}. Wait")
    for row in grades.values():
        assert row.thinking_tokens is not None
        assert thought <= row.thinking_tokens <= thought + 2, (
            "one token a byte, with the line ends that belong to the tags"
        )
    assert grades["p0"].answer_tokens is not None
    assert grades["p0"].answer_tokens >= len(f"The answer is {RIGHT}.")
    assert grades["p1"].answer_tokens == 0
    assert "1 correct (25.0%), 1 cut by the token limit" in shown.out
    assert "1 of 4 responses ended by themselves inside a thought that never closes" in shown.out
    assert read_run(out)["config"]["arms"]["baseline"]["sampler"]["thinking"]["name"] != "none"
    assert len(list(read_generations(out))) == 4


@needs_templates
def test_a_model_that_does_not_think_is_graded_on_all_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        number = int(re.findall(r"Case (\d)", body["prompt"])[-1])
        handler.start()
        handler.event(["2 + 2 = 4\n\\boxed{4}", "It is 4", "First, 2 + 2 is", "<think>maybe \\boxed{4}"][number],
                      ["stop", "stop", "length", "length"][number])  # fmt: skip
        handler.write(b"data: [DONE]\n\n")

    model, out = model_folder(tmp_path / "model", "Qwen-Qwen2.5-7B-Instruct"), tmp_path / "run"
    with serving(say) as server:
        command = ["generate", "--endpoint", server.url, "--model", "m", "--tokenizer", str(model), "--problems"]
        assert main([*command, str(problems_file(tmp_path)), "--max-new-tokens", "99", "--out", str(out)]) == 0
        assert all(body["prompt"].endswith("<|im_start|>assistant\n") for body in server.bodies)
    grades = {row.problem_id: row for row in read_grades(out)}
    # A known opening tag in the text is read as one, whatever the template said of the model.
    assert {name: row.outcome for name, row in grades.items()} == {
        "p0": "correct", "p1": "correct", "p2": "cut", "p3": "truncated",
    }  # fmt: skip
    assert [grades[f"p{n}"].thinking_tokens for n in range(3)] == [0, 0, 0]
    assert "2 correct (50.0%), 2 cut by the token limit" in capsys.readouterr().out
    other = shutil.copytree(out, tmp_path / "other")
    assert main(["compare", "--baseline", str(out), "--arm-folder", str(other)]) == 0
    said = capsys.readouterr().out
    assert said.count("50.0% correct") == said.count("25.0% never closed their thought") == 2
    assert said.count("1 of 4 responses were cut by the token limit before they gave an answer") == 2


@needs_templates
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--thinking", "nonsense"], "the thinking format 'nonsense' is unknown: give one of think, harmony"),
        (["--template-arg", "colour=1"], "--template-arg colour: this chat template does not read it"),
        (["--template-arg", "colour"], "--template-arg 'colour': write NAME=VALUE"),
        (["--effort", "high"], "--effort 'high': this chat template reads none of"),
        (["--chat-template", "nowhere.jinja"], "--chat-template 'nowhere.jinja' cannot be read"),
        (
            ["--chat-template", "/dev/null"],
            "--chat-template '/dev/null' holds no words: give a file with a Jinja template",
        ),
    ],
)
def test_what_a_template_would_not_follow_is_refused(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(tmp_path / "model", "Qwen-Qwen3-0.6B")
    command = ["generate", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--tokenizer", str(model)]
    assert main([*command, "--problems", str(problems_file(tmp_path)), "--out", str(tmp_path / "run"), *options]) == 1
    shown = capsys.readouterr().err
    assert text in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_template_file_of_another_editor(tmp_path: Path) -> None:
    """A byte order mark would be the first character of every prompt, and UTF-16 is no text."""
    template, file = "{{ messages[0].content }}:", tmp_path / "t.jinja"
    asked = PromptOptions(chat_template=str(file))
    file.write_bytes(b"\xef\xbb\xbf" + template.encode())
    ask_prompts(tokenizer := byte_tokenizer([]), asked)
    assert render_prompt(tokenizer, "2?").text == "2?:"
    file.write_bytes(template.encode("utf-16-le"))
    with pytest.raises(ValueError, match="t.jinja' holds characters 0, as UTF-16 has: save it in UTF-8"):
        ask_prompts(byte_tokenizer([]), asked)
