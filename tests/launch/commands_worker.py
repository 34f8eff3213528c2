"""Several commands of moe-steer one after the other on the same ranks, which meet once. Usage: commands_worker.py FILE, on every rank.

The file holds a list of command lines in JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from launch.cli.main import main
from launch.core import ranks as ranks_module
from launch.core.ranks import leave, ranks_of_this_run

if __name__ == "__main__":
    with ranks_of_this_run() as ranks:
        ranks_module.ranks_of_this_run = lambda: nullcontext(ranks)
        for words in json.loads(Path(sys.argv[1]).read_text()):
            code = main(words)
            assert code == 0, words
    leave(0)
