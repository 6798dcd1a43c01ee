"""How time and memory of a loss grow with tokens, vocabulary, workspace and threads, and the products alone.

    python bench/scaling.py [SWEEP ...] [--output FILE] [--small]

Hidden sizes are those of Gemma 3 270M and 1B; beta is 0.5, on the CPU in float32. `python bench/report.py`
draws the figure of docs/benchmarks.md from the result.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models import GEMMA3_SMALL
from providers import FLOOR, Case
from suite import (
    Planned,
    Rounds,
    chosen_product,
    device_name,
    header,
    recorded,
    results_folder,
    slug,
)

OURS = "fused-distill"
MIB = 1 << 20


def sweeps(small: bool) -> dict[str, list[Case]]:
    """Return the cases of each sweep, the smallest first."""
    if small:
        base = Case(32, 256, 16, 24)
        return {
            "tokens": [replace(base, tokens=n) for n in (8, 32)],
            "vocab": [replace(base, vocab=v) for v in (128, 256)],
            "workspace_bytes": [replace(base, workspace_bytes=mib * MIB) for mib in (1, 2)],
            "threads": [base],
        }
    base = Case(1024, 32768, *GEMMA3_SMALL.dims)
    large = replace(base, tokens=2048, vocab=65536)
    return {
        "tokens": [replace(base, tokens=n) for n in (64, 256, 1024, 4096, 16384)],
        "vocab": [replace(base, vocab=v) for v in (8192, 32768, 131072, 262144)],
        "workspace_bytes": [replace(large, workspace_bytes=mib * MIB) for mib in (64, 256, 1024, 2048)],
        "threads": [base],
    }


def thread_counts() -> list[int]:
    """Return 1, 2, 4, ... up to the number of threads that torch uses here."""
    most = torch.get_num_threads()
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def groups(sweep: str, cases: list[Case]) -> list[list[Planned]]:
    product = chosen_product()
    if sweep == "threads":
        settings = [f"{n} threads" for n in thread_counts()]
        return [[Planned(name, cases[0], product, s) for s in settings for name in (FLOOR, OURS)]]
    if sweep == "workspace_bytes":  # the products do not depend on it
        floor = Planned(FLOOR, replace(cases[0], workspace_bytes=None), product)
        return [[floor, *(Planned(OURS, case, product) for case in cases)]]
    return [[Planned(name, case, product) for name in (FLOOR, OURS)] for case in cases]


def labelled(sweep: str, rows: list[dict[str, Any]]) -> None:
    """Name the sweep in its rows, and the number of threads."""
    for row in rows:
        threads = row.pop("setting", None)
        row |= {"sweep": sweep, "threads": int(threads.split()[0]) if threads else torch.get_num_threads()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweeps", nargs="*", help="which sweeps (default: all)")
    parser.add_argument("--output", type=Path, help="result file (default: named after the device)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks the code paths")
    arguments = parser.parse_args()
    wanted = sweeps(arguments.small)
    for name in arguments.sweeps:
        if name not in wanted:
            parser.error(f"no sweep {name!r}; there are {', '.join(wanted)}")
    name = f"{slug('scaling', device_name('cpu'))}.json"
    output = (arguments.output or results_folder(arguments.small) / name).resolve()
    run = {
        **header(),
        "part": "scaling",
        "rows": [],
    }
    threads = {
        f"{n} threads": {"OMP_NUM_THREADS": str(n), "MKL_NUM_THREADS": str(n)} for n in thread_counts()
    }
    rounds = Rounds(0.0, 2) if arguments.small else Rounds(seconds=6.0, at_least=2, at_most=5)
    with recorded(output, run, rounds, complete=not arguments.sweeps, environments=threads) as suite:
        for sweep in arguments.sweeps or wanted:
            for group in groups(sweep, wanted[sweep]):
                labelled(sweep, suite.measure(group))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
