"""Answers that no grader decides: a classifier's verdicts, defence rates, fluency."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
