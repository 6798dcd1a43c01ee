"""The wheel contains both packages and needs torch alone."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def torch_and_its_requirements() -> set[str]:
    """Return the distributions that torch requires, except Triton and the vendors' libraries."""
    names, queue = set(), ["torch"]
    while queue:
        name = re.split(r"[^\w.-]", queue.pop())[0]
        if name in names or re.match("triton|nvidia|cuda", name):
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        names.add(name)
        queue += [r for r in distribution.requires or [] if "extra ==" not in r]
    return names


def link_packages(names: set[str], site_packages: Path) -> None:
    for name in names:
        distribution = metadata.distribution(name)
        for top in {
            file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")
        }:
            target = Path(str(distribution.locate_file(top)))
            link = site_packages / top
            if target.exists() and not link.exists():
                link.symlink_to(target)


def test_wheel_contains_both_packages_and_their_type_markers(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("fused_distill", "fused_distill_kernels"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_in_an_empty_venv_with_only_torch(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site_packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    link_packages(torch_and_its_requirements(), site_packages)
    zipfile.ZipFile(wheel).extractall(site_packages)
    code = """
import sys, torch
from fused_distill import fused_linear_jsd
hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
loss = fused_linear_jsd(hidden, weight, torch.randn(3, 5), torch.randn(7, 5))
loss.backward()
assert loss > 0 and hidden.grad is not None
assert not {"triton", "transformers", "numpy", "fastapi"} & set(sys.modules), sys.modules
try:
    fused_linear_jsd(hidden, weight, torch.randn(3, 5), torch.randn(7, 5), backend="triton")
except ImportError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fused-distill[triton]" in done.stdout
