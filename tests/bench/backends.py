"""Tokens a second steered and not, and the memory that loading takes, for every backend on 1 and 2 ranks of one thread each.

    .venv/bin/python tests/bench/backends.py [--tokens 32]      about 3 minutes

Decoding: a tiny DeepSeek-V3, where what a backend costs shows most. "Cost" is the time steered over the time plain, the median
over rounds that run both, with its quartiles; the speeds of ranks that take tokens of their own are added up. Loading: a DeepSeek-V3 of 434 MB in float32;
what a rank holds at the end, and the most that it held, both beyond what the libraries take. On a CPU more ranks are for
correctness, not for speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "launch"), str(HERE.parent / "moe_steer"), str(HERE.parents[1])]

import torch

from rank_processes import run_ranks
from sharded_models import save_checkpoint

BACKENDS = ("plain", "tp_ep", "autoep", "autoep_zero3", "zero3")
BATCHES = (1, 16)
ROUNDS = 5
LOADING = HERE.parent / "launch" / "loading_worker.py"


def measure(backend: str, model_name: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Seconds of every round, plain and steered at each batch, of this rank."""
    from moe_steer import ExpertGain, SteeringPlan, load_model, steer
    from moe_steer.backends.layout import layout_of
    from moe_steer.layers import model_shape

    model, _ = load_model(folder / model_name, backend=backend, check=False)
    shape = model_shape(model)
    plan = SteeringPlan(experts=[ExpertGain(layer=layer, expert=3, gain=4.0) for layer in shape.moe_layers])
    result: dict[str, Any] = {"same_tokens": layout_of(model).same_tokens}
    for batch in BATCHES:
        ids = torch.randint(2, 90, (batch, 8), generator=torch.Generator().manual_seed(0))

        def decode(change: SteeringPlan, number: int, ids: torch.Tensor = ids) -> float:
            with torch.no_grad(), steer(model, change, quiet=True):
                start = time.perf_counter()
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=number,
                    min_new_tokens=number,
                    do_sample=False,
                )
                return time.perf_counter() - start

        decode(plan, 4)
        rounds = [(decode(SteeringPlan(), tokens), decode(plan, tokens)) for _ in range(ROUNDS)]
        result[str(batch)] = rounds
    return result


def work(out: Path, backend: str, model_name: str, folder: Path, tokens: int) -> None:
    """One rank."""
    from launch.core.ranks import ranks_of_this_run

    with ranks_of_this_run() as ranks:
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(measure(backend, model_name, folder, tokens)))


def results(script: Path, num_ranks: int, out: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """What every rank wrote into ``out``; RuntimeError with the last line that was printed when one failed."""
    out.mkdir()
    done = run_ranks(script, num_ranks, arguments, 240)
    if any(done.codes):
        raise RuntimeError(done.text.strip().splitlines()[-1])
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def decoding(ranks: list[dict[str, Any]], batch: int, tokens: int) -> str:
    """Two cells: plain tokens a second of all ranks, and the cost of steering."""
    counted = ranks[:1] if ranks[0]["same_tokens"] else ranks
    speed = sum(batch * tokens / statistics.median(plain for plain, _ in rank[str(batch)]) for rank in counted)
    costs = [steered / plain for rank in counted for plain, steered in rank[str(batch)]]
    low, middle, high = statistics.quantiles(costs, n=4)
    return f"{speed:.0f} | {middle:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    """Start the ranks of every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--model", default="deepseek_v3")
    parser.add_argument("--work", nargs=3, metavar=("OUT", "BACKEND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        out, backend, folder = arguments.work
        work(Path(out), backend, arguments.model, Path(folder), arguments.tokens)
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"commit {commit}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread a rank, "
        f"{arguments.model}, {ROUNDS} rounds of {arguments.tokens} tokens"
    )
    print(
        "| backend | ranks | tok/s batch 1 | cost of steering | tok/s batch 16 | cost of steering | held MiB | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(arguments.model, folder)
        extra = ["--tokens", str(arguments.tokens), "--model", arguments.model]
        for backend in BACKENDS:
            for num_ranks in (1, 2):
                out, loaded = folder / f"{backend}{num_ranks}", folder / f"{backend}{num_ranks}-loading"
                try:
                    ranks = results(Path(__file__), num_ranks, out, ["--work", str(out), backend, name, *extra])
                    loading = results(LOADING, num_ranks, loaded, [str(loaded), str(folder / "models"), backend])
                except RuntimeError as error:
                    print(f"| {backend} | {num_ranks} | failed: {error} |")
                    continue
                cells = [decoding(ranks, batch, arguments.tokens) for batch in BATCHES]
                memory = [f"{max(rank[key] for rank in loading) / 2**20:.0f}" for key in ("held", "peak")]
                print(f"| {backend} | {num_ranks} | {' | '.join((*cells, *memory))} |", flush=True)


if __name__ == "__main__":
    main()
