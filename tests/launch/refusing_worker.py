"""What each rank is told of a checkpoint in which an expert of one rank is damaged. Usage: refusing_worker.py OUT FOLDER CASE ..."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from launch.core.ranks import leave, ranks_of_this_run
from moe_steer import load_model
from plan_worker import said
from sharded_models import save_checkpoint

EXPERT = "model.layers.1.mlp.experts.13.up_proj.weight"


def damage(folder: Path, how: str) -> None:
    """Lose an expert of the last rank, or cut it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if how == "lost":
        del tensors[EXPERT]
    else:
        tensors[EXPERT] = tensors[EXPERT][:5].contiguous()
    save_file(tensors, path, {"format": "pt"})


def main() -> None:
    """Every case: backend:damage."""
    out, folder, told = Path(sys.argv[1]), Path(sys.argv[2]), {}
    with ranks_of_this_run() as ranks:
        for how in ("lost", "cut"):
            if ranks.is_main:
                damage(save_checkpoint("qwen3_moe", folder / how), how)
            ranks.barrier()
        for case in sys.argv[3:]:
            backend, _, how = case.partition(":")
            told[case] = said(partial(load_model, folder / how / "qwen3_moe", backend))
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
    leave(0)
