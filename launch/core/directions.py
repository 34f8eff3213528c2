"""The directions of a job: made once in its folder, read again on a later start, the same on every rank. Some are made of decisions that
come back when they are sampled anew (``moe_steer.contrasts.refining``)."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from launch.core.session import Session, unclaimed_when_refused
from moe_steer import Direction
from moe_steer.backends import layout_of, lockstep
from moe_steer.console import follow, tracked
from moe_steer.contrasts import (
    Behaviour,
    MarkedSequence,
    Stability,
    collect_contrast,
    contrast_fits,
    fit_notes,
    shown_by,
    sites_of,
    stable_sites,
)
from moe_steer.directions import all_atoms, caa, report_atoms, single_atom, sta
from moe_steer.files import write_whole
from moe_steer.json_files import check_types, quoted, read_json, short
from moe_steer.layers import unwrap
from moe_steer.saes import SAE, SAEFit, check_fits, fit_lines, layers_among, load_sae
from moe_steer.thinking import token_tags
from moe_steer.tokens import text_notes
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig
from reasoning_evals.runs import sample_seed

FOLDER = "directions"
INDEX = "index.json"
ATOMS = "atoms.md"


class NewDirections(NamedTuple):
    """What a job made."""

    directions: Sequence[tuple[str, Direction]]
    """Method and direction, in the order of the report."""
    reports: Sequence[str] = ()
    """A table of the atoms of each direction that has some."""
    fits: Mapping[int, SAEFit] = {}
    """Layer of an SAE -> its fit on the contrasted texts."""


class JobDirections(NamedTuple):
    """What lies in the job's folder of directions."""

    files: dict[str, list[tuple[int, str]]]
    """Method -> (layer, file name)."""
    fits: dict[int, SAEFit]
    """Layer of an SAE -> its fit on the contrasted texts."""
    warnings: list[str]
    """Warnings while they were made."""


def read_sae(path: str, model: Any, layer: int | None, layer_option: str) -> SAE:
    """The SAE of a file or folder; ValueError when it does not fit the model, or does not say its layer and ``layer`` is None.

    ``layer_option``: the option that says the layer, for the message.
    """
    if layer is None and (layers := layers_among(path)):
        raise ValueError(
            f"{path} holds the SAEs of layers {', '.join(map(str, layers))}: choose one with {layer_option}"
        )
    sae = load_sae(path, layer=layer)
    if sae.about.layer is None:
        raise ValueError(f"{path} does not say which layer its SAE reads: give {layer_option}")
    check_fits(sae, model, sae.about.layer)
    return sae.to(device=unwrap(model).get_input_embeddings().weight.device)


def from_contrast(
    session: Session,
    sequences: Sequence[MarkedSequence],
    methods: Sequence[str],
    layers: Sequence[int],
    saes: Mapping[int, SAE],
    notes: Mapping[str, Any],
    **of_sta: Any,
) -> NewDirections:
    """The directions from two sides of texts by these methods, in their order: ``caa`` at every one of ``layers``, ``sta`` (with the options
    ``of_sta``), ``sae`` and ``atom`` at the layers of the ``saes``. ``notes``: what their headers say of the texts. ValueError for an SAE
    that explains nothing."""
    fits = contrast_fits(session.model, sequences, saes)
    _say(session, fits)
    contrasts = collect_contrast(
        session.model,
        sequences,
        sorted({*saes, *(layers if "caa" in methods else ())}),
        saes=saes,
        notes={**notes, **text_notes(session.tokenizer), **fit_notes(fits)},
        progress=follow("reading answers", session.ranks.rank),
    )
    by_atoms: dict[str, Callable[[Any, SAE], Direction]] = {
        "sta": partial(sta, **of_sta),
        "sae": all_atoms,
        "atom": single_atom,
    }
    made: list[tuple[str, Direction]] = []
    reports = []
    for method in methods:
        if method == "caa":
            made += [(method, caa(contrasts[layer])) for layer in layers]
        for layer, one in saes.items() if method in by_atoms else ():
            made.append((method, by_atoms[method](contrasts[layer], one)))
            reports.append(report_atoms(made[-1][1], contrasts[layer], one))
    return NewDirections(made, reports, dict(fits))


def make_once(session: Session, make: Callable[[], NewDirections]) -> JobDirections:
    """The directions of the job. ``make`` runs on the first start alone, with warnings recorded.

    Where every rank holds the whole model, rank 0 makes them; where the model is spread over the ranks, all do. ValueError as
    ``make`` raises it; the folder is then free for other options.
    """
    home = session.folder / FOLDER
    if session.ranks.broadcast((home / INDEX).is_file()):
        made = read_made(home)
        _say(session, made.fits)
    else:
        with unclaimed_when_refused(session.folder, home / INDEX, session.ranks):
            _make(session, make, home)
        session.ranks.barrier()
        made = read_made(home)
    session.ranks.assert_same("the directions", digest_of(home, made))
    return made


def _make(session: Session, make: Callable[[], NewDirections], home: Path) -> None:
    layout = layout_of(session.model)
    if not (session.ranks.is_main or layout.same_tokens or layout.lockstep):
        return
    with lockstep(session.model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new = make()
    if not session.ranks.is_main:
        return
    home.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[tuple[int, str]]] = {}
    for method, direction in new.directions:
        name = f"{method}-L{direction.layer}.safetensors"
        direction.save(home / name)
        files.setdefault(method, []).append((direction.layer, name))
    if new.reports:
        write_whole(home / ATOMS, "\n".join(new.reports))
    said = list(dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning)))
    _write_index(home, JobDirections(files, dict(new.fits), said))


def _write_index(home: Path, made: JobDirections) -> None:
    fits = {str(layer): fit.to_dict() for layer, fit in made.fits.items()}
    index = {"files": made.files, "fits": fits, "warnings": made.warnings}
    write_whole(home / INDEX, json.dumps(index, indent=1) + "\n")


def given_files(home: Path, methods: Sequence[str]) -> JobDirections:
    """The directions of these methods that another run left in a folder. ValueError where it has none of one of them."""
    made = read_made(home)
    for method in methods:
        if not made.files.get(method):
            raise ValueError(
                f"{home} holds no direction of {method}, it has {', '.join(made.files) or 'none'}: give the folder 'directions' of a "
                "run of this job, or leave the method out"
            )
    return made._replace(files={method: made.files[method] for method in methods})


def take_directions(session: Session, folder: str, methods: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """Copy another run's directions into this one's folder, once; method -> (layer, file name)."""
    home = session.folder / FOLDER
    if session.ranks.is_main and not (home / INDEX).is_file():
        made = given_files(Path(folder), methods)
        home.mkdir(parents=True, exist_ok=True)
        for _, name in (entry for entries in made.files.values() for entry in entries):
            shutil.copyfile(Path(folder, name), home / name)
        _write_index(home, made)
    session.ranks.barrier()
    return read_made(home).files


def read_made(home: Path) -> JobDirections:
    """What ``make_once`` left in a folder of directions; nothing where it made none."""
    if not (home / INDEX).is_file():
        return JobDirections({}, {}, [])
    index = read_json(home / INDEX, "remove the folder of directions, and start the job again")
    try:
        check_types(index, "", {"files": dict, "fits": dict, "warnings": list[str]})
        check_types(index["files"], "files", dict.fromkeys(index["files"], list[list]))
        check_types(index["fits"], "fits", dict.fromkeys(index["fits"], dict))
        files = {method: [_entry(*entry) for entry in entries] for method, entries in index["files"].items()}
        fits = {int(layer): SAEFit(**fit) for layer, fit in index["fits"].items()}
        return JobDirections(files, fits, index["warnings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{home / INDEX} lists no directions ({short(error)}): remove the folder, and start the job again"
        ) from error


def _entry(layer: int, name: str) -> tuple[int, str]:
    if type(layer) is not int or not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{quoted([layer, name])} is no layer and file of the same folder")
    return layer, name


def _say(session: Session, fits: Mapping[int, SAEFit]) -> None:
    for layer, fit in fits.items():
        for line in fit_lines(layer, fit):
            session.ranks.say(f"     {line}")


def digest_of(home: Path, made: JobDirections) -> str:
    """sha256 over the direction files."""
    digest = hashlib.sha256()
    for entries in made.files.values():
        for _, name in entries:
            digest.update((home / name).read_bytes())
    return digest.hexdigest()


_DECISION_TOKENS = 12
"""New tokens of a re-generation: words that lead up to a switch, and the switch."""


def keep_stable(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[MarkedSequence],
    switch_words: Sequence[str],
    *,
    samples: int,
    share: float,
    temperature: float,
    top_p: float,
    batch_size: int = 64,
) -> tuple[list[MarkedSequence], list[Stability]]:
    """The sequences with the sites at which the behaviour comes back in ``share`` of ``samples`` re-generations, and how many those
    are. The samples of a site share its prefill."""
    tags = token_tags(tokenizer)
    assert tags is not None, "decisions are made in thoughts"
    by_name = {item.name: item for item in sequences}
    asked = [
        Request(
            prompt_ids=by_name[name].token_ids[: place + 1],
            seed=sample_seed(0, "decision", f"{name}@{place}", number),
            key=(name, place),
        )
        for name, place in sites_of(sequences)
        for number in range(samples)
    ]
    config = SamplingConfig(
        temperature=temperature, top_p=top_p, max_new_tokens=_DECISION_TOKENS, batch_size=batch_size
    )
    found: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    sampled = InProcessSampler(model, tokenizer).sample(asked, config)
    for sample in tracked(sampled, "re-generating decisions", total=len(asked)):
        found.setdefault(sample.key, []).append(sample.token_ids)
    behaviour = Behaviour.of(tokenizer, tags, switch_words)
    return stable_sites(sequences, shown_by(sequences, behaviour, found), share)
