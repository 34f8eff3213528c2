"""How much memory loading takes on one rank. Usage: loading_worker.py OUT FOLDER BACKEND"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from launch.core.ranks import leave, ranks_of_this_run
from moe_steer import load_model
from sharded_models import save_checkpoint
from sharded_worker import held_bytes


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The most that ``anonymous_bytes`` was, looked at a few hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.over = False

    def run(self) -> None:
        """Look until it is over."""
        while not self.over:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.003)


def main() -> None:
    """Load a tiny model first, so that libraries are not counted; then the mid-size one."""
    out, folder, backend = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with ranks_of_this_run() as ranks:
        if ranks.is_main:
            save_checkpoint("deepseek_v3", folder)
            save_checkpoint("mid", folder)
        ranks.barrier()
        warm, _ = load_model(folder / "deepseek_v3", backend=backend)
        before = anonymous_bytes()
        peak = Peak()
        peak.start()
        model, _ = load_model(folder / "mid", backend=backend, check=False)  # computing takes memory of its own
        peak.over = True
        peak.join()
        result = {"peak": peak.most - before, "after": anonymous_bytes() - before, "held": held_bytes(model)}
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(result))
        del warm


if __name__ == "__main__":
    main()
    leave(0)
