"""Steering plans of moe-steer inside vLLM, chosen by each request by name."""

__version__ = "0.1.0"
SUPPORTED = ((0, 30), (0, 33))
"""vLLM from the first up to, and without, the second: what the tests in tests/engines have run on."""
