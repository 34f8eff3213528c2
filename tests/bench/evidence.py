"""Evidence for experts, long: simulated worlds (levels, power, coverage), and speed and size at R1's width.

python -m tests.bench.evidence worlds [RUNS]     # table of tests/expert_stats/worlds.py; 60 runs take about 8 minutes
python -m tests.bench.evidence small [RUNS]      # coverage by how many joint selections a cell is expected to have, few problems
python -m tests.bench.evidence chosen [RUNS]     # intervals from problems that did not choose the expert; 500 runs take about 4 minutes
python -m tests.bench.evidence speed [TRACES]    # 58 x 256 experts, 8 markers

Measured with 60 runs a cell (30, 100 and 300 problems):
- a false q <= .05 in .00 to .05 of runs in every world without an association (pooled tokens: .03 to .10 in iid and bursts, .35 to 1.00
  in the others); p < .05 in .025 to .042, p < .001 in at most .0008 of cells;
- planted: power .46, 1.00, 1.00; false discovery proportion .000, .002, .002;
- 95% intervals of all experts cover .929 to .958 with true scores from 4,000 problems, whose own error costs .01 at 300 problems: the
  world "all" at 300, .929 there, covers .943 with 20,000 (30 runs);
- the lower bounds of the best two, both, hold in .92 to 1.00 (their own intervals, which ignore the choice: .40 to .98);
- small, world "all": with 8 problems .99 to .94 up to 8 expected joint selections, .92 and .90 above; with 15 .97 to .94, .92 and .91; with
  30 .97 to .94, .92 from 32 selections on; with 50 .93 to .96 throughout. World iid: .94 to .99 from 8 problems on.
- chosen, 500 runs, the best two, halves of 30, 100, 300 problems and as many others: iid .963, .957, .945 and .947, .949, .957; bursts .966,
  .956, .954 and .952, .948, .944; kinds .942, .925, .958 and .941, .946, .964; drift .972, .940, .956 and .960, .970, .951; all .934, .942,
  .963 and .946, .955, .963; planted: iid .964, .958, .957 and .953, .963, .956; all .950, .954, .958 and .957, .952, .959. The lower end
  lies .55 to .77 (others) and .68 to .99 (halves) times as far below the score as the simultaneous bound.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "expert_stats"))
from expert_stats import CountsSignature, Marker, MarkerSet, RoutingCounts, TraceCounts, score_experts
from expert_stats.evidence import (
    Estimate,
    MarkerEstimate,
    Measure,
    ProblemSums,
    halves_of,
    measured_by_halves,
    measured_elsewhere,
    uncertainty_of,
)
from expert_stats.trace_counts import NUM_BINS
from worlds import (
    EXPERTS,
    LAYERS,
    PLANTED,
    WORLDS,
    counts_of_world,
    drawn,
    pool_of_world,
    pooled_q,
    sums_of_world,
)

_LAYERS, _EXPERTS, _TOP_K, _MARKERS = 58, 256, 8, 8
_TRUTH = 20_000
"""Problems that the true scores are taken from: their own error would show as missing coverage (4,000 cost .01 at 300 problems)."""


def worlds(num_runs: int) -> None:
    """One line a world and number of problems."""
    measure = Measure(np.array([1.0]))
    print(
        "world     planted  n  | p<.05  p<.001 | any q<.05  old q | power  fdp | cover all  best 2 alone  best 2 bound"
    )
    for world, planted in [*((name, 0.0) for name in WORLDS), ("all", 1.2)]:
        truth_C = measure.score(*sums_of_world(world, _TRUTH, 999, planted=planted))
        for num_problems in (30, 100, 300):
            rows = [_run(world, num_problems, seed, planted, truth_C) for seed in range(num_runs)]
            means = np.array(rows).mean(axis=0)
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


def small(num_runs: int) -> None:
    """Coverage of the two-sided interval and of one-sided ends, by the joint selections that a cell is expected to have."""
    measure, edges = Measure(np.array([1.0])), [0, 1, 2, 4, 8, 16, 32, 10**9]
    print("world     n  | expected joint | cells  covered  below low  above high")
    for world in ("iid", "all"):
        totals = sums_of_world(world, _TRUTH, 999)
        truth_C = measure.score(*totals)
        for num_problems in (8, 15, 30, 100):
            inside: list[Any] = []
            for seed in range(num_runs):
                scores = score_experts(counts_of_world(world, num_problems, seed), missing_marker="skip")
                low_C, high_C = scores.low_LE.ravel(), scores.high_LE.ravel()
                inside.append([(low_C <= truth_C) & (truth_C <= high_C), truth_C < low_C, truth_C > high_C])
            share_XC = np.array(inside).mean(axis=0)
            expected_C = totals[0][0] * num_problems / _TRUTH
            for start, stop in pairwise(edges):
                own = (expected_C >= start) & (expected_C < stop)
                if own.any():
                    name = f"{start} to {stop}" if stop < 10**9 else f"{start} or more"
                    covered, below, above = share_XC[:, own].mean(axis=1)
                    print(
                        f"{world:8} {num_problems:3d}  | {name:14} | {own.sum():5d}  {covered:.3f}    {below:.3f}      {above:.3f}",
                        flush=True,
                    )


_BOUNDED = 40
"""Runs of `chosen` whose simultaneous bounds are computed."""


def chosen(num_runs: int) -> None:
    """What chooses and what measures are drawn from a pool of problems, whose score is the truth, exactly.

    halves: a half of the problems chooses, the other measures. elsewhere: all choose, as many others measure.
    """
    measure, layers = Measure(np.array([1.0])), tuple(range(LAYERS))
    print(
        "world     planted   n  | halves: best 2   best 10  width | elsewhere: best 2   best 10  width | bound: both hold  below"
    )
    for world, planted in [*((name, 0.0) for name in WORLDS), ("iid", 1.2), ("all", 1.2)]:
        pool = pool_of_world(world, _TRUTH, 999, planted=planted)
        truth_C = measure.score(*pool.rows(slice(None)))

        def estimate_of(sums: ProblemSums) -> Estimate:
            return MarkerEstimate(sums, measure, None)

        for num_problems in (30, 100, 300):
            rng = np.random.default_rng(num_problems)
            rows: dict[str, list[tuple[int, bool, float]]] = {"halves": [], "elsewhere": []}
            bounds = []
            for run in range(num_runs):
                one, other = (estimate_of(drawn(pool, num_problems, rng)) for _ in range(2))
                score_C, own_C = one.score(slice(None)), one.supported(slice(None))
                found = {
                    "halves": measured_by_halves(one, halves_of(one), layers, EXPERTS),
                    "elsewhere": measured_elsewhere(score_C, own_C, other, layers, EXPERTS)[:10],
                }
                for name, fresh in found.items():
                    for item in fresh:
                        at = item.layer * EXPERTS + item.expert
                        rows[name].append((item.rank, item.low <= truth_C[at] <= item.high, item.high - item.low))
                if run < _BOUNDED:
                    candidates_C = np.asarray(one.sums.joint_PMC.any((0, 1)))
                    bound_C = uncertainty_of(one, candidates_C, own_C).bound_C
                    best = [item.layer * EXPERTS + item.expert for item in found["elsewhere"][:2]]
                    bounds.append((np.all(bound_C[best] <= truth_C[best]), np.mean(score_C[best] - bound_C[best])))
            parts = []
            for table in map(np.array, rows.values()):
                two = table[table[:, 0] <= 2]
                parts.append(
                    f"{two[:, 1].mean():.3f} ({len(two)})     {table[:, 1].mean():.3f}  {np.median(two[:, 2]):.3f}"
                )
            held, below = np.array(bounds).mean(axis=0)
            print(
                f"{world:8}  {planted:7.1f} {num_problems:3d}  | {'  | '.join(parts)} | {held:.2f}  {below:.3f}",
                flush=True,
            )


def wide_counts(num_traces: int) -> RoutingCounts:
    """Traces of R1's width: 9,200 tokens, heavy-tailed experts that vary by trace and part; one token opens each."""
    rng = np.random.default_rng(0)
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
        seen_M = np.maximum(rng.poisson(often), 1)
        places = [rng.integers(1, NUM_BINS, count) for count in seen_M]
        marker_MB = np.array([np.bincount(place, minlength=NUM_BINS) for place in places])
        expert_BLE = np.zeros((NUM_BINS, _LAYERS, _EXPERTS), np.int64)
        joint_MLE = np.zeros((_MARKERS, _LAYERS, _EXPERTS), np.int64)
        for marker, place in enumerate(places):
            for at in place.tolist():
                times = rng.standard_exponential((_LAYERS, _EXPERTS)) / rate[at]
                chosen = np.argpartition(times, _TOP_K, axis=-1)[:, :_TOP_K]  # distinct experts of one token
                layers = np.arange(_LAYERS)[:, None]
                joint_MLE[marker][layers, chosen] += 1
                expert_BLE[at][layers, chosen] += 1
        rest_B = total_B - marker_MB.sum(0)
        for _ in range(int(rest_B[0])):  # of the few tokens of the opening each takes an expert once
            chosen = np.argpartition(rng.standard_exponential((_LAYERS, _EXPERTS)) / rate[0], _TOP_K, axis=-1)
            np.add.at(expert_BLE[0], (np.arange(_LAYERS)[:, None], chosen[:, :_TOP_K]), 1)
        drawn = rng.multinomial((rest_B[1:] * _TOP_K)[:, None], rate[1:])
        over = np.maximum(
            drawn - rest_B[1:, None, None], 0
        )  # a token takes an expert once: what is over goes to the rarest
        np.put_along_axis(over, drawn.argmin(-1)[..., None], -over.sum(-1)[..., None], axis=-1)
        expert_BLE[1:] += drawn - over
        name, family = f"task{number % 3}/p{number}#0", f"task{number % 3}"
        traces.append(TraceCounts.pack(name, expert_BLE, joint_MLE, marker_MB, total_B, family=family))
    return RoutingCounts(signature=CountsSignature(model=model, markers=markers.to_dict()), traces=tuple(traces))


def speed(num_traces: int) -> None:
    """Size of the file; CPU seconds and peak memory of scoring, each in its own part of the table."""
    start = time.process_time()
    counts = wide_counts(num_traces)
    print(f"simulated {num_traces} traces in {time.process_time() - start:.0f} cpu-s")
    filled = np.mean([(trace.expert_and_joint(_LAYERS, _EXPERTS)[1] > 0).mean() for trace in counts.traces[:20]])
    print(f"{100 * filled:.0f}% of joint counts are not zero")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "wide.safetensors")
        counts.save(path)
        print(f"counts file: {path.stat().st_size / 1e6:.1f} MB")
        start = time.process_time()
        read = RoutingCounts.load(path)
        print(f"read and checked, every law of every trace: {time.process_time() - start:.2f} cpu-s")
    del counts
    start = time.process_time()
    scores = score_experts(read)
    used = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"score, evidence, bootstrap, bounds, families: {used:.2f} cpu-s; peak memory of the process {memory:.2f} GB")
    print(f"supported: {int(scores.supported_LE.sum())} of {scores.supported_LE.size}; best: {scores.ranking()[0]}")


if __name__ == "__main__":
    what, number = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    {"worlds": worlds, "small": small, "chosen": chosen, "speed": speed}[what](number or {"speed": 1000}.get(what, 60))
