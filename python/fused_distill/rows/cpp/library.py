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
# no result, unlike -ffast-math, which would take NaN and infinity for impossible.
_FLAGS = (
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


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first element, None for None."""
    return None if tensor is None else tensor.data_ptr()


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
    chosen = shlex.split(os.environ.get("CXX", ""))  # may have arguments, as in "ccache g++"
    candidates = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    compiler = next((candidate for candidate in candidates if shutil.which(candidate[0])), None)
    if compiler is None:
        raise CannotBuildError("no C++ compiler was found: install g++ or clang++, or set CXX")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    threads = "-pthread" if b"clang" in version else "-fopenmp"  # see for_rows in rows.h
    command = [*compiler, *_FLAGS, threads, _native_flag()]
    path = _cache_folder() / f"rows-{_identity(command, version)}.so"
    if not path.exists():
        _compile(command, path)
    return ctypes.CDLL(str(path))


def _native_flag() -> str:
    """Return the option for all instructions of this machine's processor."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-distill"
    return Path(os.environ.get(CACHE_VARIABLE) or default)


def _identity(command: list[str], version: bytes) -> str:
    """Return a name for what the library depends on: sources, compiler, and the processor's instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = next((line for line in lines if line.lower().startswith(("flags", "features"))), lines[0])
    digest = hashlib.sha256(repr((command, version, sys.platform, processor)).encode())
    for file in sorted(FOLDER.glob("*.h")) + [FOLDER / name for name in SOURCES]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    """Compile the library under another name, so that processes do not disturb each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        sources = [str(FOLDER / name) for name in SOURCES]
        done = subprocess.run(
            [*command, *sources, "-o", str(built)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            first_error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise CannotBuildError(f"{command[0]} failed: {first_error.strip()}")
        built.replace(path)
