from collections.abc import Iterator

import pytest
from cases import INTERPRETED
from ranks import Ranks


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Ranks]]:
    """Return a pool for each number of ranks under test."""
    pools = {size: Ranks(size) for size in ([2] if INTERPRETED else [2, 4])}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def two(pools: dict[int, Ranks]) -> Ranks:
    """Return the pool of two ranks."""
    return pools[2]
