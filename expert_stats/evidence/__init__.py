"""Evidence for experts: sums by problem, tests that hold under problem kinds and drift, intervals, agreement."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
