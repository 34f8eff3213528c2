"""What tests of endpoints share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reasoning_evals.engines.http_audit import AUDITED, Tally


@pytest.fixture
def tally() -> Iterator[Tally]:
    """Counts what the test asks endpoints for."""
    found = Tally()
    token = AUDITED.set(found)
    yield found
    AUDITED.reset(token)
