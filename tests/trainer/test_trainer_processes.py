"""Two processes, with DDP and with FSDP2 on the CPU, are as good as one."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fused_distill.trainer.checkpoint import checkpoints
from fused_distill.trainer.config import ConfigError, TrainConfig
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.stored import store_teacher
from launching import LAUNCHED, launched, said
from trainer_cases import ABOUT_THE_TRAINER, Lab, losses, metrics, save_model, transformers, weights
from trainer_cases import lab as lab

pytestmark = ABOUT_THE_TRAINER

WAYS = tuple(LAUNCHED)
SHARED = ("data.evaluation_prompts=6", "evaluate_every=2", "save_every=2")
# Of data that are the same however they are shared out, then of completions of the student's own.
RUNS = {
    "whole": ("lmbda=0",),
    "split": ("lmbda=0", "gradient_accumulation_steps=2"),
    "adapters": ("lmbda=0", "lora.r=2", "gradient_accumulation_steps=2"),
    "untied": ("lmbda=0", "student=UNTIED", "teacher.targets=student_topk", "teacher.k=5"),
    "on_policy": ("gradient_accumulation_steps=2", "rollouts.num_generations=2"),
    "on_policy_adapters": ("lora.r=2",),
}


def two_processes(how: str, *configs: TrainConfig) -> subprocess.Popen[str]:
    files = []
    for config in configs:
        files.append(str(config.output / "run.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    return launched(how, str(Path(__file__).parents[1] / "helpers/trainer_worker.py"), how, *files)


@pytest.fixture(scope="module")
def runs(lab: Lab, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of RUNS in folders "one", "ddp" and "fsdp2"."""
    folder = tmp_path_factory.mktemp("runs")
    untied = save_model(folder / "untied", tiny_model, tie_word_embeddings=False)

    def configs(how: str, names: list[str]) -> list[TrainConfig]:
        return [
            lab.config(folder / how / name, *SHARED, *(o.replace("UNTIED", str(untied)) for o in RUNS[name]))
            for name in names
        ]

    for config in configs("one", [name for name in RUNS if "on_policy" not in name]):
        train(config)
    for how in WAYS:
        process = two_processes(how, *configs(how, [*RUNS]))
        end = said(process)
        assert process.returncode == 0, end
    return folder


@pytest.mark.parametrize("name", ["whole", "split", "adapters", "untied"])
@pytest.mark.parametrize("how", WAYS)
def test_two_processes_do_the_steps_of_one(runs: Path, how: str, name: str) -> None:
    one, two = runs / "one" / name, runs / how / name
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for quantity in ("forward_kl", "student_entropy", "tokens", "grad_norm", "completion_length"):
        want = [row[quantity] for row in metrics(one)]
        assert [row[quantity] for row in metrics(two)] == pytest.approx(want, rel=1e-3), quantity


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["whole", "split", "untied"])
def test_two_processes_get_the_student_of_one(runs: Path, how: str, name: str) -> None:
    want, got = (weights(runs / who / name / "student") for who in ("one", how))
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-3)
    transformers.AutoModelForCausalLM.from_pretrained(runs / how / name / "student")


def test_however_many_slices_processes_and_shards_the_first_step_is_the_same(runs: Path) -> None:
    first = [
        losses(runs / who / name)[0] for who in ("one", *WAYS) for name in ("whole", "split", "adapters")
    ]
    assert first == pytest.approx([first[0]] * 9, rel=1e-5)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["on_policy", "on_policy_adapters"])
def test_two_processes_write_learn_and_evaluate(runs: Path, how: str, name: str) -> None:
    rows = metrics(runs / how / name)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] > 0 for row in rows)
    assert [row["step"] for row in metrics(runs / how / name, "evaluation")] == [0, 2, 3]


def test_shards_write_what_whole_models_write(runs: Path) -> None:
    """The first step's completions: those of later ones are of students that differ by rounding."""
    for name in ("on_policy", "on_policy_adapters"):
        ddp, fsdp2 = (metrics(runs / how / name)[0] for how in WAYS)
        assert fsdp2["tokens"] == ddp["tokens"]
        assert fsdp2["loss"] == pytest.approx(ddp["loss"], rel=1e-5)


def test_sigterm_to_two_processes_saves_and_they_go_on_bit_for_bit(
    lab: Lab, runs: Path, tmp_path: Path
) -> None:
    config = lab.config(tmp_path, *SHARED, *RUNS["on_policy"])
    process = two_processes("fsdp2", config)
    while not (tmp_path / "metrics.jsonl").exists() or not metrics(tmp_path):
        assert process.poll() is None, said(process)
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said(process)
    last = metrics(tmp_path)[-1]["step"]
    assert 0 < last < 3
    assert checkpoints(tmp_path)[-1].name == f"step-{last:08}"
    process = two_processes("fsdp2", config)
    end = said(process)
    assert process.returncode == 0, end
    assert losses(tmp_path) == losses(runs / "fsdp2" / "on_policy")


def test_two_processes_share_the_writing_of_a_store(lab: Lab, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in lab.data.read_text().splitlines()]
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({**row, "prompt": f"{row['prompt']}{i}"}) + "\n" for i in range(7) for row in rows)
    )
    config = lab.config(tmp_path, f"data.path={data}", "teacher.targets=topk", "teacher.k=5", "lmbda=0")
    store_teacher(config, tmp_path / "one", "float32")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    process = launched(
        "ddp", "-m", "fused_distill.cli", "cache-teacher", f"{tmp_path}/run.yaml", f"--output={tmp_path}/two"
    )
    end = said(process)
    assert process.returncode == 0, end
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert sorted(one) == ["part-000000.parquet", "part-000001.parquet", "teacher.json"]
    assert one == two


def test_processes_must_get_equal_shares(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 3))
    for complaint, *overrides in (
        ("prompts_per_step: 8 must be a multiple of 3",),
        (
            "data.evaluation_prompts: 4 must be a multiple of 3",
            "prompts_per_step=9",
            "data.evaluation_prompts=4",
        ),
    ):
        with pytest.raises(ConfigError, match=complaint):
            Trainer(lab.config(tmp_path, *overrides))


def test_fsdp1_is_refused(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    fsdp: Any = property(lambda _: DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "distributed_type", fsdp)
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda _: False))
    with pytest.raises(ConfigError, match="fsdp_version: must be 2"):
        Trainer(lab.config(tmp_path))
