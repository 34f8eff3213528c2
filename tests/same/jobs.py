"""The jobs of launch/ and the single commands on the embedded models, seed 0, and everything that they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

from same.commands import inside, run_command, run_job
from same.compare import Items
from same.normalise import folder_items

PLAN = {"version": 1, "experts": [{"layer": 2, "expert": 3, "gain": 16.0}], "scope": "thought"}
ARMS = "baseline tip:50,600 tip-close:50,60 nowait budget:40 prompt-before prompt-after plan:given.json plan:given.json+budget:12"

LAUNCHED = {
    "main-1": ("steer_r1.py --quick --seed 0 --out runs/main-1", 1),
    "main-2": ("steer_r1.py --quick --seed 0 --out runs/main-2", 2),
}
"""Started by the launcher: name, which is also the folder's, -> command line, ranks."""
FULL = {
    "full-main": ("steer_r1.py --seed 0 --out runs/full-main", 2),
    "full-overthinking": ("reduce_overthinking.py --seed 0 --out runs/full-overthinking", 2),
}
"""With --full only: minutes each."""
HERE = {
    "main-given": "steer_r1.py --plan given.json --num-test 8 --samples 1 --batch-size 8 --out runs/main-given",
    "dry-run": "steer_r1.py --dry-run --out runs/dry-run",
    "overthinking": "reduce_overthinking.py --quick --seed 0 --out runs/overthinking",
    "evaluate": f"evaluate.py --num-problems 16 --samples 1 --max-new-tokens 128 --batch-size 16 --arms {ARMS} --out runs/evaluate",
}
"""Run in this process, which saves the imports."""
STEPS = """
generate --num 24 --out runs/plain
generate --num 4 --greedy --plan given.json --scope answer --out runs/refused
generate --num 24 --plan given.json --out runs/steered
generate --model lab-dense --num 24 --samples 2 --out runs/dense
collect --traces runs/plain --out runs/counts.safetensors
collect --traces runs/plain --add-to runs/counts.safetensors --base all --out runs/refused.safetensors
score --counts runs/counts.safetensors --missing-marker skip --heatmap runs/map.svg --out runs/scores.json
plan --scores runs/scores.json --top 2 --gain 8 --out runs/plan.json
plan --preset rice-r1-math --out runs/preset.json
plan --experts 1:2=8 3:1=0.5 --scope thought --out runs/experts.json
compare --baseline runs/plain --arm-folder runs/steered --out runs/comparison.json
report runs/steered
thinking runs/plain --arm-folder runs/steered --out runs/thinking.json
power --baseline runs/plain --out runs/power.json
power --noise 0.105 --points 5 --samples 8 16 --problems 30 60
export runs/plain --format parquet --out runs/plain.parquet
export runs/plain --format lm-eval --out runs/lm-eval
memory --model lab --gpus 2 --gpu-gib 24
memory --model lab-dense --gpus 1 --gpu-gib 80
direction --model lab-dense --contrast decisions --traces runs/dense --layers 4 --out runs/directions
direction --model lab-dense --contrast thoughts --traces runs/dense --layers 3 4 --method caa pca --out runs/pairs
plan --residual 4:runs/directions/caa-L4.safetensors=0.4@step_end --unit residual_norm --out runs/shorter.json
generate --model lab-dense --num 4 --plan runs/shorter.json --out runs/shorter
convert-direction runs/directions/caa-L4.safetensors --to gguf --out runs/shorter.gguf
convert-direction runs/directions/caa-L4.safetensors --to easyedit --out runs/easyedit
convert-direction runs/shorter.gguf --out runs/back
train-sae --model lab-dense --layer 3 --traces runs/dense --tokens 6400 --width 96 --k 8 --batch-size 128 --out runs/sae
sae-fit --model lab-dense --sae runs/sae --traces runs/dense --max-tokens 900 --json runs/fit.json
bake --model lab --plan runs/plan.json --out runs/baked
verify --baked runs/baked --model lab --forward --max-new-tokens 4
unbake --baked runs/baked --out runs/restored
collect-stats --traces runs/plain --part 16 --out runs/stats
"""
"""The single commands, one after another; a later one reads what an earlier one wrote."""


def launched(name: str, line: str, ranks: int, work: Path) -> Items:
    """A job under the launcher: its output, and every file of its folder."""
    _inputs(work)
    return _items(f"jobs/{name}", run_job(line, work, ranks).text(), work / "runs" / name, work)


def here(name: str, line: str, work: Path) -> Items:
    """A job in this process: its output, and every file of its folder."""
    _inputs(work)
    return _items(f"jobs/{name}", run_command(line, work).text(), work / "runs" / name, work)


def safety(work: Path) -> Items:
    """The safety experiment on tiny random models and data."""
    import safety_files

    with inside(work):
        options = " ".join(safety_files.write_all(Path("safety")))
    line = f"safety.py {options} --attack-tokens 6 --gsm8k-tokens 5 --batch-size 8 --out runs/safety"
    return here("safety", line, work)


def collect_stats(work: Path) -> Items:
    """The statistics of a run of 24 answers."""
    made = run_command("generate --num 24 --out runs/traces", work)
    items = here("collect-stats", "collect_stats.py --traces runs/traces --part 10 --out runs/collect-stats", work)
    return items | {"jobs/collect-stats/traces": made.text()}


def steps(work: Path) -> Items:
    """Every single command: what it says, and at the end all that was written."""
    _inputs(work)
    items = {}
    for number, line in enumerate(STEPS.strip().split("\n"), 1):
        said = run_command(line, work).text()
        items[f"steps/{number:02d}-{line.split()[0]}"] = f"$ {line}\n{said}"
    return items | {f"steps/files/{name}": text for name, text in folder_items(work / "runs", work).items()}


def _inputs(work: Path) -> None:
    (work / "given.json").write_text(json.dumps(PLAN))


def _items(name: str, said: str, folder: Path, work: Path) -> Items:
    return {f"{name}/said": said} | {f"{name}/{file}": text for file, text in folder_items(folder, work).items()}
