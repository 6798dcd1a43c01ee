"""Measure two commits in one run, in turns, after their tests pass.

    python bench/compare.py --base REF [--head REF] [--skip-tests] [--device cuda] [--output FILE] [--small]

The measuring code is that of this working tree for both; only the library differs. Without --head the library
is that of the working tree, uncommitted changes included. The table gives both commits' times, and the ratio
head / base of the rounds: its median and its range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cpu import SHAPES, SMALL_SHAPES, SMALL_TOPK_SHAPES, TOPK_SHAPES
from gpu import on_gpu, shapes
from models import QWEN3_MEDIUM
from providers import Case
from suite import ROOT, Planned, Rounds, Suite, chosen_product, header, summary, write_json
from worker import Worker

QUICK_TESTS = ("tests/test_golden.py", "tests/test_divergences.py", "tests/test_linear_jsd.py")
FULL_BETAS, TOPK_BETAS = (0.5, 0.0, 1.0), (0.5,)
SIDES = ("base", "head")


class CompareFailed(Exception):
    """The commits cannot be compared; the message says why."""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompareFailed(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checkout(ref: str | None) -> Iterator[Path]:
    """Provide a folder with the files of a commit, or the working tree for None."""
    if ref is None:
        yield ROOT
        return
    commit = git("rev-parse", "--verify", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="fused-distill-compare-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def environment_of(tree: Path) -> dict[str, str]:
    """Return the variables that let a process import a tree's library."""
    return {"PYTHONPATH": os.pathsep.join(str(tree / folder) for folder in ("python", "kernels"))}


def check_library(side: str, tree: Path) -> None:
    """Raise an error if processes of a side would not import that side's library."""
    worker = Worker("fused-distill", environment_of(tree))
    try:
        found = Path(worker.library())
    finally:
        worker.close()
    if tree.resolve() not in found.resolve().parents:
        raise CompareFailed(f"{side}: the library is imported from {found}, expected from {tree}")


def run_tests(side: str, tree: Path, tests: tuple[str, ...]) -> None:
    """Run those of the tests that a tree has; raise an error if one fails or there is none."""
    present = [test for test in tests if (tree / test).exists()]
    if not present:
        raise CompareFailed(f"{side} has none of the tests {', '.join(tests)}; see --tests and --skip-tests")
    print(f"{side}: running {' '.join(present)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *present],
        cwd=tree,
        env=os.environ | environment_of(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CompareFailed(f"{side}: tests fail, so that times mean nothing:\n{done.stdout[-2000:]}")


def groups(device: str, small: bool) -> list[list[Planned]]:
    """Return the rows of both sides, each shape a group."""
    product = chosen_product()

    def group(name: str, case: Case, betas: tuple[float, ...]) -> list[Planned]:
        return [Planned(name, replace(case, beta=beta), product, side) for beta in betas for side in SIDES]

    full, topk = (SMALL_SHAPES, SMALL_TOPK_SHAPES) if small else (SHAPES, TOPK_SHAPES[:1])
    if device == "cuda":
        full = shapes(small)[:1]
        student = QWEN3_MEDIUM.student
        topk = [] if small else [on_gpu(Case(8192, student.vocab_size, student.hidden_size, 0, k=64), small)]
    return [
        *(group("fused-distill", case, FULL_BETAS) for case in full),
        *(group("fused-distill, bucket", case, TOPK_BETAS) for case in topk),
    ]


def pairs(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows of base and head that belong together."""
    return zip(rows[::2], rows[1::2], strict=True)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | base | head | head / base (range) | memory, head / base |", "|---|---|---|---|---|"]
    for base, head in pairs(rows):
        teacher = f"K{base['k']}" if base["k"] else f"Dt{base['teacher_dim']}"
        name = f"{base['provider']}, N{base['tokens']} V{base['vocab']} Ds{base['student_dim']} {teacher}"
        cells = [f"{name}, beta {base['beta']:g}", summary(base), summary(head)]
        if "error" in base or "error" in head:
            cells += ["", ""]
        else:
            ratios = [h / b for b, h in zip(base["seconds"], head["seconds"], strict=False)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
            memory = head.get("extra_bytes"), base.get("extra_bytes")
            cells.append(f"{memory[0] / memory[1]:.2f}" if memory[0] and memory[1] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Test and measure both commits; return the rows."""
    with checkout(arguments.base) as base, checkout(arguments.head) as head:
        trees = dict(zip(SIDES, (base, head), strict=True))
        for side, tree in trees.items():
            check_library(side, tree)
            if not arguments.skip_tests:
                run_tests(side, tree, tuple(arguments.tests))
        commits = {
            "base": git("rev-parse", arguments.base),
            "head": git("rev-parse", arguments.head or "HEAD"),
        }
        run = {**header(), "commits": commits, "rows": []}
        # The same number of rounds for both, so that rounds can be compared one by one.
        n_rounds = 2 if arguments.small else arguments.rounds
        environments = {side: environment_of(tree) for side, tree in trees.items()}
        suite = Suite(lambda _: None, run, Rounds(0.0, n_rounds, n_rounds), environments)
        try:
            for group in groups(arguments.device, arguments.small):
                suite.measure(group)
        finally:
            suite.close()
            if arguments.output and run["rows"]:
                write_json(arguments.output.resolve(), run)
    return run["rows"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="commit to compare with")
    parser.add_argument("--head", help="commit to compare (default: the working tree)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each row (default: 7)")
    parser.add_argument("--tests", nargs="+", default=QUICK_TESTS, help="tests that must pass before")
    parser.add_argument("--skip-tests", action="store_true", help="measure without running tests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks the code paths")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch sees none")
    try:
        rows = compare(arguments)
        print(table(rows))
        failed = [row for row in rows if "error" in row]
        if failed:
            raise CompareFailed(f"{len(failed)} of {len(rows)} rows could not be measured")
    except CompareFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
