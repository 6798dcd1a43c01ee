"""Build and load the C++ row losses: once per machine, by its C++ compiler, when they are first used."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = ("jsd.cpp", "tail.cpp")
CACHE_VARIABLE = "FUSED_DISTILL_CACHE"
# -fno-trapping-math and -fno-math-errno let comparisons and roundings become vector instructions. They change
# no result, unlike -ffast-math, which takes NaN and infinity for impossible and may come with CXX.
_FLAGS = (
    "-fno-fast-math",
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-Wno-psabi",
)
_SUFFIX = {torch.float32: "float", torch.float64: "double"}


class CannotBuildError(Exception):
    """The C++ row losses cannot be built or loaded here; the message is the reason."""


def why_unavailable() -> str | None:
    """Return why the C++ row losses cannot be used on this machine, or None if they can."""
    library = _library()
    return str(library) if isinstance(library, CannotBuildError) else None


def call(name: str, dtype: torch.dtype, arguments: ctypes.Structure) -> None:
    """Call a function of the library with its arguments for a dtype, float32 or float64.

    Raises:
        CannotBuildError: see `why_unavailable`.
    """
    library = _library()
    if isinstance(library, CannotBuildError):
        raise library
    getattr(library, f"{name}_{_SUFFIX[dtype]}")(ctypes.byref(arguments))


def pointer(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """Return the address of the first element of a tensor of a dtype, None for None.

    Raises:
        TypeError: the tensor has another dtype, whose memory C++ would misread, or no memory of its own, as a
            tensor that consists of others.
    """
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        raise TypeError(f"internal error: a C++ row loss takes a tensor of {dtype}, got {tensor.dtype}")
    address = tensor.data_ptr()
    if not address and tensor.numel():
        kind = type(tensor).__name__
        raise TypeError(f"backend='cpp' takes tensors with memory, got {kind}; backend='torch' takes others")
    return address


def arguments_type(**fields: str) -> Any:
    """Return a `ctypes.Structure` of 64-bit integers ("i") and pointers ("p") in this order."""
    types = {"i": ctypes.c_int64, "p": ctypes.c_void_p}
    members = [(name, types[kind]) for name, kind in fields.items()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})


@cache
def _library() -> ctypes.CDLL | CannotBuildError:
    """Return the loaded library, or why there is none, so that a failing build is tried once per process."""
    try:
        return _load()
    except CannotBuildError as error:
        return error
    except OSError as error:  # of the cache folder, of starting the compiler, of loading
        return CannotBuildError(str(error))


def _load() -> ctypes.CDLL:
    chosen = _chosen_compiler()
    candidates = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    compiler = next((candidate for candidate in candidates if shutil.which(candidate[0])), None)
    if compiler is None and chosen:
        raise CannotBuildError(f"the C++ compiler that CXX names was not found: {chosen[0]}")
    if compiler is None:
        raise CannotBuildError("no C++ compiler was found: install g++ or clang++, or set CXX")
    version = _run([*compiler, "--version"]).stdout
    threads = "-pthread" if "clang" in version else "-fopenmp"  # see for_rows in rows.h
    command = [*compiler, *_FLAGS, threads, _native_flag()]
    path = _cache_folder() / f"rows-{_identity(command, version)}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged
            path.unlink(missing_ok=True)
    _compile(command, path)
    return ctypes.CDLL(str(path))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler, whose messages are English."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )


def _chosen_compiler() -> list[str]:
    """Return the compiler that CXX names, which may have arguments, as in "ccache g++"."""
    given = os.environ.get("CXX", "")
    try:
        return shlex.split(given)
    except ValueError as error:  # an unbalanced quote
        raise CannotBuildError(f"CXX is not a command line ({error}): {given}") from error


def _native_flag() -> str:
    """Return the option for all instructions of this machine's processor."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _cache_folder() -> Path:
    own, shared = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache", "fused-distill")
    try:
        return folder.expanduser().absolute()
    except RuntimeError as error:  # no HOME, and a user that the system does not know
        raise CannotBuildError(f"{error}; set {CACHE_VARIABLE} to a folder for the built library") from error


def _identity(command: list[str], version: str) -> str:
    """Return a name for what the library depends on: sources, compiler, C library and processor.

    The compiler's macros tell the last two: there is one for each extension of the processor's instructions.
    """
    macros = _run([*command, "-dM", "-E", "-x", "c++", "-include", "cstdint", os.devnull]).stdout
    digest = hashlib.sha256(repr((command, version, sys.platform, macros)).encode())
    for file in sorted(FOLDER.glob("*.h")) + [FOLDER / name for name in SOURCES]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    """Compile the library under another name. The first of several processes gives it its own.

    It must not be replaced then, because another machine may have loaded it from a network file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        sources = [str(FOLDER / name) for name in SOURCES]
        done = _run([*command, *sources, "-o", str(built)])
        if done.returncode:
            first_error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise CannotBuildError(f"{command[0]} failed: {first_error.strip()}")
        with built.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.link(built, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            built.replace(path)
