"""Wrong invocations of every command: exit code and what is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

import gguf_files
from bake_checkpoints import gains, qwen
from same.commands import inside, run_command
from same.compare import Items

OPTIONS = """
--nonsense
nonsense
plan --nonsense 3 --out p.json
plan
plan --out p.json --top many
plan --out p.json --experts 1:2=8 --experts 3:2=8
score --counts a --counts=b --out s.json
direction --out d --contrast colours --layers 1
generate
bake --model lab
verify
unbake
compare
report
export empty --format pdf --out x
steer_r1.py --nonsense
steer_r1.py --seed one
steer_r1.py --plan given.json --preset rice-r1-math
steer_r1.py --plan given.json --top 5
steer_r1.py --preset rice-r1-math --gains 3 5
steer_r1.py --gains 4 1
steer_r1.py --gains 4 4
steer_r1.py --gains
steer_r1.py --num-test 1
steer_r1.py --temperature nan
steer_r1.py --top-p 0
steer_r1.py --samples 0
steer_r1.py --greedy --samples 4
steer_r1.py --greedy --temperature 0.9 --dry-run
steer_r1.py --data-dir here
steer_r1.py --scope mind
steer_r1.py --gpus 2
reduce_overthinking.py --methods caa magic
reduce_overthinking.py --methods caa caa
reduce_overthinking.py --model lab --methods sta
reduce_overthinking.py --strengths 0
reduce_overthinking.py --budgets 1.5
reduce_overthinking.py --samples-identification 1
reduce_overthinking.py --margin -1
reduce_overthinking.py --keep 0
reduce_overthinking.py --sae-layer 3
reduce_overthinking.py --num-test 1
evaluate.py --arms baseline
evaluate.py --arms baseline tap
evaluate.py --arms baseline tip tip
evaluate.py --arms baseline budget:1.5
evaluate.py --arms baseline plan:
evaluate.py --arms baseline prompt-before+prompt-after
evaluate.py --arms baseline nowait --switch-words Hm
evaluate.py --arms baseline tip --ban-words Hm
evaluate.py --greedy --samples 4
evaluate.py --num-problems 0
evaluate --arms baseline tap
collect_stats.py
collect_stats.py --traces t --out s --coefficients Wait=-1
collect_stats.py --traces t --out s --zero-joint none
collect_stats.py --traces t --out s --markers Zebra
collect_stats.py --traces t --out s --base some
collect_stats.py --traces t --out s --part 0
collect-stats --traces t --out s --position after
safety.py
SAFETY --sae s --arms baseline pca
SAFETY --sae s --arms baseline
SAFETY --sae s --tasks gsm8k
SAFETY
SAFETY --sae s --strengths 1 0
SAFETY --sae s --keep 1.5
SAFETY --sae s --layer -1
SAFETY --sae s --temperature 0.7
SAFETY --sae s --toxic-label 2
SAFETY --sae s --arms baseline caa
SAFETY --arms baseline caa --keep 0.1
SAFETY --sae s --tasks safeedit mmlu --gsm8k-tokens 9
"""
"""Refused by what the words alone say."""
WORK = """
plan --out p.json
plan --out p.json --preset rice-r2
plan --out p.json --experts 39-182
plan --out p.json --experts 39:182=nan
plan --out p.json --experts 1:2 --top 3
plan --out p.json --experts 1:2 --unit residual_norm
plan --out p.json --scores none.json
plan --out p.json --scores torn.json
plan --out p.json --start none.json
plan --out p.json --residual plain.safetensors=1
plan --out p.json --residual 3:plain.safetensors=much
plan --out p.json --residual 3:plain.safetensors=1@mind
plan --out p.json --residual 3:none.safetensors=1
plan --out p.json --residual 3:made.safetensors=1
plan --out p.json --residual 3:plain.safetensors=1 --unit residual_norm
plan --out p.json --residual 3:plain.safetensors=1 --gain 3
plan --out p.json --residual 3:layer_3.pt=1
score --out s.json --counts none.safetensors
score --out s.json --counts plain.safetensors
collect --out c.safetensors --traces none.jsonl
collect --out c.safetensors --traces torn_traces.jsonl
collect --out c.safetensors --traces x --markers <ponder>
collect --out c.safetensors --traces none.jsonl --model lab-dense
generate --out g --plan none.json
generate --out g --plan torn.json
generate --out g --plan unknown_key.json
generate --out g --plan out_of_range.json
generate --out g --plan given.json --model lab-dense
generate --out g --model empty
generate --out g --model ./nowhere
generate --out g --greedy --samples 2
generate --out g --problems torn.jsonl
generate --out g --problems latin.jsonl
generate --out other --num 2
generate --out torn.jsonl --num 2
compare --baseline empty
compare --baseline other
power --baseline other
power --noise 2 --points 5
report empty
report other
thinking empty
export other --format parquet --out x.parquet
memory --model ./nowhere --gpus 1 --gpu-gib 24
memory --model lab --gpus 0 --gpu-gib 24
direction --out d --contrast thoughts --layers 1
direction --out d --contrast answers --layers 1 --pairs none.csv
direction --out d --contrast thoughts --layers 9 --traces none.jsonl --model lab-dense
convert-direction x.bin --out d
convert-direction plain.safetensors --out plain.safetensors
convert-direction layer_3.pt --layer 2 --out d
train-sae --out d --width 8 --k 2 --tokens 10 --layer 1
train-sae --out d --width 8 --k 9 --tokens 10 --layer 1 --texts lines.txt
train-sae --out d --width 8 --k 2 --tokens 10 --layer 9 --texts lines.txt
sae-fit --sae none --texts lines.txt
bake --model qwen --plan given.json
bake --model qwen --plan given.json --out baked
bake --model qwen --plan fits.json --out empty
bake --model qwen --plan fits.json --out other
bake --model qwen --plan fits.json --out baked --in-place
bake --model ./nowhere --plan fits.json --out baked
bake --model tiny.gguf --plan fits.json
bake --model tiny.gguf --plan fits.json --out o.gguf --in-place
bake --model tiny.gguf --plan fits.json --out o.gguf --hash-all
bake --model torn.gguf --plan fits.json --out o.gguf
verify --baked qwen
verify --baked qwen --forward
verify --baked tiny.gguf
verify --baked tiny.gguf --forward
unbake --baked qwen
unbake --baked qwen --out back
unbake --baked tiny.gguf --out back
steer_r1.py --out run --model ./nowhere
steer_r1.py --out run --model lab-dense
steer_r1.py --out run --preset rice-r1-math
steer_r1.py --out run --preset rice
steer_r1.py --out run --plan none.json
steer_r1.py --out run --plan out_of_range.json
steer_r1.py --out run --problems none.jsonl
steer_r1.py --out run --backend magic
steer_r1.py --out other
steer_r1.py --out run --model lab-dense --dry-run
reduce_overthinking.py --out other
reduce_overthinking.py --out run --layers 9
reduce_overthinking.py --out run --sae none
evaluate.py --out run --arms baseline plan:none.json
evaluate.py --out run --arms baseline preset:rice-r1-math
evaluate.py --out run --arms baseline prompt-before --thinking-prompt </think>
evaluate.py --out run --problems two.jsonl --num-problems 5
evaluate.py --out other --num-problems 2 --arms baseline nowait
collect_stats.py --traces none.jsonl --out run
collect_stats.py --traces none.jsonl --out run --model lab-dense
SAFETY --sae s
"""
"""Refused by what the files or the model say. Nothing may be written."""
SAFETY = "safety.py --model m --layer 1 --pairs p.csv --classifier c --out run"
PROBLEM = {"prompt": "1 + 1?", "target": "2", "answer_type": "integer"}


def error_items(work: Path) -> Items:
    """One item a command line; and the files that are there when all are done, which are those of before."""
    with inside(work):
        _write_files()
    before = _names(work)
    items: Items = {}
    for line in (*OPTIONS.strip().split("\n"), *WORK.strip().split("\n")):
        done = run_command(line.replace("SAFETY", SAFETY), work)
        name = f"errors/{re.sub(r'[^A-Za-z0-9.=_-]+', '_', line)[:120]}"
        if name in items:
            raise RuntimeError(f"two command lines are named {name}")
        items[name] = f"$ {line}\n{done.text()}"
    written = sorted(_names(work) - before)
    return items | {"errors/files-written": "".join(f"{name}\n" for name in written)}


def _names(work: Path) -> set[str]:
    return {path.relative_to(work).as_posix() for path in work.rglob("*")}


def _write_files() -> None:
    """Broken and unfitting files, in the working directory."""
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other", "run.json").write_text(json.dumps({"version": 1, "config": {"seed": 3}}))
    Path("torn.json").write_text('{"version": 1, "experts": [')
    Path("unknown_key.json").write_text('{"version": 1, "beta": 3}')
    Path("torn_traces.jsonl").write_text('{"trace_id": "a", "token_ids": [1, 2')
    problem = json.dumps({"problem_id": "a", **PROBLEM}) + "\n"
    Path("torn.jsonl").write_text(problem + problem[:40])
    Path("two.jsonl").write_text(problem + problem.replace('"a"', '"b"'))
    Path("latin.jsonl").write_bytes(problem.replace("1 + 1", "é é").encode("latin-1"))
    Path("lines.txt").write_text("one line of text\n" * 40)
    Path("torn.gguf").write_bytes(b"GGUF\x03")
    gains((1, 99, 2.0)).save("out_of_range.json")
    gains((2, 3, 16.0)).save("given.json")
    gains((1, 2, 2.0)).save("fits.json")
    save_file({"vector": torch.ones(4)}, "plain.safetensors")
    header = {"direction": json.dumps({"layer": 20, "site": "residual", "residual_norm": 10.0})}
    save_file({"vector": torch.ones(4)}, "made.safetensors", header)
    torch.save(torch.ones(8), "layer_3.pt")
    qwen(Path("qwen"))
    gguf_files.write_gguf(Path("tiny.gguf"), "Q8_0")
