"""The benchmarks still run: each number of docs/measured.md can be measured again."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.mark.slow
def test_the_cost_of_steering_is_measured_for_every_variant() -> None:
    asked = [sys.executable, str(BENCH / "steering_cost.py"), "--quick", "--repeats", "2"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        line[:28].rsplit(maxsplit=2 if "on entropy" in line else 1)
        for line in done.stdout.splitlines()
        if "batch" in line
    ]
    measured = {(work.strip(), " ".join(variant)) for work, *variant in rows}
    both = {"plain", "observed", "steered", "gated"}
    variants = {"teacher": both | {"counted"}, "decode": both | {"on entropy"}}
    assert measured == {
        (f"{mode}, batch {rows}", name) for mode, names in variants.items() for rows in (1, 32) for name in names
    }
