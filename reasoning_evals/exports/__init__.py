"""A graded run in the formats that other tools read: lm-eval, parquet, Inspect."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
