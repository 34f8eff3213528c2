"""Decoding rules that papers compare steering with, as transformers' LogitsProcessors.

A rule keeps no state of a row. Everything it needs it reads from the ids generated so far, at every step anew, so rows may leave the
batch at any time. A rule with ``redirect`` replaces the token that was drawn; one with ``interject`` writes several in its place
(``reasoning_evals.engines.decoder``).
"""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
