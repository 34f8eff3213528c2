"""Judges text: problems, final answers, graders, thinking, runs and paired comparisons."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
