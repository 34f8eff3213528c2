"""Starts ranks that need not import PyTorch, transformers and DeepSpeed anew: this process has, and forks one child a rank.

Importing takes several CPU seconds a process, and the suite starts dozens of ranks. Spoken to by ``rank_processes`` alone:
stdin has one JSON line a run, ``[{"script", "arguments", "environment", "folder", "log"}, ...]`` with one entry a rank;
stdout answers with one line of process ids, and with a line ``[rank, exit code]`` whenever a rank has ended.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

PRELOADED = (
    "deepspeed",
    "matplotlib.pyplot",
    "scipy.stats",
    "tyro.conf",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "launch.cli.main",
    "launch.collect_stats",
    "launch.evaluate",
    "launch.reduce_overthinking",
    "launch.safety",
    "launch.steer_r1",
    "launch.core.levers.arm_building",
    "launch.jobs.evaluation",
    "launch.jobs.experts",
    "launch.jobs.overthinking",
    "launch.jobs.safety_job",
    "sharded_models",
)
"""What the jobs and the workers of the tests import; nothing of it starts a thread or draws a number."""


def become_rank(job: dict[str, Any]) -> None:
    """Turn this forked child into ``python script arguments`` with its own environment, output and process group."""
    os.setpgid(0, 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    code = 1
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Answer until stdin ends."""
    for name in PRELOADED:
        import_module(name)
    gc.freeze()  # no child walks what it has inherited
    for line in sys.stdin:
        ranks: dict[int, int] = {}
        for rank, job in enumerate(json.loads(line)):
            pid = os.fork()
            if pid == 0:
                become_rank(job)
            os.setpgid(pid, pid)  # here too: whoever is told this id may kill the group at once
            ranks[pid] = rank
        print(json.dumps(list(ranks)), flush=True)
        while ranks:
            pid, status = os.wait()
            print(json.dumps([ranks.pop(pid), os.waitstatus_to_exitcode(status)]), flush=True)


if __name__ == "__main__":
    main()
