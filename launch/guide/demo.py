"""``moe-steer demo``: the main job in its quick form, on the embedded model, from anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Demo:
    """See it work: find the experts of the embedded model that think, turn them up, compare; a page to open, in about a minute."""

    out: str = "runs/demo"
    """Folder of the run; started again, it continues there."""
    seed: int = 0
    """Decides problems, samples and whatever else is drawn."""

    def run(self) -> int:
        """The main job in this process: no launcher, no network, no checkout."""
        from launch.core.ranks import refuse_several_ranks
        from launch.steer_r1 import main

        refuse_several_ranks("moe-steer demo", "deepspeed launch/steer_r1.py --quick")
        return main(["--quick", "--out", self.out, "--seed", str(self.seed)], program="moe-steer demo")
