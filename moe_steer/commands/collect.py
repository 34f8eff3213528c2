"""``moe-steer collect``: traces through a model -> routing counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Count which experts the router selects at reasoning markers, over traces run through a model.

    Long collections that can be interrupted, and several ranks: deepspeed --num_gpus 8 launch/collect_stats.py ...
    """

    traces: tuple[str, ...]
    """Trace files, generations*.jsonl files, or folders of runs."""
    arm: str | None = None
    """Of runs of several arms, the one whose answers are read."""
    out: str
    """Counts file to write (safetensors)."""
    model: str = "lab"
    """Model folder, hub id, or 'lab' for the embedded mixture-of-experts model."""
    markers: tuple[str, ...] = ("<think>", "</think>", "Alternatively")
    """Tags and words whose routing is counted, in all their token forms."""
    base: str = "generated"
    """Tokens that base rates are taken from: generated (as RICE), or all."""
    position: str = "input"
    """Routing while the marker is the input token (input), or where it is predicted (predicted)."""
    add_to: tuple[str, ...] = ()
    """Counts files of other shards of the same model and markers, added to the result."""
    tokens_per_batch: int = 8192
    """Padded tokens of one forward pass."""
    backend: str = "auto"
    """How the model is held; see moe_steer.load_model."""
    dtype: str = "auto"
    """Precision: auto (as stored), float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def run(self) -> int:
        """Write the counts and say what was counted."""
        from launch.ranks import ranks_of_this_run

        with ranks_of_this_run() as ranks:
            self._collect(ranks)
        return 0

    def _collect(self, ranks: Ranks) -> None:
        import sys

        from expert_stats import MarkerSet, RoutingCounts
        from launch.sharded import collect_over_ranks
        from launch.wiring import counted, read_any_traces
        from moe_steer.loading import load_model

        earlier = [RoutingCounts.load(path) for path in self.add_to]
        model, tokenizer = load_model(
            self.model, self.backend, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        markers = MarkerSet.from_tokenizer(tokenizer, self.markers, position=self.position)
        traces = read_any_traces(self.traces, tokenizer, self.arm)
        counts = collect_over_ranks(
            model,
            traces,
            markers,
            ranks,
            base=self.base,
            tokens_per_batch=self.tokens_per_batch,
            progress=ranks.is_main and sys.stderr.isatty(),
        )
        if not ranks.is_main:
            return
        for other in earlier:
            counts = counts + other
        counts.save(self.out)
        print(counted(counts))
        print(f"wrote {self.out}; next: moe-steer score --counts {self.out} --out scores.json")
