"""From unsteered answers to directions: pairs of concise and verbose right thoughts, and the decisions to stop or go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_stats import Trace
from launch.overthinking.options import PAIR_METHODS, OverthinkingOptions
from launch.steps import Bench
from launch.wiring import traces_of
from moe_steer.backends import lockstep
from moe_steer.contrasts import (
    MarkedSequence,
    collect_contrast,
    concise_and_verbose,
    contrast_fits,
    decision_sites,
    fit_notes,
    thought_pairs,
)
from moe_steer.directions import Direction, all_atoms, caa, report_atoms, single_atom, sta
from moe_steer.saes import SAE, SAEFit, fit_lines
from moe_steer.tokens import text_notes
from reasoning_evals.runs import GradeRow, read_generations
from reasoning_evals.whole_files import write_whole

FOLDER = "directions"
INDEX = "index.json"
ATOMS = "atoms.md"
LENGTH_RATIO = 1.5
"""A verbose thought is at least so many times as long as the concise one of the same problem."""


def make_directions(
    bench: Bench,
    rows: Sequence[GradeRow],
    methods: Sequence[str],
    layers: Sequence[int],
    sae: SAE | None,
    options: OverthinkingOptions,
) -> dict[str, list[tuple[int, str]]]:
    """Method -> (layer, file name), files in the run's folder of directions; made once, read again on a later start.

    caa and decision for every layer, the methods that need an SAE for the SAE's layer, with a table of their atoms in atoms.md.
    ValueError when the answers hold no pair or no decision, and for an SAE that explains nothing.
    """
    folder = bench.folder / FOLDER
    index = folder / INDEX
    if bench.ranks.agree(index.is_file()):
        files = read_index(folder)
        headers = (Direction.load(folder / name).header for entries in files.values() for _, name in entries)
        if known := sae_fit(headers):
            _say_fits(bench, {known[0]["layer"]: known[1]})
        return files
    folder.mkdir(parents=True, exist_ok=True)
    traces = _right_traces(bench, rows)
    made: list[tuple[str, Direction]] = []
    reports: list[str] = []
    with lockstep(bench.model):
        if any(method in PAIR_METHODS for method in methods):
            of_pairs, reports = _from_pairs(bench, traces, methods, layers, sae, options)
            made += of_pairs
        if "decision" in methods:
            sequences = decision_sites(traces, bench.tokenizer, switch_words=options.switch_words)
            _refuse_empty(
                sequences, f"no thought stops and goes on at {', '.join(options.switch_words)}: name its words"
            )
            notes = {"contrast": "decisions", "switch_words": list(options.switch_words), **text_notes(bench.tokenizer)}
            contrasts = collect_contrast(bench.model, sequences, layers, weight="token", notes=notes)
            made += [("decision", caa(contrasts[layer])) for layer in layers]
    files = {}
    for method, direction in made:
        name = f"{method}-L{direction.layer}.safetensors"
        if bench.ranks.is_main:
            direction.save(folder / name)
        files.setdefault(method, []).append((direction.layer, name))
    ordered = {method: files[method] for method in methods if method in files}
    if bench.ranks.is_main:
        if reports:
            write_whole(folder / ATOMS, "\n".join(reports))
        write_whole(index, json.dumps(ordered, indent=1) + "\n")
    bench.ranks.barrier()
    return ordered


def read_index(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """What ``make_directions`` returned, from its folder."""
    found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return {method: [(int(layer), str(file)) for layer, file in entries] for method, entries in found.items()}


def sae_fit(headers: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], SAEFit] | None:
    """The SAE that the directions with these headers were read by, and its fit on their texts; None where none was."""
    for header in headers:
        sae = header.get("sae")
        if sae and (noted := header.get("notes", {}).get(f"sae_fit_{sae['layer']}")):
            return sae, SAEFit(**noted)
    return None


def _from_pairs(
    bench: Bench,
    traces: Sequence[Trace],
    methods: Sequence[str],
    layers: Sequence[int],
    sae: SAE | None,
    options: OverthinkingOptions,
) -> tuple[list[tuple[str, Direction]], list[str]]:
    """(method and direction), and a report of the atoms of each one that has some."""
    sequences = thought_pairs(concise_and_verbose(traces, min_ratio=LENGTH_RATIO))
    _refuse_empty(
        sequences,
        f"no problem has two right thoughts of which one is {LENGTH_RATIO:g} times as long: raise --samples-identification",
    )
    wanted = set(layers) if "caa" in methods else set()
    saes: dict[int, SAE] = {}
    if sae is not None:
        assert sae.about.layer is not None
        saes[sae.about.layer] = sae
        wanted.add(sae.about.layer)
    fits = contrast_fits(bench.model, sequences, saes)
    _say_fits(bench, fits)
    notes = {"contrast": "thoughts", **text_notes(bench.tokenizer), **fit_notes(fits)}
    contrasts = collect_contrast(bench.model, sequences, sorted(wanted), saes=saes, notes=notes)
    made = [("caa", caa(contrasts[layer])) for layer in layers] if "caa" in methods else []
    reports = []
    for layer, one in saes.items():
        contrast = contrasts[layer]
        of_atoms: list[tuple[str, Direction]] = []
        if "sta" in methods:
            of_atoms.append(("sta", sta(contrast, one, keep=options.kept)))
        if "sae" in methods:
            of_atoms.append(("sae", all_atoms(contrast, one)))
        if "atom" in methods:
            of_atoms.append(("atom", single_atom(contrast, one)))
        made += of_atoms
        reports += [report_atoms(direction, contrast, one) for _, direction in of_atoms]
    return made, reports


def _say_fits(bench: Bench, fits: Mapping[int, SAEFit]) -> None:
    for layer, fit in fits.items():
        for line in fit_lines(layer, fit):
            bench.ranks.say(f"     {line}")


def _right_traces(bench: Bench, rows: Sequence[GradeRow]) -> list[Trace]:
    """The right answers whose thought is closed, in the order of the problems' names."""
    right = {(row.problem_id, row.sample_idx) for row in rows if row.correct and row.state == "closed"}
    completions = [
        item
        for item in read_generations(bench.folder / "identification")
        if (item.problem_id, item.sample_idx) in right
    ]
    completions.sort(key=lambda item: (item.problem_id, item.sample_idx))
    return traces_of(completions, bench.tokenizer)


def _refuse_empty(sequences: Sequence[MarkedSequence], why: str) -> None:
    if not any(sequence.positive for sequence in sequences) or not any(sequence.negative for sequence in sequences):
        raise ValueError(why)


def files_digest(folder: Path, files: Mapping[str, Any]) -> str:
    """sha256 over the direction files, for comparing ranks."""
    digest = hashlib.sha256()
    for entries in files.values():
        for _, name in entries:
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()
