"""New processes that have imported the library already: a fork of one server process is ready at once."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

from cases import INTERPRETED

# The server process imports them once for all tests of a pytest worker. Those of the kernels train nothing.
PRELOADED = [
    "torch.distributed",
    "hypothesis",
    "fused_distill" if INTERPRETED else "fused_distill.trainer.loop",
]


def forking() -> ForkServerContext:
    """Return multiprocessing's functions, with which a new process is a fork of the server."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
