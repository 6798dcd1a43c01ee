"""The kernels in the layout of Hugging Face's package `kernels`: built from this tree, and loaded by path."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import BACKEND, DEVICE
from fused_distill import reference

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hub") / "kernels"
    script = ROOT / "kernels/hub/build.py"
    command = [sys.executable, script, "--output", output, "--backends", "cuda", "rocm", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    return output


@pytest.fixture(autouse=True)
def forget_modules() -> Iterator[None]:
    """Forget modules of the test, because two loaders give them the same names."""
    yield
    for name in [name for name in sys.modules if name.startswith("_fused_distill_kernels")]:
        del sys.modules[name]


def load(folder: Path) -> ModuleType:
    """Import this device's variant under the name in its metadata, as `kernels.get_local_kernel` does."""
    backend = {"cpu": "cpu", "cuda": "rocm" if torch.version.hip else "cuda"}[DEVICE.type]
    variant = folder / "build" / f"torch-{backend}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", ["cuda", "rocm", "cpu"])
def test_metadata_has_the_digest_of_every_file(folder: Path, backend: str) -> None:
    variant = folder / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text())
    files = {path.name: path.read_bytes() for path in variant.glob("*.py")}
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in files.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert metadata["backend"]["type"] == backend
    assert metadata["id"].isidentifier()


def test_kernels_are_those_of_this_tree(folder: Path) -> None:
    for path in (ROOT / "kernels/fused_distill_kernels").glob("*.py"):
        assert (
            (folder / "torch-ext/fused_distill_kernels" / path.name).read_text().startswith(path.read_text())
        )


def test_modules_import_nothing_but_themselves_torch_and_triton(folder: Path) -> None:
    code = """
import importlib.util, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fused_distill", "fused_distill_kernels"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
spec = importlib.util.spec_from_file_location("_unique", sys.argv[1])
module = sys.modules["_unique"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*module.__all__)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "build/torch-cuda/__init__.py"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"JSDKernels", "LossConfig", "TopKLossConfig", "tail_sums"} <= {*done.stdout.split()}


def load_by_package(folder: Path) -> ModuleType:
    return pytest.importorskip("kernels.load").get_local_kernel(folder)


@pytest.mark.skipif(BACKEND != "triton", reason="runs kernels")
@pytest.mark.parametrize("loader", [load, load_by_package])
def test_example_of_the_card_gives_reverse_kl_and_its_gradient(
    folder: Path, loader: Callable[[Path], ModuleType]
) -> None:
    card = (folder / "CARD.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    names = {"kernel": loader(folder), "device": DEVICE}
    exec(code.replace("32000", "5000"), names)
    student = names["student_logits"].double().requires_grad_()
    eye = torch.eye(student.shape[1], dtype=torch.float64, device=DEVICE)
    loss = reference.linear_jsd(
        student, eye, names["teacher_logits"].double(), eye, beta=1.0, reduction="none"
    )
    torch.testing.assert_close(names["loss"], loss.float(), rtol=1e-5, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(names["gradient"], student.grad.float(), rtol=1e-4, atol=1e-8)
