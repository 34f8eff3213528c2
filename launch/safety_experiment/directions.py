"""From contrast pairs to the directions of the safety experiment, in the run's folder; and how well the SAE fits the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.ranks import Ranks
from launch.safety_experiment.options import VECTOR_ARMS, SafetyOptions
from launch.safety_experiment.prompts import is_chat
from launch.sharded import refuse_different
from moe_steer.backends import layout_of, lockstep
from moe_steer.contrasts import MarkedSequence, answer_pairs, collect_contrast, contrast_fits, fit_notes
from moe_steer.directions import Direction, all_atoms, caa, report_atoms, sta
from moe_steer.layers import unwrap
from moe_steer.saes import SAE, SAEFit, check_fits, load_sae
from moe_steer.tokens import text_notes
from reasoning_evals.runs import digest
from reasoning_evals.tasks import read_rows
from reasoning_evals.whole_files import write_whole

FOLDER = "directions"
INDEX = "index.json"
ATOMS = "atoms.md"
_COLUMNS = (
    ("question", "matching", "not_matching"),
    ("adversarial prompt", "safe generation", "unsafe generation"),
)


class SafetyPair(NamedTuple):
    """A question with a safe (matching) and an unsafe (not matching) answer."""

    question: str
    matching: str
    not_matching: str


class MadeDirections(NamedTuple):
    """What ``make_directions`` left in the folder."""

    files: dict[str, Path]
    """Arm -> direction file."""
    fit: SAEFit | None
    """Of the SAE on the answers of the pairs."""
    warnings: list[str]
    """What the making of the directions warned of."""


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


def read_sae(options: SafetyOptions, model: Any) -> SAE | None:
    """The SAE of --sae where an arm needs it; ValueError when it does not fit the model at the layer."""
    if not options.needs_sae:
        return None
    assert options.sae is not None
    sae = load_sae(options.sae, layer=options.layer)
    check_fits(sae, model, options.layer)
    return sae.to(device=unwrap(model).get_input_embeddings().weight.device)


def make_directions(
    options: SafetyOptions,
    ranks: Ranks,
    model: Any,
    tokenizer: Any,
    pairs: Sequence[SafetyPair],
    sae: SAE | None,
    folder: Path,
) -> MadeDirections:
    """The directions of the vector arms, made once and read again on a later start; the same on every rank.

    Where the whole model lies on every rank, rank 0 makes them; where it stretches over the ranks, all do. ValueError as the
    directions raise it.
    """
    home = folder / FOLDER
    wanted = [arm for arm in options.arms if arm in VECTOR_ARMS]
    layout = layout_of(model)
    if wanted and not ranks.agree((home / INDEX).is_file()):
        if ranks.is_main or layout.same_tokens or layout.lockstep:
            chat = is_chat(options.prompt_style, tokenizer)
            sequences = answer_pairs(pairs, tokenizer, chat=chat)
            saes = {} if sae is None else {options.layer: sae}
            notes = {"contrast": "answers", "chat": chat, **text_notes(tokenizer)}
            with lockstep(model), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fits = contrast_fits(model, sequences, saes)
                fit = fits.get(options.layer)
                made, reports = _directions(options, model, sequences, saes, wanted, notes | fit_notes(fits))
            if ranks.is_main:
                home.mkdir(parents=True, exist_ok=True)
                for arm, direction in made.items():
                    direction.save(home / f"{arm}.safetensors")
                if reports:
                    write_whole(home / ATOMS, "\n".join(reports))
                said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
                index = {"arms": list(made), "fit": fit and fit.to_dict(), "warnings": list(dict.fromkeys(said))}
                write_whole(home / INDEX, json.dumps(index, indent=1) + "\n")
        ranks.barrier()
    found = read_made(options, folder)
    refuse_different("the directions", [digest(path.read_bytes().hex()) for path in found.files.values()], ranks)
    return found


def read_made(options: SafetyOptions, folder: Path) -> MadeDirections:
    """What ``make_directions`` left in a run's folder."""
    home = folder / FOLDER
    wanted = [arm for arm in options.arms if arm in VECTOR_ARMS]
    if not wanted:
        return MadeDirections({}, None, [])
    index = json.loads((home / INDEX).read_text(encoding="utf-8"))
    files = {arm: home / f"{arm}.safetensors" for arm in wanted}
    return MadeDirections(files, index["fit"] and SAEFit(**index["fit"]), index["warnings"])


def pairs_digest(pairs: Sequence[SafetyPair]) -> str:
    """16 hexadecimal digits over all texts, in order."""
    return digest([list(pair) for pair in pairs])


def _directions(
    options: SafetyOptions,
    model: Any,
    sequences: Sequence[MarkedSequence],
    saes: Mapping[int, SAE],
    wanted: Sequence[str],
    notes: Mapping[str, Any],
) -> tuple[dict[str, Direction], list[str]]:
    """Arm -> direction, and a report of the atoms of each one that has some."""
    layer = options.layer
    contrast = collect_contrast(model, sequences, [layer], saes=saes, notes=notes)[layer]
    made, reports = {}, []
    for arm in wanted:
        if arm == "caa":
            made[arm] = caa(contrast)
            continue
        sae = saes[layer]
        made[arm] = (
            all_atoms(contrast, sae) if arm == "sae" else sta(contrast, sae, keep=options.keep, parity=options.parity)
        )
        reports.append(report_atoms(made[arm], contrast, sae))
    return made, reports
