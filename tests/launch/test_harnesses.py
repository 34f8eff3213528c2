"""Steered models in other people's harnesses, where these are installed: a task of theirs, by their own evaluation, on the lab."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_steer import ExpertGain, SteeringPlan, load_model, steer
from reasoning_evals import load_task
from reasoning_evals.prompts import render_prompt

PLAN = SteeringPlan(experts=[ExpertGain(2, 5, 64.0), ExpertGain(3, 2, 16.0)])


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "loud.json"
    PLAN.save(path)
    return str(path)


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    return load_model("lab")


def test_a_task_of_inspect_runs_on_a_steered_model(plan_file: str, lab: tuple[Any, Any], tmp_path: Path) -> None:
    """Its answers are those of generate() under the plan; the log says the plan and what fired."""
    pytest.importorskip("inspect_ai", reason="Inspect: pip install inspect-ai")
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import get_model
    from inspect_ai.scorer import includes

    import launch.inspect_model  # noqa: F401  (an installation registers it by its entry point)

    problems = load_task("lab", split="test", num=3, seed=0)
    task = Task(dataset=[Sample(input=one.prompt, target=one.target) for one in problems], scorer=includes())
    model, tokenizer = lab
    said = {}
    for plan in (plan_file, None):
        args = {} if plan is None else {"plan": plan}
        (log,) = eval(
            task,
            model=get_model("moe_steer/lab", memoize=False, **args),
            temperature=0,
            max_tokens=24,
            log_dir=str(tmp_path / "logs"),
            display="none",
        )
        assert log.status == "success", log.error
        assert log.samples is not None
        said[plan] = [
            "".join(getattr(part, "reasoning", "") or getattr(part, "text", "") for part in one.output.message.content)
            for one in log.samples
        ]
        steering = [(one.output.metadata or {})["steering"] for one in log.samples]
        assert {one["plan"] for one in steering} == {PLAN.digest() if plan else None}
        fired = [row["tokens"] for one in steering for row in one["fired"]]
        assert (len(fired), min(fired, default=0) > 0) == ((6, True) if plan else (0, False))
        applied = PLAN if plan else SteeringPlan()
        for problem, answer in zip(problems, said[plan], strict=True):
            prompt = torch.tensor([render_prompt(tokenizer, problem.prompt).token_ids])
            with steer(model, applied, quiet=True):
                made = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :]
            assert answer.strip() == tokenizer.decode(made, skip_special_tokens=True).removesuffix("</think>").strip()
    assert said[plan_file] != said[None]
    with pytest.raises(ValueError, match="moe_steer has no model argument 'gain'"):
        get_model("moe_steer/lab", memoize=False, gain=3)
    (log,) = eval(
        task, model=get_model("moe_steer/lab", memoize=False), stop_seqs=["x"], log_dir=str(tmp_path), display="none"
    )
    assert log.status == "error"
    assert "moe_steer does not follow stop_seqs: leave it out" in str(log.error)


def test_a_task_of_the_lm_evaluation_harness_runs_on_a_steered_model(
    plan_file: str, lab: tuple[Any, Any], tmp_path: Path
) -> None:
    """Log-probabilities of its multiple-choice requests are those of a forward pass under the plan; its results hold the audit."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness: pip install lm-eval")
    from lm_eval import simple_evaluate

    import launch.lm_eval_model  # noqa: F401

    problems = load_task("lab", split="test", num=2, seed=0)
    rows = [{"question": one.prompt, "choices": [f" {one.target}", " 7 or 8"], "label": 0} for one in problems]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    model, tokenizer = lab
    for plan in (plan_file, None):
        args = {"pretrained": "lab"} | ({"plan": plan} if plan else {})
        results = simple_evaluate(model="moe_steer", model_args=args, tasks=[task], bootstrap_iters=0, device="cpu")
        steering = results["config"]["steering"]
        assert steering["plan"] == (PLAN.digest() if plan else None)
        assert len(steering["fired"]) == (2 if plan else 0)
        assert any(row["tokens"] > 0 for row in steering["fired"]) == (plan is not None)
        for sample in results["samples"]["sums"]:
            for (question, choice), reply in zip(
                (one for one in sample["arguments"]), sample["filtered_resps"], strict=True
            ):
                before = tokenizer(question, add_special_tokens=False)["input_ids"]
                ids = tokenizer(question + choice, add_special_tokens=False)["input_ids"]
                with torch.inference_mode(), steer(model, PLAN if plan else SteeringPlan(), quiet=True):
                    scores_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                own = sum(scores_SV[at - 1, ids[at]].item() for at in range(len(before), len(ids)))
                assert float(reply[0]) == pytest.approx(own, abs=1e-4)
    deaf = SteeringPlan(experts=[ExpertGain(2, 5, 64.0)], scope="after:400")
    deaf.save(tmp_path / "deaf.json")
    with pytest.raises(RuntimeError, match="the model was not steered: none of the 1 experts of the plan was selected"):
        args = {"pretrained": "lab", "plan": str(tmp_path / "deaf.json"), "strict": True}
        simple_evaluate(model="moe_steer", model_args=args, tasks=[task], bootstrap_iters=0, device="cpu")
