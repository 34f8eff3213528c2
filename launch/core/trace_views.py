"""Traces of a run to look at: where chosen experts fired in them, under the plan of their own arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_stats import ExpertScores, MarkerSet, RoutingRecorder, Trace, TraceFiring, run_traces
from launch.core.option_checks import layer_and_number
from launch.core.options import ELSEWHERE, ModelOptions, options_from
from launch.core.wiring import markers_for, traces_of
from moe_steer import SteeringPlan, steer
from moe_steer.backends import layout_of, lockstep
from moe_steer.layers import model_shape
from moe_steer.thinking import thinking_format
from moe_steer.tokens import scoped_positions
from reasoning_evals import Completion
from reasoning_evals.report import VIEWS_FILE, TraceView, TraceViews
from reasoning_evals.runs import OPTIONS, read_generations, read_grades, read_run, refuse_job

if TYPE_CHECKING:
    from launch.core.session import Session

Expert = tuple[int, int]
TRACES = 6
"""Test problems whose first answers can be read token by token."""
MOST_EXPERTS = 24
"""Experts that are recorded: those of the plans, then the best of the scores."""
_STEP_ENDS = "step_end"
_MARKERS = ("<think>", "</think>", "Wait", "Alternatively")


def keep_traces(
    session: Session, plans: Mapping[str, SteeringPlan | None], scores: ExpertScores | None, markers: Sequence[str]
) -> None:
    """Leave some answers of the test in the folder, with the tokens at which the experts fired, and the page to read them on."""
    experts = experts_to_show(plans, scores)
    if session.connection is not None:
        if experts:
            session.ranks.say(
                f"     no page of traces: it needs the model loaded; 'moe-steer inspect {session.folder}' makes it"
            )
        return
    ranks, layout = session.ranks, layout_of(session.model)
    found = (session.folder / VIEWS_FILE).is_file() if ranks.is_main else None
    if not experts or ranks.broadcast(found):
        return
    answers = None
    if ranks.is_main:
        answers = first_answers(list(read_generations(session.folder / "test")), list(plans), TRACES)
    answers = ranks.broadcast(answers)
    with lockstep(session.model):
        if ranks.is_main or layout.same_tokens:
            views = views_of(
                session.model,
                session.tokenizer,
                answers,
                plans,
                experts,
                markers_for(session.tokenizer, markers, {}),
                title=f"{session.options.model}: {session.options.run_name}",
                graded=session.folder / "test" if ranks.is_main else None,
            )
    if ranks.is_main:
        views.save(session.folder)
    ranks.barrier()


def inspect_run(folder: Path, num: int, named: Sequence[str], model_name: str | None, backend: str) -> TraceViews:
    """Load a run's model and record the first answers of its arms. ValueError, in one line, for what the run does not say."""
    from launch.core.session import load_asked

    step = folder / "test" if (folder / "test").is_dir() else folder
    refuse_job(step)
    completions = list(read_generations(step))
    arms = read_run(step)["config"]["arms"]
    plans = _plans_of(folder, arms)
    scores = ExpertScores.load(folder / "scores.json") if (folder / "scores.json").is_file() else None
    experts = {layer_and_number(word, "experts"): "named" for word in named} or experts_to_show(plans, scores)
    if not experts:
        raise ValueError(f"{folder} names no experts: give some as --experts LAYER:EXPERT")
    run = read_run(folder)
    config = run["config"] | run.get(OPTIONS, {})
    sampled = next((arm["sampler"].get("model") for arm in arms.values()), None)  # by the sampler of the first arm
    if model := model_name or config.get("model") or sampled:
        config["model"] = model
    asked = _model_options(config, backend)
    model, tokenizer = load_asked(asked, batch=1, context=None)
    chosen = first_answers(completions, list(plans), num)
    usual = _MARKERS if thinking_format(tokenizer).thinks else _MARKERS[2:]  # no tags where the model does not think
    markers = markers_for(tokenizer, config.get("markers") or usual, {})
    return views_of(
        model, tokenizer, chosen, plans, experts, markers, title=f"{asked.model}: {folder.name}", graded=step
    )


def _plans_of(folder: Path, arms: Mapping[str, Any]) -> dict[str, SteeringPlan | None]:
    """Arm -> its plan, of the arms whose plan is none or lies in the folder; of others it is said that they are left out."""
    files = [folder / "plan.json", folder / "placebo.json", *sorted((folder / "plans").glob("*.json"))]
    there = {plan.digest(): plan for plan in (SteeringPlan.load(file) for file in files if file.is_file())}
    asked = {name: arm["details"].get("plan") for name, arm in arms.items()}
    found = {name: there.get(digest) for name, digest in asked.items() if digest is None or digest in there}
    left = ", ".join(name for name in asked if name not in found)
    if not found:
        raise ValueError(
            f"{folder} does not hold the plans of its arms ({left}): put each beside run.json, as plan.json or into a folder plans"
        )
    if left:
        print(f"left out, as their plans are not in {folder}: {left}")
    return found


def _model_options(config: Mapping[str, Any], backend: str) -> ModelOptions:
    """What a run says of its model, and of how its prompts were rendered; held as ``backend`` says."""
    if "model" not in config:
        raise ValueError("this run does not say its model: give it as --model")
    names = {item.name for item in dataclasses.fields(ModelOptions)} - ELSEWHERE
    kept = {name: value for name, value in config.items() if name in names}
    return dataclasses.replace(options_from(kept, ModelOptions), backend=backend)


def experts_to_show(plans: Mapping[str, SteeringPlan | None], scores: ExpertScores | None) -> dict[Expert, str]:
    """(layer, expert) -> what it is in the run: the experts of the arms' plans, then those that rank highest."""
    found: dict[Expert, str] = {}
    for arm, plan in plans.items():
        for entry in plan.experts if plan else ():
            found.setdefault((entry.layer, entry.expert), "plan" if arm == "steered" else arm)
    for rank, row in enumerate(scores.ranking() if scores else (), 1):
        if len(found) >= MOST_EXPERTS:
            break
        found.setdefault((row.layer, row.expert), f"rank {rank}")
    return found


def views_of(
    model: Any,
    tokenizer: Any,
    completions: Sequence[Completion],
    plans: Mapping[str, SteeringPlan | None],
    experts: Mapping[Expert, str],
    markers: MarkerSet,
    *,
    title: str,
    graded: Path | None = None,
) -> TraceViews:
    """Run each answer once more through the model, steered as its arm was, and keep where the experts fired.

    ``plans``: arm -> its plan, None for the model as it is. ``experts``: which to record, with what each is. ``graded``: a run
    folder with the outcomes. Every rank of a model that stretches over ranks calls this with the same arguments.
    """
    grades = read_grades(graded) if graded else []
    outcomes = {(row.arm, row.problem_id, row.sample_idx): row.outcome for row in grades}
    views = []
    for item, trace in zip(completions, traces_of(completions, tokenizer), strict=True):
        plan = plans[item.arm]
        recorder = RoutingRecorder(model_shape(model), experts)
        with steer(
            model, plan or SteeringPlan(), tokenizer=tokenizer, prompt_lengths=[trace.prompt_length], quiet=True
        ):
            run_traces(model, [trace], recorder)
        fired = recorder.finish()[trace.trace_id]
        marks = _marks(tokenizer, trace, markers)
        if plan and (steered := _steered(tokenizer, trace, plan, fired)):
            marks["steered"] = steered
        views.append(
            TraceView(
                name=f"{item.problem_id}, sample {item.sample_idx}",
                arm=item.arm,
                outcome=outcomes.get((item.arm, item.problem_id, item.sample_idx), ""),
                tokens=texts_of(tokenizer, trace.token_ids),
                prompt_length=trace.prompt_length,
                thought=None if trace.thought is None else (trace.thought.start, trace.thought.stop),
                marks=marks,
                fired={
                    _name(expert): {
                        "at": fired[expert].positions_N.tolist(),
                        "weight": [round(float(weight), 4) for weight in fired[expert].weights_N],
                    }
                    for expert in experts
                    if expert in fired
                },
            )
        )
    return TraceViews(title=title, experts={_name(expert): role for expert, role in experts.items()}, traces=views)


def first_answers(completions: Sequence[Completion], arms: Sequence[str], num: int) -> list[Completion]:
    """The first sample of the first ``num`` problems, arm beside arm."""
    problems = list(dict.fromkeys(item.problem_id for item in completions))[:num]
    found = {(item.problem_id, item.arm): item for item in completions if item.sample_idx == 0}
    return [found[problem, arm] for problem in problems for arm in arms if (problem, arm) in found]


def texts_of(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character that several tokens write belongs to the last of them."""
    texts: list[str] = []
    waiting: list[int] = []
    for token in token_ids:
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd") or len(waiting) == 4  # UTF-8 has at most four bytes
        texts.append(text if whole else "")
        waiting = [] if whole else waiting
    return texts


def _marks(tokenizer: Any, trace: Trace, markers: MarkerSet) -> dict[str, list[int]]:
    spans = markers.find_occurrences(trace.token_ids)
    found = {name: sorted({at for span in spans[name] for at in range(span.start, span.stop)}) for name in spans}
    found["step end"] = scoped_positions(_STEP_ENDS, tokenizer, trace.token_ids, trace.prompt_length)
    return {name: places for name, places in found.items() if places}


def _steered(tokenizer: Any, trace: Trace, plan: SteeringPlan, fired: TraceFiring) -> list[int]:
    """The tokens at which the plan acted: in its scope, where one of its experts was selected or a vector added; where it had a say
    in the choice, the whole scope."""

    def scoped(scope: str) -> list[int]:
        return scoped_positions(scope, tokenizer, trace.token_ids, trace.prompt_length)

    selected: set[int] = set()
    for entry in plan.active_experts:
        if (firing := fired.get((entry.layer, entry.expert))) is not None:
            selected.update(firing.positions_N.tolist())
    acted = selected & set(scoped(plan.scope)) if selected else set()
    scopes = {entry.scope for entry in plan.active_residual} | {entry.scope for entry in plan.top_k}
    if any(entry.acts_on_choice for entry in plan.experts):
        scopes.add(plan.scope)
    for scope in scopes:
        acted.update(scoped(scope))
    return sorted(acted)


def _name(expert: Expert) -> str:
    return f"layer {expert[0]} expert {expert[1]}"
