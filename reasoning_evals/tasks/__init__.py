"""Tasks by name: data sets, generated problems, a user's own file."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
