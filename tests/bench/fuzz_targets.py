"""What the fuzzer breaks: an example of every format of text, and how it is read. ``fuzz_models`` has those with numbers in them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz import Target
from fuzz_judge import Judge, Rules, anything, csv_judge, json_judge, lines_judge
from fuzz_models import model_targets
from fuzz_mutations import Mutate, mutate_bytes, mutate_csv, mutate_json, mutate_lines
from fuzz_runs import run, run_targets

NONE = type(None)


def build_targets(home: Path, jobs: bool = True) -> list[Target]:
    """All of them, their examples written below a folder. ``jobs``: folders of jobs too, which are run for it."""
    return [
        *_plans(home), *_records(home), *_problems(home), *_pairs(home), *run_targets(home, jobs), *_replies(home), *_prompts(home),
        *_recipes(home), *model_targets(home),
    ]  # fmt: skip


def at(home: Path, name: str, files: dict[str, str | bytes]) -> Path:
    """A folder with these files."""
    folder = home / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def _plans(home: Path) -> list[Target]:
    from moe_steer import SteeringPlan
    from moe_steer.direction import Direction

    plan = {
        "version": 1,
        "model": {"model_type": "deepseek_v3", "num_layers": 4, "num_experts": 8, "name": "lab"},
        "experts": [{"layer": 1, "expert": 3, "gain": 64.0}, {"layer": 2, "expert": 0, "gain": 0.5}],
        "residual": [{"layer": 2, "file": "d.safetensors", "strength": 1.0, "scope": "all", "unit": "vector"}],
        "scope": "all",
        "renormalize": False,
        "provenance": {"by": "hand", "when": [1, 2]},
    }
    optional = {"model", "experts", "residual", "scope", "renormalize", "provenance", "strength", "unit", "name"}
    rules = Rules(
        optional=frozenset({*optional, "model_type", "num_layers", "num_experts"}), free=frozenset({"by", "when", ""}), names=frozenset({"provenance"}),
        also={"model": (NONE,), "provenance": (NONE,), **dict.fromkeys(("model_type", "num_layers", "num_experts", "name"), (NONE,))},
        lowest={"layer": 0, "expert": 0, "gain": 0},
    )  # fmt: skip
    vector = Direction(vector_D=torch.arange(8.0), layer=2, method="caa")
    folder = at(home, "plan", {"plan.json": json.dumps(plan, indent=1), "d.safetensors": vector.to_bytes()})

    def again(folder: Path) -> None:
        read = SteeringPlan.load(folder / "plan.json")
        given = json.loads((folder / "plan.json").read_bytes())
        assert [(one.layer, one.expert, one.gain) for one in read.experts] == [
            tuple(one.values()) for one in given.get("experts", []) if list(one) == ["layer", "expert", "gain"]
        ] or any(list(one) != ["layer", "expert", "gain"] for one in given["experts"]), (
            "the plan is not what its file says"
        )

    judge = json_judge(rules)
    start = ("plan", "--start", "{}/plan.json", "--out", "{}/out.json")
    return [
        Target(name="plan", folder=folder, file="plan.json", mutate=mutate_json, read=again, judge=judge, share=2),
        Target(name="plan --start", folder=folder, file="plan.json", mutate=mutate_json, read=run(*start), judge=judge, named=("d.safetensors", "residual entry")),
    ]  # fmt: skip


def _records(home: Path) -> list[Target]:
    from expert_stats import ExpertScores, read_rollouts, score_experts
    from launch.core.prompt_options import template_arguments
    from moe_steer.tokens import read_traces, write_traces
    from reasoning_evals.report import TraceView, TraceViews
    from stats_helpers import random_counts, random_traces

    traces, scores, views = home / "traces", home / "scores", home / "views"
    write_traces(traces / "t.jsonl", random_traces(4))
    score_experts(random_counts(2), missing_marker="skip").save(scores / "scores.json")
    marks = {"at": [1, 2], "weight": [0.5, 0.25]}
    view = TraceView(
        name="p#0", arm="baseline", outcome="correct", tokens=["a", "b", "c"], prompt_length=1, thought=(1, 2), marks={"Wait": [1]},
        fired={"layer 1 expert 2": marks},
    )  # fmt: skip
    TraceViews(title="run", experts={"layer 1 expert 2": "plan"}, traces=[view]).save(views)
    ids = np.array([[[0, 1], [2, 3]]] * 3, dtype="<i4")
    choice = {"index": 0, "token_ids": [5, 6], "routed_experts": base64.b64encode(ids.tobytes()).decode()}
    flat = {"prompt_ids": [1, 2], "completion_ids": [5, 6], "routed_experts": ids.tolist(), "problem_id": "p"}
    rollouts = at(home, "rollouts", {"r.jsonl": "".join(json.dumps(row) + "\n" for row in (flat, flat))})
    reply = at(
        home, "rollout reply", {"r.json": json.dumps({"id": "x", "prompt_token_ids": [1, 2], "choices": [choice]})}
    )
    return [
        Target(name="traces", folder=traces, file="t.jsonl", mutate=mutate_lines, read=lambda f: read_traces(f / "t.jsonl", strict=True),
               judge=lines_judge(Rules(optional=frozenset({"thought_start", "thought_end", "family"}), also={"family": (str,), "thought_start": (int,), "thought_end": (int,)}, lowest={"token_ids": 0})), share=1.5),
        Target(name="scores", folder=scores, file="scores.json", mutate=mutate_json, read=lambda f: ExpertScores.load(f / "scores.json").table(),
               judge=json_judge(Rules(
                   optional=frozenset({"name", "model_type", "top_k", "hidden_size", "num_layers", "options"}), free=frozenset({"options", "stability", "families", "tokens", "top_k", "hidden_size", "name", "model_type", "num_layers", "counts_digest"}),
                   also=dict.fromkeys(("npmi_MLE", "p_MLE", "q_MLE", "q_LE", "score_LE", "without_score_LE", "without_p_LE", "bound_LE", "chance_TLE", "error_LE", "low_LE", "high_LE", "halves", "score", "low", "high", "_q"), (NONE, float, int, list, bool)), names=frozenset({"options", "stability"})))),
        Target(name="trace views", folder=views, file="trace_views.json", mutate=mutate_json, read=lambda f: TraceViews.load(f).table(True),
               judge=json_judge(Rules(names=frozenset({"marks", "fired", "experts"}), also={"thought": (NONE,), "weight": (int,)}))),
        Target(name="rollouts", folder=rollouts, file="r.jsonl", mutate=mutate_lines, read=lambda f: list(read_rollouts(f / "r.jsonl")),
               judge=lines_judge(Rules(unknown=True, torn=True, free=frozenset({"problem_id", "routed_experts"}), optional=frozenset({"problem_id"})))),
        Target(name="rollout reply", folder=reply, file="r.json", mutate=mutate_json, read=lambda f: list(read_rollouts(f / "r.json")),
               judge=json_judge(Rules(unknown=True, free=frozenset({"id", "index", "routed_experts", "choices"}), optional=frozenset({"id", "index"}), also={"": (list,)}))),
        Target(name="template arguments", folder=at(home, "template arguments", {"value": '{"a": [1, true]}'}), file="value", mutate=mutate_json,
               read=lambda f: template_arguments([f"tools={(f / 'value').read_bytes().decode('utf-8', 'surrogateescape')}"]), judge=anything, named=("--template-arg", "tools=")),
    ]  # fmt: skip


def _problems(home: Path) -> list[Target]:
    from reasoning_evals.tasks.own_file import load_own_file

    rows = [
        {"problem_id": "a", "prompt": "1+1?", "target": "2", "answer_type": "integer", "unit": None, "tolerance": 0.1},
        {
            "problem_id": "b",
            "prompt": "How far?",
            "target": "3 m",
            "answer_type": "quantity",
            "unit": "m",
            "tolerance": None,
        },
    ]
    rules = Rules(
        optional=frozenset({"unit", "cluster_id", "domain", "tolerance"}), free=frozenset({"target"}), lowest={"tolerance": 0},
        also={"unit": (str, NONE), "tolerance": (NONE, int, float)},
    )  # fmt: skip
    loose = Rules(
        optional=rules.optional | {"problem_id", "answer_type"},
        free=rules.free | {"problem_id"},
        also=rules.also,
        lowest=rules.lowest,
    )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cells = "problem_id,prompt,target,answer_type\na,1+1?,2,integer\nb,1+2?,3,integer\n"
    columns = "question,answer,note\n1+1?,2,x\n1+2?,3,y\n"
    mapped = {"prompt": "question", "target": "answer"}

    def one(name: str, file: str, content: str, mutate: Mutate, judge: Judge, **more: Any) -> Target:
        folder = at(home, name, {file: content})
        return Target(
            name=name,
            folder=folder,
            file=file,
            mutate=mutate,
            read=lambda f: load_own_file(str(f / file), **more),
            judge=judge,
        )

    return [
        one("problems jsonl", "p.jsonl", lines, mutate_lines, lines_judge(rules)),
        one("problems json", "p.json", json.dumps(rows), mutate_json, json_judge(loose)),
        one("problems csv", "p.csv", cells, mutate_csv, csv_judge("prompt", "target"), answer_type="integer"),
        one("problems columns", "q.csv", columns, mutate_csv, csv_judge("question", "answer"), columns=mapped, answer_type="integer"),
    ]  # fmt: skip


def _pairs(home: Path) -> list[Target]:
    from moe_steer.contrasts.sites import read_rows

    names = ("question", "matching", "not_matching")
    rows = [{"question": "Is it?", "matching": "yes", "not_matching": "no"}] * 3
    cells = 'question,matching,not_matching\nIs it?,yes,no\n"Is it, then?",yes,no\n'
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return [
        Target(name="pairs csv", folder=at(home, "pairs csv", {"p.csv": cells}), file="p.csv", mutate=mutate_csv, read=lambda f: read_rows(str(f / "p.csv"), names), judge=csv_judge(*names), share=1.5),
        Target(name="pairs jsonl", folder=at(home, "pairs jsonl", {"p.jsonl": lines}), file="p.jsonl", mutate=mutate_lines, read=lambda f: read_rows(str(f / "p.jsonl"), names), judge=lines_judge(Rules(unknown=True, marked=True))),
    ]  # fmt: skip


def _replies(home: Path) -> list[Target]:
    from reasoning_evals.engines.http_chat import Chat, ChatReply
    from reasoning_evals.engines.http_client import events
    from reasoning_evals.engines.http_reply import EndpointError, PassingFailure, Reply

    def parsed(make: Callable[[], Reply]) -> Callable[[Path], Any]:
        async def all_of(content: bytes) -> Reply:
            async def chunks() -> Any:
                for start in range(0, len(content), 37):
                    yield content[start : start + 37]

            reply = make()
            async for event in events(chunks()):
                reply.add(event)
            reply.finish()
            reply.text.encode()
            assert all(0 <= token < 500 for token in reply.token_ids or ()), "a token that the model lacks"
            return reply

        def read(folder: Path) -> Any:
            try:
                return asyncio.run(all_of((folder / "reply.sse").read_bytes()))
            except PassingFailure as error:
                raise EndpointError(str(error)) from error

        return read

    def stream(*values: Any) -> str:
        return "".join(f"data: {json.dumps(value)}\n\n" for value in values) + "data: [DONE]\n\n"

    usage = {"choices": [], "usage": {"completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 1}}}
    text = stream(
        {"choices": [{"index": 0, "text": "a b", "token_ids": [5, 6], "finish_reason": None}]},
        {"choices": [{"index": 0, "text": " c", "token_ids": [7], "finish_reason": "stop"}], "prompt_token_ids": [1, 2]}, usage,
    )  # fmt: skip
    chat = stream(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "reasoning_content": "hm"}}]},
        {"choices": [{"index": 0, "delta": {"content": "42"}, "finish_reason": "stop"}]}, usage,
    )  # fmt: skip
    kinds: list[tuple[str, str, Callable[[], Reply]]] = [
        ("reply", text, lambda: Reply(most_tokens=50, vocabulary=500)),
        ("chat reply", chat, lambda: ChatReply(most_tokens=50, vocabulary=500, chat=Chat())),
    ]
    return [
        Target(name=name, folder=at(home, name, {"reply.sse": content}), file="reply.sse", mutate=_mutate_stream, read=parsed(make), judge=anything, named=("it ", "its ", "the stream"), share=2)
        for name, content, make in kinds
    ]  # fmt: skip


def _mutate_stream(dice: Any, data: bytes) -> bytes:
    """One event as JSON, else bytes."""
    events = data.split(b"\n\n")
    chosen = dice.randrange(len(events))
    if dice.random() < 0.3 or not events[chosen].startswith(b"data: {"):
        return mutate_bytes(dice, data)
    events[chosen] = b"data: " + mutate_json(dice, events[chosen][6:])
    return b"\n\n".join(events)


def _prompts(home: Path) -> list[Target]:
    from launch.core.prompt_options import PromptOptions, ask_prompts
    from moe_steer.backends import read_tokenizer
    from moe_steer.lab import LAB_MODEL
    from moe_steer.thinking import render

    template = (Path(LAB_MODEL) / "chat_template.jinja").read_bytes()

    def read(folder: Path) -> str:
        tokenizer = read_tokenizer("lab")
        ask_prompts(tokenizer, PromptOptions(chat_template=str(folder / "t.jinja")), quiet=True)
        return render(tokenizer, [{"role": "user", "content": "1+1?"}])

    return [
        Target(name="chat template", folder=at(home, "template", {"t.jinja": template}), file="t.jinja", mutate=mutate_bytes, read=read, judge=anything, named=("chat template",))
    ]  # fmt: skip


def _recipes(home: Path) -> list[Target]:
    from launch import recipes

    files = {name: (recipes.FOLDER / name).read_bytes() for name in ("r1-fp8-8xh200.json", recipes.HOSTS)}
    folder = at(home, "recipes", files)

    def within(read: Callable[[], Any]) -> Callable[[Path], Any]:
        def reads(folder: Path) -> Any:
            before, recipes.FOLDER = recipes.FOLDER, folder
            try:
                return read()
            finally:
                recipes.FOLDER = before

        return reads

    return [
        Target(name="recipe", folder=folder, file="r1-fp8-8xh200.json", mutate=mutate_json, read=within(lambda: recipes.load_recipe("r1-fp8-8xh200").command),
               judge=json_judge(Rules(names=frozenset({"shape"}), free=frozenset({"shape"}), also={"gpu_gib": (int,), "expected_gib": (int,)}, optional=frozenset({"script"})))),
        Target(name="hosts", folder=folder, file=recipes.HOSTS, mutate=mutate_bytes, read=within(recipes.host_slots), judge=anything),
    ]  # fmt: skip
