"""A run's report: Markdown, and one HTML file that needs nothing else."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
