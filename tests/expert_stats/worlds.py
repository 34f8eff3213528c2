"""Simulated routers in which nothing, or what was planted, is associated with a marker: the worlds that tests of evidence must survive.

Two layers of 64 experts, top 4; a marker stands at one token in 40, inside thoughts. In every world but "planted" the routing of a
token does not depend on whether it is the marker, given its problem and its place. "kinds": harder problems have more markers and
other experts. "drift": both change with the position. "bursts": both come in runs. "all": all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import signal, stats

from expert_stats import CountsSignature, Marker, MarkerSet, RoutingCounts, TraceCounts
from expert_stats.evidence import ProblemSums, false_discovery_rate
from expert_stats.trace_counts import NUM_BINS, bins_of

Array = np.ndarray[Any, Any]

WORLDS = ("iid", "bursts", "kinds", "drift", "all")
LAYERS, EXPERTS, TOP_K, TOKENS = 2, 64, 4, 240
PLANTED = np.array([3, 20, 41, 64 + 5, 64 + 30, 64 + 51])
"""Cells that the marker favours in a planted world."""
_CHUNK = 20
SIGNATURE = CountsSignature(
    model={
        "model_type": "simulated",
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "moe_layers": list(range(LAYERS)),
        "hidden_size": 1,
        "name": "world",
    },
    markers=MarkerSet(markers=(Marker("Wait", ((1,),)),), coefficients=(1.0,)).to_dict(),
)


class Tokens(NamedTuple):
    """Some problems, one trace each: marker_PT (bool) and the chosen cells, [P, T, L * K]."""

    marker_PT: Array
    cells_PTX: Array


def tokens_of(world: str, num_problems: int, seed: int, *, planted: float = 0.0, experts: int = 0) -> Iterator[Tokens]:
    """``planted``: added to the log rates of the planted cells at the marker. ``experts``: seed of the router's own constants."""
    own, rng = np.random.default_rng([7, experts]), np.random.default_rng([11, seed])
    num_cells = LAYERS * EXPERTS
    popular_C, kind_C, drift_C = own.normal(0, 0.8, num_cells), own.normal(0, 1, num_cells), own.normal(0, 1, num_cells)
    kinds, drift, bursts = (world in (name, "all") for name in ("kinds", "drift", "bursts"))
    place_T = np.linspace(-1, 1, TOKENS)
    for start in range(0, num_problems, _CHUNK):
        size = min(_CHUNK, num_problems - start)
        hard_P, other_P = rng.normal(size=(2, size))
        rate_PTC = np.tile(popular_C, (size, TOKENS, 1))
        marker_PT = np.full((size, TOKENS), np.log(1 / 40))
        if kinds:
            rate_PTC += 0.8 * np.multiply.outer(0.7 * hard_P + 0.7 * other_P, kind_C)[:, None]
            marker_PT += 0.8 * hard_P[:, None]
        if drift:
            rate_PTC += 0.8 * np.multiply.outer(place_T, drift_C)
            marker_PT += 0.8 * place_T
        if bursts:
            noise = rng.normal(size=(size, TOKENS, num_cells + 1)).astype(np.float32)
            runs = signal.lfilter([0.44], [1, -0.9], noise, axis=1)  # about one deviation, lasting ten tokens
            rate_PTC += 0.8 * runs[..., :-1]
            marker_PT += 0.8 * runs[..., -1]
        is_marker_PT = rng.random((size, TOKENS)) < np.minimum(np.exp(marker_PT), 0.9)
        if planted:
            rate_PTC[..., PLANTED] += planted * is_marker_PT[..., None]
        # The smallest of exponential times with these rates: a draw without replacement.
        times = rng.standard_exponential(rate_PTC.shape, dtype=np.float32) / np.exp(rate_PTC, dtype=np.float32)
        order = np.argpartition(times.reshape(size, TOKENS, LAYERS, EXPERTS), TOP_K, axis=-1)[..., :TOP_K]
        cells = order + EXPERTS * np.arange(LAYERS)[:, None]
        yield Tokens(is_marker_PT, cells.reshape(size, TOKENS, -1))


def counts_of_world(world: str, num_problems: int, seed: int, **options: Any) -> RoutingCounts:
    """Routing counts of a run in a world."""
    bins_T, traces = bins_of(np.arange(TOKENS), 0, TOKENS), []
    total_B = np.bincount(bins_T, minlength=NUM_BINS)
    for marker_PT, cells_PTX in tokens_of(world, num_problems, seed, **options):
        for marker_T, cells_TX in zip(marker_PT, cells_PTX, strict=True):
            flat = (bins_T[:, None] * (LAYERS * EXPERTS) + cells_TX).ravel()
            expert_BC = np.bincount(flat, minlength=NUM_BINS * LAYERS * EXPERTS)
            joint_C = np.bincount(cells_TX[marker_T].ravel(), minlength=LAYERS * EXPERTS)
            traces.append(
                TraceCounts.pack(
                    f"p{len(traces)}#0",
                    expert_BC.reshape(NUM_BINS, LAYERS, EXPERTS),
                    joint_C.reshape(1, LAYERS, EXPERTS),
                    np.bincount(bins_T[marker_T], minlength=NUM_BINS)[None],
                    total_B,
                )
            )
    return RoutingCounts(signature=SIGNATURE, traces=tuple(traces))


def sums_of_world(world: str, num_problems: int, seed: int, **options: Any) -> tuple[Array, Array, Array, int]:
    """joint_MC, expert_C, marker_M, total of a long run: what scores are estimates of."""
    cells = LAYERS * EXPERTS
    joint_C, expert_C, marker, total = np.zeros(cells, np.int64), np.zeros(cells, np.int64), 0, 0
    for marker_PT, cells_PTX in tokens_of(world, num_problems, seed, **options):
        expert_C += np.bincount(cells_PTX.ravel(), minlength=cells)
        joint_C += np.bincount(cells_PTX[marker_PT].ravel(), minlength=cells)
        marker, total = marker + int(marker_PT.sum()), total + marker_PT.size
    return joint_C[None], expert_C, np.array([marker]), total


def pool_of_world(world: str, num_problems: int, seed: int, **options: Any) -> ProblemSums:
    """Sums of many problems: a population whose score is known exactly, from which ``drawn`` makes a run in a millisecond."""
    cells = LAYERS * EXPERTS
    joint, expert, marker = [], [], []
    for marker_PT, cells_PTX in tokens_of(world, num_problems, seed, **options):
        for marker_T, cells_TX in zip(marker_PT, cells_PTX, strict=True):
            joint.append(np.bincount(cells_TX[marker_T].ravel(), minlength=cells).astype(np.uint16))
            expert.append(np.bincount(cells_TX.ravel(), minlength=cells).astype(np.uint32))
            marker.append(int(marker_T.sum()))
    marker_PM, total_P = np.array(marker)[:, None], np.full(len(marker), TOKENS)
    names = tuple(f"p{number}" for number in range(len(marker)))
    sums = (np.array(joint)[:, None], np.array(expert), marker_PM, total_P)
    return ProblemSums(names, ("",) * len(marker), *sums, {}, np.zeros(1, np.int64))


def drawn(pool: ProblemSums, num_problems: int, rng: np.random.Generator) -> ProblemSums:
    """A run of problems drawn from the pool, with replacement; without what tests of association need."""
    rows = rng.integers(0, len(pool.problems), num_problems)
    names = tuple(f"p{number}" for number in range(num_problems))
    sums = (pool.joint_PMC[rows], pool.expert_PC[rows], pool.marker_PM[rows], pool.total_P[rows])
    return ProblemSums(names, ("",) * num_problems, *sums, {}, pool.opening_M)


def pooled_q(joint_C: Array, expert_C: Array, marker: int, total: int) -> Array:
    """The q of version 1: one urn of all tokens (hypergeometric), Benjamini-Hochberg. What no test may go back to."""
    return false_discovery_rate(stats.hypergeom.sf(joint_C - 1, total, expert_C, marker))
