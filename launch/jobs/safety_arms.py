"""The arms of the safety experiment: the model as it is, with a prompt before the question, or with a vector from pairs added."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.core.directions import FOLDER, NewDirections, fits_of
from launch.core.session import Session
from launch.jobs.safety_options import VECTOR_ARMS, SafetyOptions
from launch.jobs.safety_tasks import SafetyTask, is_chat
from moe_steer import ResidualVector, SteeringPlan
from moe_steer.console import follow
from moe_steer.contrasts import answer_pairs, collect_contrast, fit_notes
from moe_steer.directions import all_atoms, caa, report_atoms, sta
from moe_steer.saes import SAE
from moe_steer.tokens import text_notes
from reasoning_evals.runs import Arm, digest
from reasoning_evals.tasks import read_rows

_COLUMNS = (
    ("question", "matching", "not_matching"),
    ("adversarial prompt", "safe generation", "unsafe generation"),
)


class SafetyArm(NamedTuple):
    """One arm, before a task is chosen."""

    name: str
    prefix: str
    """Text before every question; "" for none."""
    plan: SteeringPlan | None

    def on(self, task: SafetyTask, session: Session) -> Arm:
        """This arm on a task."""
        arm = session.arm(self.name, self.plan)
        return dataclasses.replace(
            arm,
            sampler=task.sampler(session.model, session.tokenizer),
            details={"prefix": self.prefix, **arm.details},
            render=task.render(session.tokenizer, self.prefix),
        )


class SafetyPair(NamedTuple):
    """A question with a safe (matching) and an unsafe (not matching) answer."""

    question: str
    matching: str
    not_matching: str


def safety_arms(
    options: SafetyOptions, folder: Path, files: Mapping[str, Sequence[tuple[int, str]]]
) -> list[SafetyArm]:
    """The arms of the options in their order, vector arms at every strength. ``files``: arm -> its direction in the run's folder.

    As in the paper a vector is added at the output of one layer, at every position, BOS and prompt included.
    """
    arms = []
    for name in options.arms:
        if name not in VECTOR_ARMS:
            arms.append(SafetyArm(name, options.prompt(name), None))
            continue
        ((_, file),) = files[name]
        for strength in options.strengths:
            shown = name if len(options.strengths) == 1 else f"{name} x{strength:g}"
            vector = ResidualVector(layer=options.layer, file=file, strength=strength, scope="all")
            arms.append(SafetyArm(shown, "", SteeringPlan(residual=[vector], base_dir=str(folder / FOLDER))))
    return arms


def read_pairs(path: str, num: int | None = None) -> list[SafetyPair]:
    """The pairs of a file: the paper's columns (question, matching, not_matching) or SafeEdit's own. ValueError names what is wrong."""
    if not Path(path).is_file():
        raise ValueError(
            f"there is no file of pairs {path!r}: give a CSV, JSON or JSONL file with {', '.join(_COLUMNS[0])}"
        )
    pairs = []
    for where, row in read_rows(Path(path)):
        columns = next((names for names in _COLUMNS if all(name in row for name in names)), None)
        if columns is None:
            raise ValueError(f"{where}: pairs need the columns {', '.join(_COLUMNS[0])}, the row has {', '.join(row)}")
        values = [row[name] for name in columns]
        if not all(isinstance(value, str) for value in values) or not values[0].strip():
            raise ValueError(f"{where}: question and answers have to be texts, and the question not empty")
        pairs.append(SafetyPair(*values))
        if len(pairs) == num:
            return pairs
    if num is not None or not pairs:
        raise ValueError(
            f"{path} holds {len(pairs)} pairs, {num or 'at least 1'} are wanted: give more, or lower --num-pairs"
        )
    return pairs


def pairs_digest(pairs: Sequence[SafetyPair]) -> str:
    """16 hexadecimal digits over all texts, in order."""
    return digest([list(pair) for pair in pairs])


def new_directions(
    session: Session, options: SafetyOptions, pairs: Sequence[SafetyPair], sae: SAE | None
) -> NewDirections:
    """The directions of the vector arms, from the answers of the pairs. ValueError as the directions raise it."""
    layer = options.layer
    chat = is_chat(options.prompt_style, session.tokenizer)
    sequences = answer_pairs(pairs, session.tokenizer, chat=chat)
    saes = {} if sae is None else {layer: sae}
    fits = fits_of(session, sequences, saes)
    notes = {"contrast": "answers", "chat": chat, **text_notes(session.tokenizer), **fit_notes(fits)}
    contrast = collect_contrast(
        session.model,
        sequences,
        [layer],
        saes=saes,
        notes=notes,
        progress=follow("reading answers", session.ranks.rank),
    )[layer]
    made, reports = [], []
    for arm in (arm for arm in options.arms if arm in VECTOR_ARMS):
        if arm == "caa":
            made.append((arm, caa(contrast)))
            continue
        one = saes[layer]
        direction = (
            all_atoms(contrast, one) if arm == "sae" else sta(contrast, one, keep=options.keep, parity=options.parity)
        )
        made.append((arm, direction))
        reports.append(report_atoms(direction, contrast, one))
    return NewDirections(made, reports, fits)
