"""Kernels compiled by the versions of Triton that come with older PyTorch (see TRITONS in the Makefile)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSIONS = sorted(Path(sys.prefix).glob("triton-*/triton"))
COMPILE = """
import triton
from kernel_costs import CALLS, OURS, UNLIKE_TRANSFORMS, measure
calls = [*(call for call in CALLS if call.provider == OURS), *UNLIKE_TRANSFORMS]
print(triton.__version__, len(measure(["sm_90"], calls=calls)))
"""


@pytest.mark.skipif(not VERSIONS, reason="only make test-library installs other versions of Triton")
@pytest.mark.parametrize("package", VERSIONS, ids=lambda package: package.parent.name)
def test_kernels_compile(package: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package.parent), *sys.path]),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    version, compiled = done.stdout.split()
    assert package.parent.name == f"triton-{version}"
    assert int(compiled) > 0
