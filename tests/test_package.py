"""Source distribution and wheel: what they contain, and that the wheel works with torch alone."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and the wheel from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


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


def test_source_distribution_contains_what_tests_and_documentation_need(dist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("compares with the files that git tracks")
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    needed = {name for name in tracked.splitlines() if not name.startswith(".")}
    assert needed - names == set()
    assert {name for name in names if ".venv" in name or "__pycache__" in name} == set()


def test_metadata_pass_the_checks_of_the_package_index(dist: Path) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_citation_names_the_version_of_the_package(wheel: Path) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == wheel.name.split("-")[1]


def test_wheel_works_in_an_empty_venv_with_only_torch(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site_packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    link_packages(torch_and_its_requirements(), site_packages)
    install = ["--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
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
