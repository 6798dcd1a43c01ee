"""Tests of the trainer's settings: files, overrides, validation, help, and error messages that name a key."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import fused_distill
import pytest
import torch
from fused_distill.cli import main, parse_arguments
from fused_distill.trainer import loop
from fused_distill.trainer.loop import train
from fused_distill.trainer.start import choose_precision
from trainer_cases import NOT_INTERPRETED, Lab, load_config
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED

REQUIRED = ["student=s", "teacher.model=t", "data.path=d", "output=o", "steps=3"]


def settings(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with status 2, and return its one line of error."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith(f"fused-distill {arguments[0]}: ")]
    assert errors == lines[-1:]
    return errors[0]


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = settings(
        tmp_path, "beta: 0.25\nseed: 4\nteacher: {targets: topk, k: 7}\nlora:\nlearning_rate: 1e-4\n"
    )
    config = load_config(path, [*REQUIRED, "beta=0.75", "lora.r=3"])
    assert config.teacher is not None
    assert (config.beta, config.seed, config.teacher.k, config.temperature) == (0.75, 4, 7, 1.0)
    assert config.learning_rate == 1e-4
    assert config.lora is not None
    assert (config.lora.r, config.lora.alpha) == (3, 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps: Input should be greater than or equal to 1"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("beta=1.5", "beta: Input should be less than or equal to 1"),
        ("teacher.k=16", "teacher: k has no effect with targets full, got 16: set targets: topk, or k: 64"),
        ("teacher.tail=truncate", "teacher: tail has no effect with targets full, got truncate"),
        (
            "teacher={url: 'localhost:8'}",
            "teacher.url: must begin with http:// or https://, got 'localhost:8'",
        ),
        (
            "rollouts={engine: vllm_server, url: 'a:b@host:8'}",
            "rollouts.url: must begin with http:// or https://, got 'host:8'",
        ),
        ("steps.x=3", "steps: Input should be a valid integer"),
        ("teacher.url=http://x", "teacher: must have one of model, url and stored"),
        ("teacher={stored: s, targets: full}", "teacher: targets must be topk with stored, got full"),
        ("teacher={stored: s, targets: topk}", "lmbda must be 0 with teacher.stored"),
        ("schedule=wavy", "schedule: Input should be"),
        ("learning_rate=.inf", "learning_rate: Input should be a finite number"),
        ("learning_rate=.nan", "learning_rate: Input should be a finite number"),
        ("rollouts.temperature=.inf", "rollouts.temperature: Input should be a finite number"),
        ("weight_decay=.inf", "weight_decay: Input should be a finite number"),
        ("teacher.deadline_seconds=.inf", "teacher.deadline_seconds: Input should be a finite number"),
        ("teacher.targets=[", "teacher.targets: no YAML"),
        ("steps", "an override must be KEY=VALUE, got 'steps'"),
    ],
)
def test_an_invalid_setting_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^.+$") as error:
        load_config(settings(tmp_path), [*REQUIRED, override])
    assert message in str(error.value)


SERVER = "rollouts.engine=vllm_server", "rollouts.url=http://x"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollouts.url=http://x",), "rollouts: url must be set exactly with engine vllm_server"),
        (("rollouts.engine=vllm_server",), "rollouts: url must be set exactly with engine vllm_server"),
        (("rollouts.engine=sglang",), "rollouts.engine: Input should be 'transformers', 'vllm' or"),
        (("rollouts.engine_options={a: 1}",), "engine_options must not be set with engine transformers"),
        (("rollouts.engine=vllm", "rollouts.sync=nccl"), "rollouts: sync must be disk with engine vllm"),
        ((*SERVER, "rollouts.sync=nccl"), "rollouts: nccl_address must be set exactly with sync nccl"),
        (
            (*SERVER, "rollouts.sync=nccl", "rollouts.nccl_address=10.0.0.1"),
            "rollouts: nccl_port must be set exactly with sync nccl",
        ),
        ((*SERVER, "rollouts.nccl_port=29600"), "rollouts: nccl_port must be set exactly with sync nccl"),
    ],
)
def test_rollout_settings_that_do_not_fit_each_other_are_named(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^.+$") as error:
        load_config(settings(tmp_path), [*REQUIRED, *overrides])
    assert message in str(error.value)


def keys(model: type, prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():  # pyright: ignore[reportAttributeAccessIssue]
        names.append(prefix + name)
        for annotation in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if name == "teachers":  # which have the keys of teacher
                continue
            if hasattr(annotation, "model_fields"):
                names += keys(annotation, f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("command", ["train", "cache-teacher"])
def test_help_lists_every_key(capsys: pytest.CaptureFixture[str], lab: Lab, command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    listed = [line.split()[0].rstrip(":") for line in capsys.readouterr().out.splitlines() if line.strip()]
    expected = keys(type(lab.config(lab.data.parent / "help")))
    assert len(expected) > 40
    assert set(expected) <= set(listed)


def test_help_lists_the_choices_of_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for key, choices in (
        ("precision", "(auto | fp32 | bf16 | fp16)"),
        ("teacher.targets", "(full | topk | student_topk)"),
        ("trackers", "(tensorboard | trackio | wandb)"),
        ("schedule", "(constant_with_warmup | linear | cosine)"),
    ):
        assert lines[key].endswith(choices), lines[key]


def test_help_says_which_sections_are_absent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "\n  lora [null]: " in text
    assert "\n  token_weight [null]: " in text
    assert "\n  rollouts: " in text


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"fused-distill {fused_distill.__version__}\n")


def test_a_mapping_may_change_what_it_takes_from_another(tmp_path: Path) -> None:
    path = settings(tmp_path, "lora: &all {r: 3, alpha: 4}\nteacher: {load: {<<: *all, alpha: 5}}\n")
    config = load_config(path, REQUIRED)
    assert config.teacher is not None
    assert config.teacher.load == {"r": 3, "alpha": 5}


def test_a_mapping_may_take_from_two_others(tmp_path: Path) -> None:
    parts = "lora: &a {r: 3}\nrollouts: &b {batch_size: 4}\n"
    path = settings(tmp_path, parts + "teacher: {load: {<<: *a, <<: *b}}\n")
    config = load_config(path, REQUIRED)
    assert config.teacher is not None
    assert (config.teacher.load["r"], config.teacher.load["batch_size"]) == (3, 4)


def test_every_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["student=~/s", "data.path=~/d*.csv", "output=~/o", "teacher.model=~/m", "teacher.tokenizer=~/t"]
    config = load_config(settings(tmp_path), [*REQUIRED, *paths])
    assert config.teacher is not None
    found = [config.student, config.data.path, str(config.output), config.teacher.model]
    assert found == ["/home/me/s", "/home/me/d*.csv", "/home/me/o", "/home/me/m"]
    assert config.teacher.tokenizer == "/home/me/t"
    store = "teacher={stored: ~/store, targets: topk}"
    config = load_config(settings(tmp_path), [*REQUIRED, store, "student=google/gemma-3-270m", "lmbda=0"])
    assert config.teacher is not None
    assert config.teacher.stored == Path("/home/me/store")
    assert config.student == "google/gemma-3-270m"
    unknown = load_config(settings(tmp_path), [*REQUIRED, "output=~nosuchuser/o"])
    assert str(unknown.output) == "~nosuchuser/o"
    options = parse_arguments(["cache-teacher", "run.yaml", "--output=~/store"])
    assert options.output == Path("/home/me/store")


@pytest.mark.parametrize("pattern", ["*.csv", "*", "**/chats-*.jsonl"])
def test_an_override_may_be_a_pattern_that_begins_with_a_star(tmp_path: Path, pattern: str) -> None:
    assert load_config(settings(tmp_path), [*REQUIRED, f"data.path={pattern}"]).data.path == pattern


def test_a_setting_with_dashes_is_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "run.yaml", "--steps=3"])
    assert end.value.code == 2
    assert (
        "unrecognized arguments: --steps=3; settings have no dashes, e.g. steps=3" in capsys.readouterr().err
    )


def test_the_gradient_norm_may_be_unlimited(tmp_path: Path) -> None:
    assert load_config(settings(tmp_path), [*REQUIRED, "max_grad_norm=.inf"]).max_grad_norm == math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML"),
        ("- a", "must hold keys and values"),
        ("student: s", "data: Field required"),
        ("steps: 3\nbeta: 1\nsteps: 4", "settings.yaml: steps is given twice, again in line 3"),
        ("teacher: {k: 3, k: 4}", "settings.yaml: k is given twice, again in line 1"),
    ],
)
def test_an_invalid_file_exits_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert message in error_line(capsys, "train", str(settings(tmp_path, text)))


def test_a_missing_file_exits_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none.yaml" in error_line(capsys, "train", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student=/nowhere", "student: /nowhere cannot be loaded"),
        ("teacher.model=/nowhere", "teacher.model: /nowhere cannot be loaded"),
        ("data.path=/nowhere.jsonl", "data.path: there is no file /nowhere.jsonl"),
        ("gradient_accumulation_steps=3", "prompts_per_step: 8 must be a multiple of 3"),
        (
            "prompts_per_step=80",
            "prompts_per_step: 80 is too many: 40 samples are left for training",
        ),
        ("teacher={model: TEACHER, targets: topk, k: 99}", "teacher.k: 99 is more than the 98 tokens"),
        ("precision=fp16", "precision: fp16 needs a GPU, but this run is on a CPU"),
        ("lora={target_modules: [nothing]}", "lora.target_modules: "),
        ("trackers=[trackio]", "trackers: trackio needs trackio beside the trainer: pip install trackio"),
        ("rollouts.engine=vllm", "rollouts.engine: vllm needs vllm beside the trainer: pip install vllm"),
    ],
)
def test_settings_that_do_not_fit_the_files_exit_with_status_2_and_one_line(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    lab.config(tmp_path)
    paths = [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    line = error_line(
        capsys,
        "train",
        str(tmp_path / "settings.yaml"),
        f"output={tmp_path}",
        *paths,
        override.replace("TEACHER", str(lab.teacher)),
    )
    assert message in line


@pytest.mark.parametrize("key", ["student", "teacher.model"])
def test_truncated_weights_are_named_with_key_and_file_before_anything_is_loaded(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    lab.config(tmp_path)
    weights = shutil.copytree(lab.student, tmp_path / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(loop, "load_data", None)
    paths = [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    arguments = [f"output={tmp_path}", *paths, f"{key}={weights.parent}"]
    line = error_line(capsys, "train", str(tmp_path / "settings.yaml"), *arguments)
    assert f"{key}: {weights} is not a whole safetensors file" in line


def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.config(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loop, "Trainer", None)
    paths = [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    arguments = [f"output={tmp_path}/file/run", *paths]
    line = error_line(capsys, "train", str(tmp_path / "settings.yaml"), *arguments)
    assert line.endswith(f"output: {tmp_path}/file/run cannot be written: Not a directory")


def test_an_unreachable_server_exits_with_status_2_and_one_line(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.config(tmp_path)
    paths = [f"student={lab.student}", f"data.path={lab.data}", "teacher.url=http://127.0.0.1:9"]
    paths.append("teacher.deadline_seconds=0.1")
    line = error_line(capsys, "train", str(tmp_path / "settings.yaml"), f"output={tmp_path}", *paths)
    assert "train: teacher.url: no usable answer" in line


def test_an_output_with_checkpoints_needs_resume(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.config(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    paths = [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    line = error_line(capsys, "train", str(tmp_path / "settings.yaml"), f"output={tmp_path}", *paths)
    assert f"output: {tmp_path} holds checkpoints" in line


@pytest.mark.parametrize(
    ("device", "supported", "precision"),
    [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32"), ("mps", True, "fp32")],
)
def test_automatic_precision_is_bf16_on_cuda_devices_that_support_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, supported: bool, precision: str
) -> None:
    def is_bf16_supported(including_emulation: bool) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    config = lab.config(tmp_path)
    assert config.precision == "auto"
    assert choose_precision(config, torch.device(device)).precision == precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_given_precision_is_kept(lab: Lab, tmp_path: Path, precision: str) -> None:
    config = lab.config(tmp_path, f"precision={precision}")
    assert choose_precision(config, torch.device("cuda")) is config


def test_a_run_on_the_cpu_uses_and_records_fp32(lab: Lab, tmp_path: Path) -> None:
    train(lab.config(tmp_path, "steps=1"))
    [settings] = tmp_path.glob("checkpoints/*/settings.json")
    assert '"precision": "fp32"' in settings.read_text()
