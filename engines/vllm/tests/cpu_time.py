"""What steering costs inside vLLM: CPU time of an engine whose requests ask for no plan, and of one plan, over that of a stock engine.

    STEER_REFERENCE=build/engines/reference build/engines/venv/bin/python engines/vllm/tests/cpu_time.py [compiled]

32 sequences of 48 tokens on the lab, four times in turn a round, nine rounds: turns are short, so that what else the machine does falls on
all three. The ratios are medians over rounds, with quartiles. To be at most 1.02 and 1.04 on a machine that does nothing else.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import FOLDER
from engine_in_process import ask, engine

ROUNDS, TURNS, COPIES, NEW_TOKENS = 9, 4, 4, 48


def main() -> None:
    """Measure and print the table."""
    import vllm

    reference = json.loads((FOLDER / "reference.json").read_text())
    prompts = reference["lab"]["prompts"] * COPIES
    (kind,) = sys.argv[1:] or ["eager"]
    options = {"enforce_eager": {"eager": True, "compiled": False}[kind]}
    stock, ours = engine(FOLDER, "lab", [], **options), engine(FOLDER, "lab", ["g2", "g64"], **options)
    variants = [(stock, None), (ours, None), (ours, "g2")]

    def seconds(llm: Any, asked: str | None) -> float:
        start = time.process_time()
        ask(llm, prompts, [asked] * len(prompts), max_tokens=NEW_TOKENS, ignore_eos=True)
        return time.process_time() - start

    for llm, asked in variants:
        seconds(llm, asked)
    spent = [[0.0] * len(variants) for _ in range(ROUNDS)]
    for number, row in enumerate(spent):
        for turn in range(TURNS):
            for at in (0, 1, 2) if (number + turn) % 2 else (2, 1, 0):
                row[at] += seconds(*variants[at])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    print(f"vLLM {vllm.__version__}, {kind}, {platform.machine()}, commit {commit.stdout.strip()}, {ROUNDS} rounds")
    print(f"{'':20}median  quartiles     CPU seconds a round")
    for at, name in enumerate(("stock", "no plan asked for", "one plan")):
        ratios = [row[at] / row[0] for row in spent]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{name:20}{median:6.3f}  {low:.3f}-{high:.3f}   {statistics.median(row[at] for row in spent):.2f}")


if __name__ == "__main__":
    main()
