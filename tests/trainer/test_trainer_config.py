"""The trainer's settings: read, overridden, checked, and every complaint is one line that names its key."""

from __future__ import annotations

from pathlib import Path

import pytest
from fused_distill.cli import main
from trainer_cases import ABOUT_THE_TRAINER, Lab, load_config
from trainer_cases import lab as lab

pytestmark = ABOUT_THE_TRAINER

LEAST = ["student=s", "teacher.model=t", "data.path=d", "output=o", "steps=3"]


def settings(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on which the command ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    complaints = [line for line in lines if line.startswith(f"fused-distill {arguments[0]}: ")]
    assert complaints == lines[-1:]
    return complaints[0]


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = settings(tmp_path, "beta: 0.25\nseed: 4\nteacher: {k: 7}\nlora:\nlearning_rate: 1e-4\n")
    config = load_config(path, [*LEAST, "beta=0.75", "lora.r=3"])
    assert (config.beta, config.seed, config.teacher.k, config.temperature) == (0.75, 4, 7, 1.0)
    assert config.learning_rate == 1e-4
    assert config.lora is not None
    assert (config.lora.r, config.lora.alpha) == (3, 32)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("steps=0", "steps: Input should be greater than or equal to 1"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("beta=1.5", "beta: Input should be less than or equal to 1"),
        ("stepz=3", "stepz: Extra inputs are not permitted"),
        ("teacher.kk=3", "teacher.kk: Extra inputs are not permitted"),
        ("steps.x=3", "steps.x: steps has no keys of its own"),
        ("teacher.url=http://x", "teacher: must have one of model, url and stored"),
        ("teacher={stored: s, targets: full}", "teacher: targets must be topk with stored, got full"),
        ("teacher={stored: s, targets: topk}", "lmbda must be 0 with teacher.stored"),
        ("schedule=wavy", "schedule: Input should be"),
        ("teacher.targets=[", "teacher.targets: no YAML"),
        ("steps", "an override must be KEY=VALUE, got 'steps'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^.+$") as error:
        load_config(settings(tmp_path), [*LEAST, override])
    assert complaint in str(error.value)


def test_adapters_and_a_rollout_server_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora must not be given with rollouts\.url"):
        load_config(settings(tmp_path), [*LEAST, "lora.r=2", "rollouts.url=http://x"])


def keys(model: type, prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():  # pyright: ignore[reportAttributeAccessIssue]
        found.append(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                found += keys(kind, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("command", ["train", "cache-teacher"])
def test_help_lists_every_key(capsys: pytest.CaptureFixture[str], lab: Lab, command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    listed = [line.split()[0].rstrip(":") for line in capsys.readouterr().out.splitlines() if line.strip()]
    wanted = keys(type(lab.config(lab.data.parent / "help")))
    assert len(wanted) > 40
    assert set(wanted) <= set(listed)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a: [", "no YAML"), ("- a", "must hold keys and values"), ("student: s", "teacher: Field required")],
)
def test_a_wrong_file_is_a_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    assert complaint in refused(capsys, "train", str(settings(tmp_path, text)))


def test_a_missing_file_is_a_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml" in refused(capsys, "train", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("student=/nowhere", "student: /nowhere cannot be loaded"),
        ("teacher.model=/nowhere", "teacher.model: /nowhere cannot be loaded"),
        ("data.path=/nowhere.jsonl", "data.path: /nowhere.jsonl cannot be read"),
        ("gradient_accumulation_steps=3", "prompts_per_step: 8 must be a multiple of 3"),
        (
            "prompts_per_step=80",
            "prompts_per_step: 80 is more than the 40 prompts left for training of 40 rows",
        ),
        ("teacher={model: TEACHER, targets: topk, k: 99}", "teacher.k: 99 is more than the 98 tokens"),
        ("lora={target_modules: [nothing]}", "lora.target_modules: "),
        ("lora={target_modules: [lm_head]}", "lora.target_modules: must not hold the output layer"),
        ("trackers=[trackio]", "trackers: trackio is not installed"),
    ],
)
def test_what_does_not_fit_the_files_is_a_line_and_status_2(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, complaint: str
) -> None:
    lab.config(tmp_path)
    own = [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    line = refused(
        capsys,
        "train",
        str(tmp_path / "settings.yaml"),
        f"output={tmp_path}",
        *own,
        override.replace("TEACHER", str(lab.teacher)),
    )
    assert complaint in line


def test_a_server_that_is_not_there_is_a_line_and_status_2(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_distill.serving.client.retry.time.sleep", lambda _: None)
    lab.config(tmp_path)
    own = [f"student={lab.student}", f"data.path={lab.data}", "teacher.url=http://127.0.0.1:9"]
    line = refused(capsys, "train", str(tmp_path / "settings.yaml"), f"output={tmp_path}", *own)
    assert "no usable answer" in line


def test_an_output_with_checkpoints_is_not_begun_anew(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.config(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    own = [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    line = refused(capsys, "train", str(tmp_path / "settings.yaml"), f"output={tmp_path}", *own)
    assert f"output: {tmp_path} holds checkpoints" in line
