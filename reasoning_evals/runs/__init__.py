"""A run: its arms are sampled, its completions stored in a folder and graded; an interrupted run goes on where it was."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
