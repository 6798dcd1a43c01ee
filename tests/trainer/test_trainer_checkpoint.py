"""Tests of checkpoints: a run that was interrupted in any way resumes bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forking import forking
from fused_distill.cli import main
from fused_distill.trainer import rollouts as trainer_rollouts
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.checkpoint import list_checkpoints
from fused_distill.trainer.config import ConfigError, TrainConfig
from fused_distill.trainer.loop import Trainer, train
from trainer_cases import NOT_INTERPRETED, FakeServer, Lab, metrics, save_model, write_rows
from trainer_cases import lab as lab

pytestmark = [NOT_INTERPRETED, pytest.mark.xdist_group("forks")]

KILLS = int(os.environ.get("FUSED_DISTILL_KILLS", "20"))
SECONDS = ("rollout_seconds", "teacher_seconds", "update_seconds", "evaluation_seconds")
TIMES = ("tokens_per_second", "memory_gib", *SECONDS)
SETTINGS = (
    "steps=8",
    "save_every=2",
    "lmbda=0.5",
    "gradient_accumulation_steps=2",
    "rollouts.num_generations=2",
    "data.evaluation_prompts=4",
    "evaluate_every=3",
    "schedule=cosine",
    "warmup_steps=2",
)


def start(config: TrainConfig, file_limit: int = resource.RLIM_INFINITY) -> BaseProcess:
    """Start a run with --resume in a new process, which has imported everything already."""
    process = forking().Process(target=train_quietly, args=(config, file_limit))
    process.start()
    return process


AHEAD = (
    "rollouts.engine=vllm_server",
    "rollouts.url=http://x",
    "rollouts.ahead=1",
    "rollouts.importance_clip=2",
)


def train_quietly(config: TrainConfig, file_limit: int) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    trainer_rollouts.VllmRollouts = FakeServer  # pyright: ignore[reportAttributeAccessIssue]
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    train(config, resume=True)


def outcome(output: Path) -> tuple[list[dict[str, object]], bytes]:
    """Return all metrics but times, and the bytes of the weights."""
    rows = metrics(output) + metrics(output, "evaluation")
    kept = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return kept, (output / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["", "ahead", "stored"])
def settings(
    request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """Return settings: plain, ahead with two teachers of which one follows the student, or with a store."""
    folder = tmp_path_factory.mktemp("settings")
    if request.param == "ahead":
        rows = [json.loads(line) for line in lab.data.read_text().splitlines()]
        named = [row | {"teacher": ("math", "code")[i % 2]} for i, row in enumerate(rows)]
        teachers = f"teachers={{math: {{model: {lab.teacher}}}, code: {{model: self, ema: 0.5}}}}"
        data = write_rows(folder / "data.jsonl", named)
        return (*SETTINGS, *AHEAD, "teacher=null", teachers, f"data.path={data}")
    if request.param == "stored":
        topk = (*SETTINGS, "lmbda=0", "teacher.targets=topk", "teacher.k=5")
        store_teacher(lab.config(folder, *topk), folder / "store", "float32")
        return (*topk, "teacher.model=null", f"teacher.stored={folder}/store")
    return SETTINGS


@pytest.fixture(scope="module")
def uninterrupted_of_any(
    lab: Lab, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    return run_to_the_end(lab, settings, tmp_path_factory)


@pytest.fixture(scope="module")
def uninterrupted(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    return run_to_the_end(lab, SETTINGS, tmp_path_factory)


def run_to_the_end(
    lab: Lab, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """Return the output of a run without interruption, and its seconds."""
    output = tmp_path_factory.mktemp("uninterrupted")
    start(lab.config(tmp_path_factory.mktemp("first"), "steps=1")).join()  # imports
    started = time.monotonic()
    process = start(lab.config(output, *settings))
    process.join()
    assert process.exitcode == 0
    return output, time.monotonic() - started


def test_a_run_killed_at_random_moments_resumes_bit_for_bit(
    lab: Lab, settings: tuple[str, ...], uninterrupted_of_any: tuple[Path, float], tmp_path: Path
) -> None:
    """Kills KILLS times; a run that ends before it is killed is followed by a new one."""
    draw = random.Random(KILLS)
    kills = runs = 0
    config = lab.config(tmp_path / "0", *settings)
    while True:
        process = start(config)
        process.join(draw.uniform(0, uninterrupted_of_any[1]) if kills < KILLS else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0
        assert outcome(config.output) == outcome(uninterrupted_of_any[0])
        if kills == KILLS:
            break
        runs += 1
        config = lab.config(tmp_path / f"{runs}", *settings)


@pytest.mark.parametrize("place", ["checkpoint", "rename", "metrics"])
def test_a_run_killed_at_the_worst_moment_resumes_bit_for_bit(
    lab: Lab, uninterrupted: tuple[Path, float], tmp_path: Path, place: str
) -> None:
    config = lab.config(tmp_path, *SETTINGS)
    process = forking().Process(target=killed_at, args=(config, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = start(config)
    process.join()
    assert outcome(tmp_path) == outcome(uninterrupted[0])


def killed_at(config: TrainConfig, place: str) -> None:
    """Train, and be killed after half a checkpoint, between its rename and pruning, or after half a line."""
    from accelerate import Accelerator
    from fused_distill.trainer.logger import MetricsLogger

    save_state, log, replace = Accelerator.save_state, MetricsLogger.log, Path.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half_saved(self: Accelerator, folder: str) -> None:
        save_state(self, folder)
        if len(list_checkpoints(config.output)) == 1:
            model = Path(folder) / "model.safetensors"
            model.write_bytes(model.read_bytes()[:1000])
            die()

    def half_written(self: MetricsLogger, step: int, *rest: object) -> None:
        if step == 5:
            with self.path.open("a") as file:
                file.write('{"step": 5, "kind": "tr')
            die()
        log(self, step, *rest)  # pyright: ignore[reportArgumentType]

    def renamed(self: Path, target: Path) -> Path:
        renamed_path = replace(self, target)
        if target.name == "step-00000004":
            die()
        return renamed_path

    if place == "checkpoint":
        Accelerator.save_state = half_saved  # pyright: ignore[reportAttributeAccessIssue]
    elif place == "metrics":
        MetricsLogger.log = half_written  # pyright: ignore[reportAttributeAccessIssue]
    else:
        Path.replace = renamed  # pyright: ignore[reportAttributeAccessIssue]
    train_quietly(config, resource.RLIM_INFINITY)


def stopped(config: TrainConfig, number: int) -> None:
    """Train, and get a signal after the first steps."""
    from fused_distill.trainer.logger import MetricsLogger

    log = MetricsLogger.log

    def logged(self: MetricsLogger, step: int, *rest: object) -> None:
        log(self, step, *rest)  # pyright: ignore[reportArgumentType]
        if step == 4:  # is logged once, as it is not evaluated
            os.kill(os.getpid(), number)

    MetricsLogger.log = logged  # pyright: ignore[reportAttributeAccessIssue]
    train_quietly(config, resource.RLIM_INFINITY)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_a_checkpoint_that_resumes_bit_for_bit(
    lab: Lab, uninterrupted: tuple[Path, float], tmp_path: Path, number: int, status: int
) -> None:
    config = lab.config(tmp_path, *SETTINGS)
    process = forking().Process(target=stopped, args=(config, number))
    process.start()
    process.join()
    assert process.exitcode == status
    steps = metrics(tmp_path)[-1]["step"]
    assert 4 <= steps < 8
    assert list_checkpoints(tmp_path)[-1].name == f"step-{steps:08}"
    assert (tmp_path / "report.html").exists()
    process = start(config)
    process.join()
    assert outcome(tmp_path) == outcome(uninterrupted[0])


def test_a_full_disk_keeps_earlier_checkpoints(
    lab: Lab, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    config = lab.config(tmp_path, *SETTINGS)
    process = forking().Process(target=killed_at, args=(config, "rename"))
    process.start()
    process.join()
    kept = {p: p.read_bytes() for folder in list_checkpoints(tmp_path) for p in folder.iterdir()}
    largest = max(map(len, kept.values()))
    process = start(config, largest - 1)
    process.join()
    assert process.exitcode == 1
    assert not (tmp_path / "checkpoints" / "unfinished").exists()
    assert {p: p.read_bytes() for folder in list_checkpoints(tmp_path) for p in folder.iterdir()} == kept
    process = start(config)
    process.join()
    assert outcome(tmp_path) == outcome(uninterrupted[0])


def test_old_checkpoints_are_pruned(lab: Lab, uninterrupted: tuple[Path, float]) -> None:
    folder = uninterrupted[0] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000006", "step-00000008"]


def test_the_command_resumes_for_more_steps(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(lab.config(tmp_path / "at_once", "steps=3"))
    train(lab.config(tmp_path / "parts", "steps=2"))
    paths = [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    output = tmp_path / "parts"
    main(["train", str(output / "settings.yaml"), "--resume", "steps=3", f"output={output}", *paths])
    assert capsys.readouterr().out.splitlines()[-1] == str(output / "student")
    assert outcome(output) == outcome(tmp_path / "at_once")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_longer_run_takes_the_rates_of_its_length_from_the_first_step(
    lab: Lab, tmp_path: Path, schedule: str
) -> None:
    def rates(output: Path) -> list[float]:
        return [row["learning_rate"] for row in metrics(output)]

    settings = (f"schedule={schedule}", "warmup_steps=1")
    train(lab.config(tmp_path / "at_once", "steps=4", *settings))
    train(lab.config(tmp_path / "parts", "steps=2", *settings))
    train(lab.config(tmp_path / "parts", "steps=4", *settings), resume=True)
    assert rates(tmp_path / "parts")[2:] == rates(tmp_path / "at_once")[2:]


def test_resume_with_changed_settings_names_them(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "steps=1"))
    changed = lab.config(tmp_path, "steps=2", "beta=0.25", "rollouts.top_p=0.5")
    with pytest.raises(ConfigError, match=r"^rollouts\.top_p: was 1\.0 before, is 0\.5; beta: was 0\.5"):
        train(changed, resume=True)


def test_resume_with_other_data_or_another_teacher_names_them(
    lab: Lab, tmp_path: Path, tiny_model: Path
) -> None:
    train(lab.config(tmp_path, "steps=1"))
    data = tmp_path / "data.jsonl"
    data.write_text(lab.data.read_text().replace("a", "b"))
    other = save_model(tmp_path / "other", tiny_model, hidden_size=32, vocab_size=104)
    for override, message in (
        (f"data.path={data}", "^data: other prompts or completions than before"),
        (f"teacher.model={other}", "^teacher: other weights than before"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(lab.config(tmp_path, "steps=2", override), resume=True)


@pytest.mark.parametrize("broken", ["model.safetensors", "optimizer.bin", "settings.json"])
def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_resumed(
    lab: Lab,
    uninterrupted: tuple[Path, float],
    tmp_path: Path,
    broken: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(shutil.copytree(uninterrupted[0], tmp_path / "run"))
    newest = output / "checkpoints" / "step-00000008"
    content = (newest / broken).read_bytes()
    (newest / broken).write_bytes(content[: len(content) // 2])
    train(lab.config(output, *SETTINGS), resume=True)
    [line] = [line for line in capsys.readouterr().err.splitlines() if str(newest) in line]
    assert line.startswith(f"{newest} cannot be read: ")
    assert outcome(output) == outcome(uninterrupted[0])
    names = sorted(path.name for path in newest.parent.iterdir())
    assert names == ["broken-step-00000008", "step-00000006", "step-00000008"]


def test_no_checkpoint_that_can_be_read_is_one_line(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "steps=1"))
    (tmp_path / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^output: no checkpoint can be read: .*step-00000001$"):
        train(lab.config(tmp_path, "steps=2"), resume=True)
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_second_interrupt_ends_a_run_at_once(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(run: Trainer, buffer: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(KeyboardInterrupt):
        train(lab.config(tmp_path))
    assert not list_checkpoints(tmp_path)


def test_a_run_says_where_it_resumes(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, message in (
        (1, f"\n{tmp_path} has no checkpoint: starting at step 0 of 1\n"),
        (2, f"\nresuming {tmp_path} at step 1 of 2\n"),
        (2, f"\nresuming {tmp_path} at step 2 of 2, nothing is left to do\n"),
    ):
        train(lab.config(tmp_path, f"steps={steps}"), resume=True)
        assert message in capsys.readouterr().out


def test_a_full_disk_at_the_last_save_keeps_the_student_before(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(lab.config(tmp_path, "steps=1"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(Trainer(lab.config(tmp_path)).tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        train(lab.config(tmp_path, "steps=2"), resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()} == before


def test_the_sigterm_handler_is_restored_after_an_error(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "update", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        train(lab.config(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
