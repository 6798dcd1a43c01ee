"""Time limits of tests. FUSED_DISTILL_TEST_TIMEOUT multiplies them all, for slow or busy machines."""

from __future__ import annotations

import os

FACTOR = float(os.environ.get("FUSED_DISTILL_TEST_TIMEOUT", "1"))


def seconds(limit: float) -> float:
    """Return a time limit of `limit` seconds on an idle machine, scaled by FUSED_DISTILL_TEST_TIMEOUT."""
    return limit * FACTOR
