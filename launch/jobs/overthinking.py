"""The overthinking job: directions that make thoughts shorter, compared with prompts and decoding rules that do the same.

Directions come from concise against verbose thoughts, and from decisions to stop or to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expert_stats import Trace, concise_and_verbose, decision_sites, thought_pairs
from launch.core.beforehand import Known, look, settle
from launch.core.directions import (
    FOLDER,
    NewDirections,
    digest_of,
    from_contrast,
    given_files,
    make_once,
    read_made,
    read_sae,
    take_directions,
)
from launch.core.findings import Findings, read_results
from launch.core.options import options_from
from launch.core.problem_sets import problem_sets
from launch.core.ranks import Ranks
from launch.core.session import Session
from launch.core.wiring import traces_of
from launch.jobs.overthinking_findings import Outcome, findings_of
from launch.jobs.overthinking_options import (
    METHODS,
    PAIR_METHODS,
    RESIDUAL_METHODS,
    SAE_METHODS,
    OverthinkingOptions,
    methods_of,
)
from launch.jobs.overthinking_settings import BASELINE, UNTUNED, Setting, all_settings, build, choices_of
from moe_steer import Direction
from moe_steer.console import counted, follow
from moe_steer.contrasts import MarkedSequence, collect_contrast
from moe_steer.directions import caa
from moe_steer.lab import LAB_SAE
from moe_steer.saes import SAE
from moe_steer.thinking import thinking_format
from moe_steer.tokens import text_notes
from reasoning_evals import Problem
from reasoning_evals.runs import GradeRow, grade_run, read_generations, read_run

NAME = "reduce_overthinking"
LENGTH_RATIO = 1.5
"""A verbose thought is at least so many times as long as the concise one of the same problem."""


def run(options: OverthinkingOptions, ranks: Ranks) -> None:
    """The whole job, step by step, in the folder of the options."""
    sets = problem_sets(options)
    known = look(options, quiet=not ranks.is_main)
    check_thinks(options, known)
    questions = [problem.prompt for part in sets for problem in part]
    options, room = settle(options, known, known.longest_prompt(questions, options.brevity_request), ranks)
    session = Session.load(options, ranks, room, known.tokenizer, known.shape)
    layers = options.tried_layers(session.shape.num_layers)
    sae = None if options.directions else _sae(options, session.model)
    methods, left_out = methods_of(options, sae is not None or options.directions is not None)
    given = given_directions(options, methods)
    session.open(NAME, options.config() | {"sae": sae.about.sha256 if sae else None} | given)

    unsteered: list[GradeRow] = []
    if set(methods) <= {*UNTUNED, *(RESIDUAL_METHODS if options.directions else ())}:
        ranks.say("1/4  no unsteered answers are needed: nothing is learned or tuned")
    else:
        problems, k = sets.identification, options.samples_identification
        ranks.say(f"1/4  {len(problems)} problems x {k}: unsteered answers")
        # Sampled even where the comparison is greedy: pairs need answers that differ.
        drawn = session.sampling(greedy=False)
        session.sample("identification", [session.arm(BASELINE)], problems, k, sampling=drawn)
        unsteered = session.grade("identification", problems)
    files: dict[str, list[tuple[int, str]]] = {}
    learned = [method for method in methods if method in RESIDUAL_METHODS]
    if learned and options.directions:
        ranks.say(f"2/4  the directions of {options.directions} are given")
        files = take_directions(session, options.directions, learned)
    elif learned:
        places = set(layers) if {"caa", "decision"} & set(learned) else set()
        if sae is not None and sae.about.layer is not None:
            places.add(sae.about.layer)
        ranks.say(f"2/4  directions at layers {', '.join(map(str, sorted(places)))}")
        files = make_once(session, partial(new_directions, session, unsteered, learned, layers, sae, options)).files
    del sae  # a large one must not fill the GPU's memory while answers are sampled
    settings = all_settings(methods, files, unsteered, options)
    session.require({setting.label: setting.plan(session.folder / FOLDER) for setting in settings})
    tuning = _tune(session, settings, sets.tuning, options) if settings else []
    choices = choices_of(methods, settings, tuning, options.margin)
    arms = [session.arm(BASELINE), *(build(one.setting, name, session, options) for name, one in choices.items())]
    k = options.num_samples
    names = ", ".join(arm.name for arm in arms)
    ranks.say(
        f"4/4  {counted(len(sets.test), 'test problem')} x {counted(k, 'sample')} in {counted(len(arms), 'arm')}: {names}"
    )
    session.sample("test", arms, sets.test, k)
    test = session.grade("test", sets.test)
    findings = None
    if ranks.is_main:
        findings = findings_of(
            Outcome(
                options=options,
                choices=choices,
                settings=settings,
                tuning=tuning,
                test=test,
                folder=session.folder,
                left_out=left_out,
            )
        )
    session.finish(findings)


def read(folder: Path) -> Findings:
    """Grade again, choose again, and collect what the steps left; ValueError when the job is not finished."""
    config = read_run(folder)["config"]
    read_results(folder, NAME)
    # The config holds the SAE's sha256: which file it came from is not part of what the run is.
    options = options_from(config, OverthinkingOptions, ["given_directions"])
    methods, left_out = methods_of(options, config["sae"] is not None or options.directions is not None)
    unsteered, tuning = (
        grade_run(folder / part) if (folder / part).is_dir() else [] for part in ("identification", "tuning")
    )
    tried = {row.arm for row in tuning}  # another version may try others where the user named none
    files = read_made(folder / FOLDER).files
    settings = [one for one in all_settings(methods, files, unsteered, options) if one.label in tried]
    return findings_of(
        Outcome(
            options=options,
            choices=choices_of(methods, settings, tuning, options.margin),
            settings=settings,
            tuning=tuning,
            test=grade_run(folder / "test"),
            folder=folder,
            left_out=left_out,
        )
    )


def check_thinks(options: OverthinkingOptions, known: Known) -> None:
    """ValueError, with what to do, for a model without thoughts that could become shorter."""
    if not set(options.methods or METHODS) <= set(UNTUNED) and not thinking_format(known.tokenizer).thinks:
        raise ValueError(
            f"{options.model} does not think, as far as its chat template tells, so there are no thoughts to make shorter: name "
            "its tags with --thinking, take a model that thinks, or steer its answers (moe-steer direction --contrast answers)"
        )


def given_directions(options: OverthinkingOptions, methods: Sequence[str]) -> dict[str, str]:
    """What --directions adds to a run's settings: a hash over the files."""
    if options.directions is None:
        return {}
    learned = [method for method in methods if method in RESIDUAL_METHODS]
    home = Path(options.directions)
    return {"given_directions": digest_of(home, given_files(home, learned))}


def _tune(
    session: Session, settings: Sequence[Setting], problems: Sequence[Problem], options: OverthinkingOptions
) -> list[GradeRow]:
    session.ranks.say(f"3/4  {len(problems)} tuning problems: choosing among {len(settings)} settings")
    arms = [session.arm(BASELINE), *(build(setting, setting.label, session, options) for setting in settings)]
    session.sample("tuning", arms, problems, 1 if options.greedy else options.samples_tuning)
    return session.grade("tuning", problems)


def _sae(options: OverthinkingOptions, model: Any) -> SAE | None:
    """The SAE of --sae, or the dense lab model's own, where a method reads by one; ValueError when it does not fit the model."""
    path = options.sae or (str(LAB_SAE) if options.model == "lab-dense" else None)
    if path is None or not SAE_METHODS.intersection(options.methods or METHODS):
        return None
    return read_sae(path, model, options.sae_layer, "--sae-layer")


def new_directions(
    session: Session,
    rows: Sequence[GradeRow],
    methods: Sequence[str],
    layers: Sequence[int],
    sae: SAE | None,
    options: OverthinkingOptions,
) -> NewDirections:
    """caa and decision for every layer, the methods that need an SAE for the SAE's layer.

    ``rows``: grades of the unsteered answers. ValueError when the answers hold no pair or no decision, and for an SAE that
    explains nothing.
    """
    traces = _right_traces(session, rows)
    new = NewDirections([])
    if any(method in PAIR_METHODS for method in methods):
        new = _from_pairs(session, traces, methods, layers, sae, options)
    made = list(new.directions)
    if "decision" in methods:
        made += _from_decisions(session, traces, layers, options.switch_words)
    ordered = [item for method in methods for item in made if item[0] == method]
    return new._replace(directions=ordered)


def _from_decisions(
    session: Session, traces: Sequence[Trace], layers: Sequence[int], switch_words: Sequence[str]
) -> list[tuple[str, Direction]]:
    sequences = decision_sites(traces, session.tokenizer, switch_words=switch_words)
    _refuse_empty(sequences, f"no thought stops and goes on at {', '.join(switch_words)}: name its words")
    notes = {"contrast": "decisions", "switch_words": list(switch_words), **text_notes(session.tokenizer)}
    contrasts = collect_contrast(
        session.model,
        sequences,
        layers,
        weight="token",
        notes=notes,
        progress=follow("reading answers", session.ranks.rank),
    )
    return [("decision", caa(contrasts[layer])) for layer in layers]


def _from_pairs(
    session: Session,
    traces: Sequence[Trace],
    methods: Sequence[str],
    layers: Sequence[int],
    sae: SAE | None,
    options: OverthinkingOptions,
) -> NewDirections:
    sequences = thought_pairs(concise_and_verbose(traces, min_ratio=LENGTH_RATIO))
    _refuse_empty(
        sequences,
        f"no problem has two right thoughts of which one is {LENGTH_RATIO:g} times as long: raise --samples-identification",
    )
    saes: dict[int, SAE] = {}
    if sae is not None:
        assert sae.about.layer is not None
        saes[sae.about.layer] = sae
    return from_contrast(session, sequences, methods, layers, saes, {"contrast": "thoughts"}, keep=options.kept)


def _right_traces(session: Session, rows: Sequence[GradeRow]) -> list[Trace]:
    """The right answers whose thought is closed, in the order of the problems' names."""
    right = {(row.problem_id, row.sample_idx) for row in rows if row.correct and row.state == "closed"}
    completions = [
        item
        for item in read_generations(session.folder / "identification")
        if (item.problem_id, item.sample_idx) in right
    ]
    completions.sort(key=lambda item: (item.problem_id, item.sample_idx))
    return traces_of(completions, session.tokenizer)


def _refuse_empty(sequences: Sequence[MarkedSequence], why: str) -> None:
    if not any(sequence.positive for sequence in sequences) or not any(sequence.negative for sequence in sequences):
        raise ValueError(why)
