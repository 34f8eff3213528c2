"""What happens inside thoughts: attempts, switches, right answers that were given up."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
