"""The environment report of `fused-distill env`."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fused_distill import env
from fused_distill.chunked.cpu_product import CPUProduct
from fused_distill.cli import main
from fused_distill.rows import backend

H100 = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0)
MI300X = SimpleNamespace(name="MI300X", total_memory=192 << 30, gcnArchName="gfx942")
OPTIONAL = ("triton", "numpy", "transformers", "httpx", "yaml", "pydantic", "safetensors")


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch,
    gpu: SimpleNamespace,
    *,
    cuda: str | None = None,
    hip: str | None = None,
    triton: bool = True,
    missing: str | None = None,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backend, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(backend, "_missing_for_triton", lambda: missing)


def test_report_names_os_python_torch_and_the_cpu() -> None:
    report = env.report()
    assert report.startswith("OS: ")
    assert f"\nPython: {sys.version.split()[0]}\n" in report
    assert f"\ntorch: {torch.__version__} (" in report
    assert (
        f", {torch.get_num_threads()} threads, capability {torch.backends.cpu.get_cpu_capability()}" in report
    )
    assert 'backend="auto": cpp (a CPU with a C++ compiler)' in report


def test_report_says_which_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("pytest", "no-such-package"))
    lines = env.report().splitlines()
    assert f"pytest: {pytest.__version__}" in lines
    assert "no-such-package: not installed" in lines


def test_report_on_a_cuda_gpu_selects_triton_but_torch_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, H100, cuda="12.8")
    report = env.report()
    assert "(CUDA 12.8)" in report
    gpu = report.partition("cuda:0: ")[2].splitlines()
    assert gpu == [
        "NVIDIA H100, 80.0 GiB, compute capability 9.0",
        '  backend="auto": triton (a CUDA or ROCm device, float32 logits, and Triton is installed)',
        '  backend="auto" for float64 inputs: torch (the Triton kernels compute in float32)',
    ]


def test_report_on_a_gpu_that_does_not_start_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    pretend_gpu(monkeypatch, H100, cuda="12.8")
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert env.report().endswith("\n\ncuda:0: cannot be used: The NVIDIA driver on your system is too old")


def test_report_on_a_rocm_gpu_names_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, MI300X, hip="6.4")
    report = env.report()
    assert "(ROCm 6.4)" in report
    assert "cuda:0: MI300X, 192.0 GiB, compute capability gfx942" in report


def test_report_on_a_gpu_without_triton_gives_that_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, H100, cuda="12.8", triton=False)
    assert '  backend="auto": torch (Triton is not installed)' in env.report().splitlines()


def test_a_gpu_without_a_c_compiler_uses_pytorch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, H100, cuda="12.8", missing="no C compiler was found")
    backend._warn_of_slow_backend.cache_clear()  # pyright: ignore[reportPrivateUsage]
    with pytest.warns(RuntimeWarning, match="no C compiler was found") as caught:
        chosen = [backend.choose_backend("auto", torch.device("cuda"), torch.float32) for _ in range(2)]
    assert chosen == ["torch", "torch"]
    assert len(caught) == 1


def test_a_missing_c_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    missing = backend._missing_for_triton.__wrapped__  # pyright: ignore[reportPrivateUsage]
    assert "install gcc or clang, or set CC" in str(missing())
    monkeypatch.setenv("CC", "icx")
    assert "C compiler" not in (missing() or "")


def test_report_names_the_library_of_cpu_matrix_products_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cpu_product", lambda: CPUProduct("onednn", "it was faster"))
    assert "float32 matrix products: oneDNN (it was faster; MKL " in env.report()


def test_auto_backend_is_what_choose_backend_takes() -> None:
    for device in (torch.device("cpu"), torch.device("cuda"), torch.device("mps")):
        for dtype in (torch.float32, torch.float64):
            assert backend.choose_backend("auto", device, dtype) == backend.auto_backend(device, dtype)[0]


def test_the_module_runs_with_torch_alone() -> None:
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
    code += "runpy.run_module('fused_distill.env', run_name='__main__')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert f"torch: {torch.__version__}" in done.stdout


def test_the_command_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    assert capsys.readouterr().out == env.report() + "\n"
