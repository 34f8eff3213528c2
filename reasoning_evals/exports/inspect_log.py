"""Logs that Inspect's viewer and readers open (format version 2), one file per arm. Needs inspect-ai, an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reasoning_evals.exports.graded_run import GradedRun, ProblemSamples, clean, file_name, open_graded_run
from reasoning_evals.runs import Completion, GradeRow

SCORER = "reasoning_evals"


def export_inspect(run_folder: Path | str, out_dir: Path | str, private: bool = False) -> list[Path]:
    """Write ``TASK_ARM.eval`` for each arm of a graded run.

    A problem is a sample, its k samples are epochs. Thoughts become reasoning content; scores are C or I, with outcome,
    extracted answer and reason. ValueError when inspect-ai is not installed; see ``open_graded_run`` for the others.
    """
    try:
        from inspect_ai import log as inspect_logs
    except ImportError as error:
        raise ValueError(
            f"an Inspect log needs the package inspect-ai ({error}): pip install inspect-ai, or export lm-eval or parquet"
        ) from error

    run = open_graded_run(run_folder, private)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for arm in run.arms:
        path = folder / f"{file_name(run.task)}_{run.file_names[arm]}.eval"
        inspect_logs.write_eval_log(_log(run, arm), str(path), format="eval")
        paths.append(path)
    return paths


def _log(run: GradedRun, arm: str) -> Any:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalMetric, EvalResults, EvalScore, EvalSpec
    from inspect_ai.model import GenerateConfig

    rule, identity = run.config["sampling"], run.config["arms"][arm]
    limits: dict[str, Any] = {"max_tokens": rule["max_new_tokens"]}
    if not rule["greedy"]:
        limits |= {"temperature": rule["temperature"], "top_p": rule["top_p"], "top_k": rule["top_k"] or None}
    values = [sum(samples) / run.k for samples in run.correct(arm)]
    metrics = {"accuracy": sum(values) / len(values)}
    if (error := run.standard_error(values)) is not None:
        metrics["stderr"] = error
    samples = [sample for one in run.samples(arm) for sample in _samples(run, one)]
    return EvalLog(
        version=2,
        status="success",
        eval=EvalSpec(
            created=run.created.isoformat(),
            task=run.task,
            task_id=f"{run.task}/{arm}",
            run_id=identity["config_hash"],
            dataset=EvalDataset(
                name=run.task, samples=len(run.problems), sample_ids=[one.problem_id for one in run.problems]
            ),
            model=run.model(arm),
            model_generate_config=GenerateConfig(**limits),
            config=EvalConfig(epochs=run.k, epochs_reducer=["mean"]),
            packages=dict(run.versions),
            metadata={"arm": arm, "sampler": identity["sampler"], "details": identity["details"]},
        ),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=[
                EvalScore(
                    name=SCORER,
                    scorer=SCORER,
                    metrics={name: EvalMetric(name=name, value=value) for name, value in metrics.items()},
                )
            ],
        ),
        samples=samples,
    )


def _samples(run: GradedRun, one: ProblemSamples) -> list[Any]:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageUser
    from inspect_ai.scorer import Score

    made = []
    for completion, grade in one.samples:
        output = _output(run, completion, grade)
        score = Score(
            value="C" if grade.correct else "I",
            answer=None if grade.extracted is None else clean(grade.extracted),
            explanation=clean(grade.reason),
            metadata={"outcome": grade.outcome, "method": grade.method, "state": grade.state},
        )
        made.append(
            EvalSample(
                id=one.problem.problem_id,
                epoch=completion.sample_idx + 1,
                input=clean(one.problem.prompt),
                target=clean(one.problem.target),
                messages=[ChatMessageUser(content=clean(one.problem.prompt)), output.choices[0].message],
                output=output,
                scores={SCORER: score},
                metadata={"seed": completion.seed, "domain": one.problem.domain, "cluster_id": one.problem.cluster_id},
            )
        )
    return made


def _output(run: GradedRun, completion: Completion, grade: GradeRow) -> Any:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        ContentReasoning,
        ContentText,
        ModelOutput,
        ModelUsage,
    )

    model, thought = run.model(completion.arm), run.thought(completion)
    content: list[Any] = [ContentReasoning(reasoning=clean(thought.thought))] if thought.thought else []
    message = ChatMessageAssistant(content=[*content, ContentText(text=clean(thought.answer))], model=model)
    stop = {"length": "max_tokens"}.get(completion.finish_reason, completion.finish_reason)
    usage = ModelUsage(
        output_tokens=grade.total_tokens, total_tokens=grade.total_tokens, reasoning_tokens=grade.thinking_tokens
    )
    return ModelOutput(model=model, choices=[ChatCompletionChoice(message=message, stop_reason=stop)], usage=usage)
