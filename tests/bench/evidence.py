"""Evidence for experts, long: simulated worlds (levels, power, coverage), and speed and size at R1's width.

python -m tests.bench.evidence worlds [RUNS]     # table of tests/expert_stats/worlds.py; 60 runs take about 3 minutes
python -m tests.bench.evidence speed [TRACES]    # 58 x 256 experts, 8 markers
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "expert_stats"))
from expert_stats import CountsSignature, Marker, MarkerSet, RoutingCounts, TraceCounts, score_experts
from expert_stats.evidence import Measure
from expert_stats.trace_counts import NUM_BINS
from worlds import PLANTED, WORLDS, counts_of_world, pooled_q, sums_of_world

_LAYERS, _EXPERTS, _TOP_K, _MARKERS = 58, 256, 8, 8


def worlds(num_runs: int) -> None:
    """One line a world and number of problems."""
    measure = Measure(np.array([1.0]))
    print(
        "world     planted  n  | p<.05  p<.001 | any q<.05  old q | power  fdp | cover all  best 2 alone  best 2 bound"
    )
    for world, planted in [*((name, 0.0) for name in WORLDS), ("all", 1.2)]:
        truth_C = measure.score(*sums_of_world(world, 4000, 999, planted=planted))
        for num_problems in (30, 100, 300):
            rows = [_run(world, num_problems, seed, planted, truth_C) for seed in range(num_runs)]
            means = np.nanmean(np.array(rows), axis=0)
            print(
                f"{world:8}  {planted:7.1f} {num_problems:3d} | {means[0]:.3f}  {means[1]:.4f} |   {means[2]:.3f}    {means[3]:.3f} | "
                f"{means[4]:.2f}  {means[5]:.3f} |   {means[6]:.3f}       {means[7]:.3f}         {means[8]:.3f}",
                flush=True,
            )


def _run(world: str, num_problems: int, seed: int, planted: float, truth_C: Any) -> list[float]:
    scores = score_experts(counts_of_world(world, num_problems, seed, planted=planted))
    p_C, q_C, low_C, high_C, bound_C = (
        table.ravel() for table in (scores.p_MLE, scores.q_MLE, scores.low_LE, scores.high_LE, scores.bound_LE)
    )
    null = np.ones(len(p_C), np.bool_)
    null[PLANTED] = not planted
    found = q_C <= 0.05
    old = (
        pooled_q(scores.joint_MLE[0].ravel(), scores.expert_LE.ravel(), scores.occurrences[0], scores.num_tokens)
        <= 0.05
    )
    best = [row.layer * 64 + row.expert for row in scores.ranking()[:2]]
    inside = (low_C <= truth_C) & (truth_C <= high_C)
    return [
        float((p_C[null] < 0.05).mean()),
        float((p_C[null] < 0.001).mean()),
        float(found[null].any()),
        float(old[null].any()),
        float(found[PLANTED].mean()) if planted else float("nan"),
        float((found & null).sum() / max(found.sum(), 1)),
        float(inside.mean()),
        float(inside[best].mean()),
        float(all(bound_C[at] <= truth_C[at] for at in best)),
    ]


def wide_counts(num_traces: int) -> RoutingCounts:
    """Traces of R1's width: 9,200 tokens, heavy-tailed experts that vary by trace and part; one token opens each."""
    rng, cells = np.random.default_rng(0), _LAYERS * _EXPERTS
    names = ["<think>", "</think>", "Alternatively", "Wait", "Hmm", "But", "So", "Let"]
    coefficients = (1.0, -1.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    markers = MarkerSet(markers=tuple(Marker(name, ((n,),)) for n, name in enumerate(names)), coefficients=coefficients)
    model = {
        "model_type": "deepseek_v3", "num_layers": 61, "num_experts": _EXPERTS, "top_k": _TOP_K,
        "moe_layers": list(range(3, 61)), "hidden_size": 7168, "name": "wide",
    }  # fmt: skip
    popular = rng.normal(0, 0.7, (_LAYERS, _EXPERTS))
    often = np.array([1, 1, 2, 9, 4, 6, 8, 3])  # some 13% of joint counts are not zero
    traces = []
    for number in range(num_traces):
        rate = np.exp(popular + rng.normal(0, 0.4, (NUM_BINS, _LAYERS, _EXPERTS)))
        rate /= rate.sum(-1, keepdims=True)
        total_B = np.array([2, *[1533] * (NUM_BINS - 1)])
        expert_BLE = rng.poisson(rate * (total_B * _TOP_K)[:, None, None])
        seen_M = np.maximum(rng.poisson(often), 1)
        joint_MLE = rng.poisson(rate[1] * (seen_M * _TOP_K)[:, None, None])
        marker_MB = np.array([np.bincount(rng.integers(1, NUM_BINS, n), minlength=NUM_BINS) for n in seen_M])
        name, family = f"task{number % 3}/p{number}#0", f"task{number % 3}"
        traces.append(TraceCounts.pack(name, expert_BLE, joint_MLE, marker_MB, total_B, family=family))
    assert traces[0].expert_and_joint(_LAYERS, _EXPERTS)[0].size == NUM_BINS * cells
    return RoutingCounts(signature=CountsSignature(model=model, markers=markers.to_dict()), traces=tuple(traces))


def speed(num_traces: int) -> None:
    """Size of the file; CPU seconds and peak memory of scoring, each in its own part of the table."""
    start = time.process_time()
    counts = wide_counts(num_traces)
    print(f"simulated {num_traces} traces in {time.process_time() - start:.0f} cpu-s")
    size = sum(len(trace.packed) for trace in counts.traces)
    print(
        f"packed counts: {size / 1e6:.1f} MB, {sum((t.marker_MB > 0).sum() for t in counts.traces) / num_traces:.0f} bins with markers a trace"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "wide.safetensors")
        counts_file = _save_unchecked(counts, path)
        print(f"counts file: {counts_file / 1e6:.1f} MB")
        start = time.process_time()
        read = _load_unchecked(path)
        print(f"read: {time.process_time() - start:.2f} cpu-s")
    del counts
    start = time.process_time()
    scores = score_experts(read)
    used = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"score, evidence, bootstrap, bounds, families: {used:.2f} cpu-s; peak memory of the process {memory:.2f} GB")
    print(f"supported: {int(scores.supported_LE.sum())} of {scores.supported_LE.size}; best: {scores.ranking()[0]}")


def _save_unchecked(counts: RoutingCounts, path: Path) -> int:
    """Poisson counts break the laws of top-k: what is measured is size and time, not sense."""
    from expert_stats.counts_files import CountsParts, save_counts

    parts = CountsParts(
        signature=counts.signature, traces=counts.traces, references=counts.references, versions=counts.versions
    )
    save_counts(parts, path)
    return path.stat().st_size


def _load_unchecked(path: Path) -> RoutingCounts:
    from expert_stats.counts_files import load_counts

    return load_counts(path, lambda parts: RoutingCounts(**parts))


if __name__ == "__main__":
    what, number = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    worlds(number or 60) if what == "worlds" else speed(number or 1000)
