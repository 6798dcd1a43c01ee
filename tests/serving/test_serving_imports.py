"""Each part of serving and rollouts imports with the packages of its extra alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVER_ONLY = ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic")
CLIENT = ("httpx", "tenacity", "safetensors")


def run_without(packages: tuple[str, ...], statement: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in a process that finds none of the packages."""
    script = f"""
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {packages!r} else find_spec(name)
sys.meta_path.insert(0, Hidden())
{statement}
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("packages", "modules"),
    [
        (SERVER_ONLY, ("serving.client.client", "serving.client.align", "rollouts.vllm", "rollouts.nccl")),
        ((*SERVER_ONLY, *CLIENT, "numpy", "transformers"), ("rollouts.base", "rollouts.grouping")),
        ((*SERVER_ONLY, *CLIENT), ("rollouts.transformers",)),
    ],
)
def test_modules_need_the_packages_of_their_extra_only(
    packages: tuple[str, ...], modules: tuple[str, ...]
) -> None:
    done = run_without(packages, "\n".join(f"import fused_distill.{module}" for module in modules))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        *((package, "serving.server.app", "server") for package in (*SERVER_ONLY[:3], "pydantic", "httpx")),
        *((package, "serving.client.client", "client") for package in (*CLIENT, "numpy")),
        ("httpx", "rollouts.vllm", "client"),
    ],
)
def test_a_missing_package_is_an_error_that_names_the_extra(package: str, module: str, extra: str) -> None:
    done = run_without((package,), f"import fused_distill.{module}")
    message = f"needs {package}: pip install 'fused-distill[{extra}]'"
    assert message in done.stderr.splitlines()[-1], done.stderr
