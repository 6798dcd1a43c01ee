"""The C++ row losses: how they are built, and what happens where they cannot be."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKEND, TOPK, Case, cases, topk_cases
from checks import assert_results_close, with_few_examples
from fused_distill import fused_linear_jsd
from fused_distill.config import LossConfig
from fused_distill.rows import backend
from fused_distill.rows.base import StudentRows, TeacherRows
from fused_distill.rows.cpp import library
from fused_distill.rows.full_cpp import CppJSD
from fused_distill.rows.tail_cpp import CppTail
from hypothesis import given

pytestmark = pytest.mark.skipif(BACKEND == "triton", reason="about the CPU's backends")


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forget the loaded library and given warnings, as if nothing had been used yet."""
    caches = library._library, backend._warn_of_slow_backend  # pyright: ignore[reportPrivateUsage]
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def reason_in_a_new_process(cache: Path) -> str:
    """Return what `why_unavailable` returns in another process."""
    code = "from fused_distill.rows.cpp.library import why_unavailable; print(why_unavailable())"
    environment = {**os.environ, library.CACHE_VARIABLE: str(cache)}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()


def compiler_script(path: Path, script: str | bytes) -> Path:
    """Make a shell script that stands for a compiler."""
    path.write_bytes(b"#!/bin/sh\n" + (script.encode() if isinstance(script, str) else script) + b"\n")
    path.chmod(0o755)
    return path


def small_call(**options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, 4, generator=generator) for rows in (5, 30, 5, 30)]
    return fused_linear_jsd(*tensors, **options)  # pyright: ignore[reportArgumentType]


def without_workspace(case: Case) -> Case:
    """Return the call with the default workspace: PyTorch needs more for its temporaries than C++."""
    return case.with_options(workspace_bytes=None)


@with_few_examples
@given(cases())
def test_pytorch_and_cpp_rows_agree(case: Case) -> None:
    case = without_workspace(case)
    assert_results_close(case.run("torch"), case.run("cpp"), 1e-4, 1e-5)


@with_few_examples
@given(topk_cases())
def test_pytorch_and_cpp_rows_of_a_top_k_teacher_agree(case: Case) -> None:
    case = without_workspace(case)
    assert_results_close(case.run("torch"), case.run("cpp"), 1e-4, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [None, "bucket", "truncate"])
def test_pytorch_rows_in_several_chunks_equal_the_oracle(tail: str | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((70, 16), (1000, 16), (70, 24), (1000, 24))
    hs, ws, ht, wt = ((0.7 * torch.randn(size, generator=generator)).to(dtype) for size in sizes)
    keywords = {"labels": torch.arange(70) * 3}
    options = {"beta": 0.3, "hard_weight": 0.5, "temperature": 1.4, "student_softcap": 6.0}
    case = Case((hs, ws, ht, wt), keywords, options)
    if tail is not None:
        top = torch.log_softmax(ht.float() @ wt.float().T, -1).topk(9)
        case = Case((hs, ws, top.values, top.indices), keywords, {**options, "tail": tail}, TOPK)
    case = case.with_options(workspace_bytes=30 * case.min_workspace("torch"))
    result, oracle = case.run("torch"), case.oracle()
    assert result.loss.item() == pytest.approx(oracle.loss.item(), rel=1e-5)
    for grad, exact in zip(result.grads, oracle.grads, strict=True):
        assert grad is not None
        assert exact is not None
        rounding = 1e-5 if dtype == torch.float32 else 2**-8
        assert (grad.double() - exact).norm() < rounding * exact.norm()


def test_without_a_compiler_pytorch_computes_the_same_with_one_warning(
    new_process: pytest.MonkeyPatch,
) -> None:
    expected = small_call(backend="cpp")
    library._library.cache_clear()  # pyright: ignore[reportPrivateUsage]
    new_process.setattr(library.shutil, "which", lambda name: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [small_call() for _ in range(3)]
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 1
    assert "several times slower" in messages[0]
    assert "install g++ or clang++, or set CXX" in messages[0]
    for result in results:
        torch.testing.assert_close(result, expected)


def test_asking_for_cpp_without_a_compiler_is_an_error(new_process: pytest.MonkeyPatch) -> None:
    new_process.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="backend='cpp' cannot be built: no C\\+\\+ compiler was found"):
        small_call(backend="cpp")


def test_the_compilers_first_error_is_the_reason(new_process: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "echo 'note: x' >&2\necho 'a.h:1: error: no such header' >&2\nexit 1"
    compiler = compiler_script(tmp_path / "broken-c++", script)
    new_process.setenv("CXX", str(compiler))
    new_process.setenv(library.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert str(library.why_unavailable()).endswith("failed: a.h:1: error: no such header")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_compiler_may_be_given_with_arguments(new_process: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = tmp_path / "arguments"
    script = f'echo "$@" >> {arguments}\nexec c++ "$@"'
    compiler = compiler_script(tmp_path / "c++ with a space", script)
    new_process.setenv("CXX", f"'{compiler}' -DNEW_MACRO")
    new_process.setenv(library.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert library.why_unavailable() is None
    assert all(line.startswith("-DNEW_MACRO ") for line in arguments.read_text().splitlines())


@pytest.mark.parametrize("instructions", ["-march=x86-64", "-march=x86-64-v3"])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86's instruction sets")
def test_processors_with_shorter_vectors_get_the_same_results(
    instructions: str, new_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if instructions == "-march=x86-64-v3" and not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")
    native = small_call(beta=0.3, backend="cpp")
    library._library.cache_clear()  # pyright: ignore[reportPrivateUsage]
    new_process.setattr(library, "_native_flag", lambda: instructions)
    new_process.setenv(library.CACHE_VARIABLE, str(tmp_path))
    torch.testing.assert_close(small_call(beta=0.3, backend="cpp"), native, rtol=1e-6, atol=0)


def test_a_compiler_that_does_not_exist_is_the_reason(new_process: pytest.MonkeyPatch) -> None:
    new_process.setenv("CXX", "no-such-c++ -O2")
    assert library.why_unavailable() == "the C++ compiler that CXX names was not found: no-such-c++"


def test_a_compilers_message_in_another_encoding_is_shown(
    new_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = compiler_script(tmp_path / "broken-c++", b"echo 'error: ung\xfcltig' >&2\nexit 1")
    new_process.setenv("CXX", str(compiler))
    new_process.setenv(library.CACHE_VARIABLE, str(tmp_path))
    assert str(library.why_unavailable()).endswith("failed: error: ung\ufffdltig")


def test_fast_math_of_the_compilers_variable_does_not_hold(
    new_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forbidden = torch.zeros(30)
    forbidden[3:6] = -torch.inf
    expected = small_call(student_bias=forbidden, teacher_bias=forbidden, backend="torch")
    new_process.setenv("CXX", "c++ -ffast-math")
    new_process.setenv(library.CACHE_VARIABLE, str(tmp_path))
    result = small_call(student_bias=forbidden, teacher_bias=forbidden, backend="cpp")
    torch.testing.assert_close(result, expected)


def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    assert reason_in_a_new_process(tmp_path) == "None"
    (built,) = tmp_path.iterdir()
    built.write_bytes(b"")
    assert reason_in_a_new_process(tmp_path) == "None"
    assert built.stat().st_size > 0


def test_a_library_that_another_process_has_built_is_not_replaced(
    new_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another machine may have loaded it from a network file system."""
    other = tmp_path / "other"
    compiler = compiler_script(
        tmp_path / "c++",
        'c++ "$@" || exit 1\n'
        f'case "$*" in *-shared*-o*) for out; do :; done; cp "$out" "{tmp_path}/cache/$(basename "$out")";\n'
        f'stat -c %i "{tmp_path}/cache/$(basename "$out")" > "{other}";; esac',
    )
    new_process.setenv("CXX", str(compiler))
    new_process.setenv(library.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert library.why_unavailable() is None
    (built,) = (tmp_path / "cache").iterdir()
    assert built.stat().st_ino == int(other.read_text())


@pytest.mark.parametrize("folder", [".", "~/cache"])
def test_the_cache_may_be_given_relative_to_a_folder(
    folder: str, new_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    new_process.chdir(tmp_path)
    new_process.setenv("HOME", str(tmp_path))
    new_process.setenv(library.CACHE_VARIABLE, folder)
    assert library.why_unavailable() is None
    (built,) = tmp_path.rglob("rows-*.so")
    assert built.parent == tmp_path / folder.removeprefix("~/")


def test_processors_with_other_instructions_have_libraries_of_their_own(
    new_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The option -march=native is the same on both."""
    compiler = tmp_path / "c++"
    new_process.setenv("CXX", str(compiler))
    new_process.setenv(library.CACHE_VARIABLE, str(tmp_path / "cache"))
    for macro in ("__EXTENSION_A__", "__EXTENSION_B__"):
        compiler_script(compiler, f'exec c++ -D{macro} "$@"')
        library._library.cache_clear()  # pyright: ignore[reportPrivateUsage]
        assert library.why_unavailable() is None
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_tensors_without_memory_of_their_own_are_refused() -> None:
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    bias = torch.ones(30)
    with pytest.raises(TypeError, match=r"tensors with memory, got TwoTensor; backend='torch' takes others"):
        small_call(student_bias=two.TwoTensor(bias, bias), backend="cpp")


def test_a_cache_that_cannot_be_written_is_the_reason(
    new_process: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    new_process.setenv(library.CACHE_VARIABLE, str(occupied / "cache"))
    assert str(occupied) in str(library.why_unavailable())


@pytest.fixture
def homeless(new_process: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let no home folder be found, as for a user of a container who is not in its list of users."""

    def expanduser(path: Path) -> Path:
        if path.parts[0] == "~":
            raise RuntimeError("Could not determine home directory.")
        return path

    new_process.setattr(library.Path, "expanduser", expanduser)
    for variable in (library.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        new_process.delenv(variable, raising=False)
    return new_process


def test_without_a_home_folder_the_reason_names_the_variable_of_the_cache(
    homeless: pytest.MonkeyPatch,
) -> None:
    del homeless
    with pytest.raises(RuntimeError, match=f"cannot be built: Could not .*set {library.CACHE_VARIABLE} to a"):
        small_call(backend="cpp")
    with pytest.warns(RuntimeWarning, match=f"several times slower.*set {library.CACHE_VARIABLE}"):
        small_call()


@pytest.mark.parametrize("variable", [library.CACHE_VARIABLE, "XDG_CACHE_HOME"])
def test_a_given_cache_needs_no_home_folder(
    variable: str, homeless: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    homeless.setenv(variable, str(tmp_path))
    assert library.why_unavailable() is None
    assert len(list(tmp_path.rglob("rows-*.so"))) == 1


def test_an_unbalanced_quote_of_the_compilers_variable_is_the_reason(new_process: pytest.MonkeyPatch) -> None:
    new_process.setenv("CXX", "'c++ -O2")
    with pytest.raises(RuntimeError, match=r"cannot be built: CXX is not a command line \(.*\): 'c\+\+ -O2$"):
        small_call(backend="cpp")
    with pytest.warns(RuntimeWarning, match="several times slower.*CXX is not a command line"):
        small_call()


def rows(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(2, 5, dtype=dtype)


@pytest.mark.parametrize(
    "wrong", ["teacher", "grad", "weight", "student_bias", "teacher_bias", "reverse_weight", "labels"]
)
def test_rows_of_another_dtype_are_refused(wrong: str) -> None:
    def dtype(name: str) -> torch.dtype:
        right = torch.int64 if name == "labels" else torch.float32
        return torch.float64 if name == wrong else right

    student = StudentRows(
        rows(torch.float32),
        rows(dtype("weight"))[:, 0],
        rows(dtype("student_bias"))[0],
        rows(dtype("labels"))[:, 0],
        reverse_weight=rows(dtype("reverse_weight"))[:, 0],
    )
    teacher = TeacherRows(rows(dtype("teacher")), rows(dtype("teacher_bias"))[0])
    with pytest.raises(
        TypeError, match=r"^internal error: .* of torch\.(float32|int64), got torch\.float64$"
    ):
        CppJSD()(student, teacher, LossConfig(divergence="mixed_kl"), grad=rows(dtype("grad")))


def test_tails_of_another_dtype_are_refused() -> None:
    logits, double, config = rows(torch.float32), rows(torch.float64), LossConfig()
    tail = CppTail().statistics(logits, None, config, block_rows=None)
    with pytest.raises(TypeError, match=r"of torch\.float32, got torch\.float64$"):
        CppTail().statistics(logits, double[0], config, block_rows=None)
    with pytest.raises(TypeError, match=r"of torch\.float32, got torch\.float64$"):
        CppTail().gradient(logits, None, config, tail, tail.max_z, None, double, block_rows=None)
    narrow = tail._replace(sum_z=tail.sum_z.float())
    with pytest.raises(TypeError, match=r"of torch\.float64, got torch\.float32$"):
        CppTail().gradient(logits, None, config, narrow, tail.max_z, None, logits, block_rows=None)


def test_processes_that_start_at_once_build_one_library(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        assert [*pool.map(reason_in_a_new_process, [tmp_path] * 2)] == ["None", "None"]
    (built,) = tmp_path.iterdir()
    before = built.stat().st_mtime_ns
    assert reason_in_a_new_process(tmp_path) == "None"
    assert built.stat().st_mtime_ns == before
