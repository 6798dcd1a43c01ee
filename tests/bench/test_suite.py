"""How rows are measured: in turns, with shared inputs, and from the library of a given commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import models
import pytest
import suite
import torch
from cases import INTERPRETED
from providers import Case, load_inputs, make_inputs
from suite import Planned, Rounds, Suite, slug
from worker import ProviderFailed, Worker

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(tokens=40, vocab=300, student_dim=16, teacher_dim=24)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")


class FakeWorker:
    """Takes 1, 2, 3, ... seconds; a provider named "broken" fails in its second turn."""

    log: list[str]

    def __init__(self, provider: str, environment: dict[str, str] | None = None):
        self.provider, self.turns = provider, 0

    def prepare(self, key: str, case: Case, inputs: str | None = None) -> dict[str, float]:
        return {"loss": 1.0}

    def turn(self, key: str) -> list[float]:
        self.turns += 1
        self.log.append(self.provider)
        if self.provider == "broken" and self.turns == 2:
            raise ProviderFailed("out of memory")
        return [float(self.turns)]

    def reset(self) -> None: ...

    def close(self) -> None: ...


def measured(monkeypatch: pytest.MonkeyPatch, providers: list[str], rounds: Rounds) -> list[dict[str, Any]]:
    FakeWorker.log = []
    monkeypatch.setattr("suite.Worker", FakeWorker)
    suite = Suite(lambda run: None, {"rows": []}, rounds)
    return suite.measure([Planned(provider, CASE) for provider in providers])


def test_the_rows_of_a_group_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, ["a", "b", "c"], Rounds(0.0, 2))
    assert FakeWorker.log == ["a", "b", "c", "a", "b", "c"]


def test_steps_are_repeated_until_they_took_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measured(monkeypatch, ["a"], Rounds(seconds=5.0, at_least=2, at_most=9))
    assert row["seconds"] == [1.0, 2.0, 3.0]
    (row,) = measured(monkeypatch, ["a"], Rounds(seconds=99.0, at_least=2, at_most=4))
    assert len(row["seconds"]) == 4


def test_a_row_that_fails_gives_its_reason_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, other = measured(monkeypatch, ["broken", "a"], Rounds(0.0, 3))
    assert broken["error"] == "out of memory"
    assert "seconds" not in broken
    assert len(other["seconds"]) == 3


def test_shared_inputs_are_those_of_the_case(tmp_path: Path) -> None:
    expected = make_inputs(CASE)
    for _ in range(2):  # makes the file, then maps it
        for tensor, want in zip(load_inputs(CASE, tmp_path / "inputs.pt"), expected, strict=True):
            assert torch.equal(tensor, want)
            assert tensor.requires_grad == want.requires_grad


def test_a_file_name_holds_no_marks_of_the_manufacturer() -> None:
    assert slug("cpu", "Intel(R) Xeon(R) Processor", "2 threads") == "cpu-intel-xeon-2-threads"


def test_a_shape_is_named_after_its_models() -> None:
    assert models.names_of(151936, 1024, 4096) == "Qwen3 0.6B from Qwen3 8B"
    assert models.names_of(151936, 1024, 0) == "Qwen3 0.6B"
    assert "part of the vocabulary" in models.names_of(32768, 896, 1536)
    assert models.names_of(7, 8, 9) == ""


def test_a_pair_has_the_rows_that_both_heads_have() -> None:
    assert models.GEMMA3.vocab == 262144  # Gemma 3 4B has 64 rows more, for images


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, "-C", folder, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository whose first commit holds another library than the second."""
    folder = tmp_path / "repository"
    package = folder / "python" / "fused_distill"
    package.mkdir(parents=True)
    git(tmp_path, "init", "--quiet", "repository")
    for version in ("first", "second"):
        (package / "__init__.py").write_text(f"version = {version!r}\n")
        (folder / "test_version.py").write_text(f"def test_version():\n    assert {version!r} == 'first'\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", version)
    monkeypatch.setattr(compare, "ROOT", folder)
    return folder


def test_a_process_imports_the_library_of_a_commit(repository: Path) -> None:
    with compare.checkout("HEAD~1") as tree:
        compare.check_library("base", tree)
        assert "first" in (tree / "python" / "fused_distill" / "__init__.py").read_text()
    assert not tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_another_library_than_the_commits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(compare.CompareFailed, match="base: the library is imported from"):
        compare.check_library("base", tmp_path)


def test_commits_whose_tests_fail_are_not_compared(repository: Path) -> None:
    with pytest.raises(compare.CompareFailed, match="head: tests fail"):
        compare.run_tests("head", repository, ("missing.py", "test_version.py"))
    with compare.checkout("HEAD~1") as tree:
        compare.run_tests("base", tree, ("test_version.py",))


def test_an_unknown_commit_is_an_error(repository: Path) -> None:
    with pytest.raises(compare.CompareFailed, match="no-such-commit"), compare.checkout("no-such-commit"):
        pass


def script(name: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / name, "--small", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TORCH_COMPILE_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_libraries_are_compared_row_by_row(tmp_path: Path) -> None:
    output = tmp_path / "compare.json"
    head = git(ROOT, "rev-parse", "HEAD")
    printed = script("compare.py", "--base", head, "--skip-tests", "--output", str(output))
    content = json.loads(output.read_text())
    assert content["commits"] == {"base": head, "head": head}
    assert [row["setting"] for row in content["rows"]] == ["base", "head"] * 4
    assert content["rows"][0]["loss"] > 0
    assert "| fused-distill, N64 V500 Ds32 Dt48, beta 0.5 | " in printed


def test_scaling_varies_the_threads(tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    script("scaling.py", "threads", "--output", str(output))
    (run,) = json.loads(output.read_text())["runs"]
    assert {row["provider"] for row in run["rows"]} == {"floor", "fused-distill"}
    assert run["rows"][0]["sweep"] == "threads"
    assert run["rows"][0]["threads"] == 1
    assert not run["complete"]  # one sweep of four


def test_the_commit_of_a_result_is_the_newest_that_changed_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    commits: list[str] = []
    for name in (
        "python/loss.py",
        "bench/cpu.py",
        "bench/report.py",
        "docs/page.md",
        "bench/results/cpu.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "--quiet", "--message", name)
        commits.append(git(tmp_path, "rev-parse", "--short=12", "HEAD"))
    assert suite.commit() == commits[1]
    (tmp_path / "docs" / "page.md").write_text("changed")
    assert suite.commit() == commits[1]
    (tmp_path / "python" / "loss.py").write_text("changed")
    assert suite.commit() == f"{commits[1]}+"


def test_the_command_of_a_result_holds_no_path_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    output = suite.ROOT / "bench" / "results" / "cpu.json"
    monkeypatch.setattr(
        sys, "argv", [f"{suite.ROOT}/bench/cpu.py", "full", "--only", "N1|N2", f"--output={output}"]
    )
    assert suite.command() == "python bench/cpu.py full --only 'N1|N2' --output=bench/results/cpu.json"


def test_a_comparison_with_rows_that_failed_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "compare", lambda arguments: [{"error": "no memory"}])
    monkeypatch.setattr(compare, "table", lambda rows: "the table")
    monkeypatch.setattr("sys.argv", ["compare.py", "--base", "HEAD"])
    assert compare.main() == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("the table\n", "error: 1 of 1 rows could not be measured\n")


def test_a_worker_that_was_killed_can_be_closed() -> None:
    worker = Worker("naive")
    worker._child.kill()
    worker._child.wait()
    with pytest.raises(ProviderFailed, match="process ended with status -9"):
        worker.reset()
    worker.close()


def test_a_machine_without_git_measures_without_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert suite.commit() == ""
