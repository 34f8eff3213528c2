"""``moe-steer measure``: what only a model tells of its experts. ``moe-steer rivals``: how all measures rank the same experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from expert_stats import ExpertScores, heat_map
from expert_stats.rivals import (
    METHODS,
    Rankings,
    agreement_matrix,
    compare_rankings,
    lacking,
    measure_experts,
    one_against_another,
)
from launch.cli.counting import summed
from launch.core.option_checks import check_counts, check_folder, check_names
from launch.core.options import HeldModel, TraceOptions
from launch.core.outcomes import dealt_out, watch_on_terminal
from launch.core.prompt_options import PromptOptions
from launch.core.ranks import Ranks, ranks_of_this_run
from launch.core.wiring import read_any_traces
from launch.jobs.stats import RivalFiles, ScoringOptions
from moe_steer.console import aligned
from reasoning_evals.report import PlainPage, Table, minus, write_plain_page

_EACH = 3
"""Of each method, experts in the table."""


@dataclass(frozen=True, kw_only=True)
class Measure(TraceOptions, PromptOptions, HeldModel):
    """Measure every expert of a model over traces: its gate weight, the size of what it adds, what leaving it out does.

    For 'moe-steer score --by mass, norm or influence'. The divergence takes one forward pass an expert and batch: give few traces.
    """

    model: Annotated[str, tyro.conf.Positional] = "lab"
    """Model folder, GGUF file, hub id, or 'lab' for the embedded model."""
    of: tuple[Literal["weights", "outputs", "divergence"], ...] = ("weights", "outputs", "divergence")
    """Gate weights; norms of what experts add to their layer's output; KL divergence of the next token without each expert."""
    out: str
    """File to write (safetensors)."""
    tokens_per_batch: int = 4096
    """Padded tokens of one forward pass."""

    def run(self) -> int:
        """Write the measures."""
        check_counts(self, ("tokens_per_batch",))
        if not self.of or len(set(self.of)) < len(self.of):
            raise ValueError("--of names what is measured: give at least one, and each once")

        with ranks_of_this_run() as ranks:
            self._measure(ranks)
        return 0

    def _measure(self, ranks: Ranks) -> None:
        from launch.core.session import load_asked

        model, tokenizer = load_asked(self, batch=1, context=None)
        measures = measure_experts(
            model,
            read_any_traces(self.traces, tokenizer, self.arm),
            self.of,
            tokens_per_batch=self.tokens_per_batch,
            **dealt_out(model, ranks),
            watch=watch_on_terminal(ranks.is_main),
        )
        if ranks.is_main:
            measures.save(self.out)
            methods = {"weights": "mass", "outputs": "norm", "divergence": "influence"}
            tokens = int(measures.tokens_P.sum())
            print(f"{', '.join(self.of)} of experts over {len(measures.problems)} problems, {tokens} response tokens")
            print(
                f"wrote {self.out}; next: moe-steer score --by {methods[self.of[0]]} --measures {self.out} "
                "--counts counts.safetensors --out scores.json"
            )


@dataclass(frozen=True, kw_only=True)
class Rivals(RivalFiles):
    """How all measures rank the same experts: rank correlations and overlaps of the best, with intervals, on a page."""

    counts: tuple[str, ...]
    """Counts files; several are added up first."""
    out: str
    """Folder to write rivals.md and rivals.html to."""
    by: tuple[str, ...] = ()
    """Methods to compare; default all for which the files given suffice."""
    top: int = 10
    """How many of the best are compared."""

    def run(self) -> int:
        """Write the pages and print the correlations."""

        check_counts(self, ("top",))
        check_folder(self.out)
        check_names("--by", self.by, METHODS)
        sources, counts = self.sources(), summed(self.counts)
        missing = {name: why for name in self.by or METHODS if (why := lacking(name, sources))}
        if self.by and missing:
            raise ValueError(next(iter(missing.values())))
        options = ScoringOptions()
        found = {name: options.score_by(name, counts, sources) for name in self.by or METHODS if name not in missing}
        rankings = compare_rankings({name: estimate for name, (_, estimate) in found.items()}, self.top)
        page = page_of(rankings, {name: scores for name, (scores, _) in found.items()}, missing)
        write_plain_page(page, Path(self.out), "rivals")
        table = spearman_table(rankings)
        print(f"rank correlation over {len(rankings.cells)} experts, with 95% intervals over problems:")
        print("\n".join(aligned([table.head, *table.rows])))
        for why in missing.values():
            print(f"left out: {why}")
        print(f"page: {Path(self.out) / 'rivals.html'}")
        return 0


def page_of(rankings: Rankings, scores: Mapping[str, ExpertScores], missing: Mapping[str, str]) -> PlainPage:
    """``scores``: by method, as in ``rankings``. ``missing``: methods left out, and why."""
    any_scores = next(iter(scores.values()))
    own = any_scores.model
    notes = [
        f"{len(rankings.cells)} experts that every method scores, of {any_scores.score_LE.size}; layers are absolute, from 0.",
        f"Two rankings that have nothing to do with each other would share {rankings.by_chance:.0%} of their best {rankings.top}.",
        "Intervals are of 95%, over problems, the same resampled problems for all methods. They are of the rankings that so many problems "
        "give: their noise lowers an agreement, but for the part of it that two measures share, which raises it.",
        *(f"Not compared: {name}. {why}." for name, why in missing.items()),
    ]
    tables = {
        "What is compared": _methods(scores),
        "Rank correlation": spearman_table(rankings),
        f"Best {rankings.top} in common": _pairs(rankings.methods, rankings.overlap, ".0%"),
        f"The best {_EACH} of each method, and their ranks under all": _best(rankings, scores),
    }
    figures = {"Agreement": agreement_matrix(rankings.methods, rankings.spearman, rankings.overlap, rankings.top)}
    if "causes" in scores:
        for name in rankings.methods:
            if name in ("npmi", "rice"):
                figures[f"causes against {name}"] = _against(rankings, scores, name)
    figures |= {f"{name}, expert by expert": heat_map(one) for name, one in scores.items()}
    title = f"How {len(rankings.methods)} measures rank the experts of {own['name'] or own['model_type']}"
    return PlainPage(title=title, notes=notes, tables=tables, figures=figures)


def spearman_table(rankings: Rankings) -> Table:
    """Rank correlations with their intervals."""
    return _pairs(rankings.methods, rankings.spearman, "+.2f")


def _pairs(methods: Sequence[str], cells: Sequence[Sequence[tuple[float, float, float]]], form: str) -> Table:
    """A row and a column for each method; 1 where it meets itself."""
    rows = [
        [name, *("1" if other == name else _reach(cell, form) for other, cell in zip(methods, line, strict=True))]
        for name, line in zip(methods, cells, strict=True)
    ]
    return Table(head=["method", *methods], rows=rows)


def _reach(cell: tuple[float, float, float], form: str) -> str:
    value, low, high = (minus(format(one, form)) if np.isfinite(one) else "–" for one in cell)
    return f"{value} ({low} to {high})"


def _methods(scores: Mapping[str, ExpertScores]) -> Table:
    rows = []
    for name, one in scores.items():
        supported = one.supported_LE
        words = one.method["words"] or {"npmi": "nPMI at the markers, shrunk", "rice": "RICE's own formula"}[name]
        passed = int((one.q_LE[supported] <= 0.05).sum())
        rows.append([name, words, str(one.method["problems"]), f"{passed} of {int(supported.sum())}"])
    return Table(head=["method", "score", "problems", "supported with q at most 0.05"], rows=rows)


def _best(rankings: Rankings, scores: Mapping[str, ExpertScores]) -> Table:
    rank_NC = rankings.rank_NC
    chosen = dict.fromkeys(int(at) for row in rank_NC for at in np.argsort(row, kind="stable")[:_EACH])
    names = _names(rankings, scores)
    rows = [[names[at], *(str(int(row[at])) for row in rank_NC)] for at in chosen]
    return Table(head=["layer:expert", *rankings.methods], rows=rows)


def _names(rankings: Rankings, scores: Mapping[str, ExpertScores]) -> list[str]:
    one = next(iter(scores.values()))
    experts = one.score_LE.shape[1]
    return [f"{one.layers[cell // experts]}:{cell % experts}" for cell in rankings.cells]


def _against(rankings: Rankings, scores: Mapping[str, ExpertScores], name: str) -> str:
    at = [rankings.methods.index(method) for method in (name, "causes")]
    first_C, second_C = (rankings.score_NC[row] for row in at)
    proven_C = scores["causes"].q_LE.ravel()[list(rankings.cells)] <= 0.05
    found = _reach(rankings.spearman[at[0]][at[1]], "+.2f")
    words = (f"{name} at the markers", "causes: d outcome / d log gain")
    return one_against_another(
        first_C, second_C, words, _names(rankings, scores), proven_C, f"rank correlation {found}"
    )
