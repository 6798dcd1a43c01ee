"""First ten minutes on a GPU: is everything right there, and does the time go where it should?

    python bench/first_run_gpu.py [--device cuda:0] [--output FILE] [-k TEXT]
    python bench/first_run_gpu.py --device cpu --small       the same code at tiny sizes, without a GPU

Runs the checks of gpu_correctness.py and gpu_speed.py one after the other, each whatever became of the
others, and writes JSON and a readable report. The exit status is 1 if a check found a problem or failed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_correctness as gpu_correctness  # registers its checks, as the next one does
import gpu_speed as gpu_speed
import torch
from first_run_checks import CHECKS, Check, CheckSkipped, Setting
from suite import header, machine, results_folder, write_json


def run(check: Check, setting: Setting) -> dict[str, Any]:
    """Return a check's name, status, time, numbers and problems; an exception becomes the status "error"."""
    outcome: dict[str, Any] = {"check": check.name, "status": "ok", "problems": [], "rows": []}
    started = time.perf_counter()
    try:
        if check.needs_cuda and setting.device.type != "cuda":
            raise CheckSkipped("needs CUDA or ROCm")
        result = check.function(setting)
        setting.synchronize()  # so that a fault of the GPU belongs to the check that caused it
        outcome |= {"problems": result.problems, "rows": result.rows}
        outcome["status"] = "problem" if result.problems else "ok"
    except CheckSkipped as reason:
        outcome |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        outcome |= {"status": "error", "reason": f"{type(error).__name__}: {error}"}
        outcome["traceback"] = traceback.format_exc()
    return {**outcome, "seconds": time.perf_counter() - started}


def can_go_on(setting: Setting) -> bool:
    """Free the memory of a check, and return False if a fault has made the GPU useless to this process."""
    try:
        setting.synchronize()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception:  # drivers raise many types
        return False
    return True


def report(outcomes: Iterable[dict[str, Any]]) -> str:
    """Return the outcomes as text: one line per check, then its problems and its numbers."""
    lines: list[str] = []
    for outcome in outcomes:
        lines.append(f"{outcome['status']:8s} {outcome['check']} ({outcome['seconds']:.1f} s)")
        lines += [f"    {outcome['reason']}"] if "reason" in outcome else []
        lines += [f"    ! {problem}" for problem in outcome["problems"]]
        lines += [f"      {', '.join(map(_entry, row.items()))}" for row in outcome["rows"]]
    return "\n".join(lines)


def _entry(item: tuple[str, Any]) -> str:
    name, value = item
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:0 by default; cpu needs --small")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to check the code paths")
    parser.add_argument("--output", type=Path, help="result file (default: named after the GPU)")
    parser.add_argument("-k", default="", help="only checks whose name contains this text")
    arguments = parser.parse_args()
    setting = Setting(torch.device(arguments.device), arguments.small)
    if setting.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU found; use --device cpu --small to run the code paths on the CPU")
    if setting.device.type == "cpu" and not setting.small:
        parser.error("--device cpu needs --small")
    if setting.device.type == "cuda":
        torch.cuda.set_device(setting.device)  # whose stream the timed events are recorded on
    slug = re.sub(r"[^a-z0-9]+", "-", f"first-run {machine().get('gpu', 'cpu')}".lower()).strip("-")
    output = (arguments.output or results_folder(arguments.small) / f"{slug}.json").resolve()
    content = header()
    outcomes: list[dict[str, Any]] = []
    for check in CHECKS:
        if arguments.k in check.name:
            outcomes.append(run(check, setting))
            print(report(outcomes[-1:]), flush=True)
            write_json(output, {**content, "outcomes": outcomes})
            if not can_go_on(setting):
                print("The GPU takes no more work from this process. Run the checks that follow with -k.")
                break
    counts = {
        status: sum(o["status"] == status for o in outcomes)
        for status in ("ok", "problem", "error", "skipped")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    print(output)
    return int(counts["problem"] + counts["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
