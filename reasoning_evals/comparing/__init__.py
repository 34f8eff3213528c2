"""Two arms of a run compared problem by problem: accuracies with intervals, paired differences, tests, power."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
