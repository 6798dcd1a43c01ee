from collections.abc import Iterator

import pytest
from fused_distill.trainer import metrics


@pytest.fixture(scope="module", autouse=True)
def report_without_curves() -> Iterator[None]:
    """Leave the curves out of the reports, because drawing them takes longer than a run of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_plot", lambda rows: "")
        yield
