"""Tests of the trainer in two processes, with DDP and with FSDP2 on the CPU."""

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
from fused_distill.trainer.cache_teacher import store_teacher
from fused_distill.trainer.checkpoint import list_checkpoints
from fused_distill.trainer.config import ConfigError, TrainConfig
from fused_distill.trainer.loop import Trainer, train
from launching import STRATEGIES, launch, wait_for_output
from trainer_cases import NOT_INTERPRETED, Lab, losses, metrics, save_model, transformers, weights
from trainer_cases import lab as lab
from trainer_cases import prompts as prompts

pytestmark = [NOT_INTERPRETED, pytest.mark.xdist_group("trainer processes")]  # trained once

SHARED = ("data.evaluation_prompts=6", "evaluate_every=2", "save_every=2")
HEAD_ADAPTERS = "lora={r: 2, target_modules: [q_proj, down_proj, lm_head], merge: true}"
# First off-policy runs, whose samples do not depend on the number of processes, then on-policy runs.
RUNS = {
    "one_slice": ("lmbda=0",),
    "two_slices": ("lmbda=0", "gradient_accumulation_steps=2"),
    "long": ("lmbda=0", "tokens_per_forward=24", "gradient_checkpointing=true"),
    "adapters": ("lmbda=0", HEAD_ADAPTERS, "gradient_accumulation_steps=2"),
    "untied": ("lmbda=0", "student=UNTIED", "teacher.targets=student_topk", "teacher.k=5"),
    "self": ("lmbda=0", "data.path=PROMPTS", "teacher={model: self}"),
    "moving_average": ("lmbda=0", "data.path=PROMPTS", "teacher={model: self, ema: 0.75}"),
    "on_policy": ("gradient_accumulation_steps=2", "rollouts.num_generations=2"),
    "on_policy_adapters": ("lora.r=2",),
}
# FSDP refuses a moving average, whose teacher it would shard.
RUNS_OF = {"ddp": [*RUNS], "fsdp2": [name for name in RUNS if name != "moving_average"]}
OFF_POLICY = [(strategy, n) for strategy in STRATEGIES for n in RUNS_OF[strategy] if "on_policy" not in n]


def start_two(strategy: str, *configs: TrainConfig) -> subprocess.Popen[str]:
    files = []
    for config in configs:
        files.append(str(config.output / "run.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    worker = Path(__file__).parents[1] / "helpers/trainer_worker.py"
    return launch(strategy, str(worker), strategy, *files)


@pytest.fixture(scope="module")
def runs(lab: Lab, prompts: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each of RUNS in folders "one" (process), "ddp" and "fsdp2"."""
    folder = tmp_path_factory.mktemp("runs")
    untied = save_model(folder / "untied", tiny_model, tie_word_embeddings=False)

    def configs(strategy: str, names: list[str]) -> list[TrainConfig]:
        def overrides(name: str) -> list[str]:
            return [o.replace("UNTIED", str(untied)).replace("PROMPTS", str(prompts)) for o in RUNS[name]]

        return [lab.config(folder / strategy / name, *SHARED, *overrides(name)) for name in names]

    for config in configs("one", [name for name in RUNS if "on_policy" not in name]):
        train(config)
    for strategy in STRATEGIES:
        process = start_two(strategy, *configs(strategy, RUNS_OF[strategy]))
        output = wait_for_output(process)
        assert process.returncode == 0, output
    return folder


@pytest.mark.parametrize(("strategy", "name"), OFF_POLICY)
def test_two_processes_log_the_metrics_of_one(runs: Path, strategy: str, name: str) -> None:
    one, two = runs / "one" / name, runs / strategy / name
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    statistics = ["forward_kl", "student_entropy"]
    if "teacher.targets=student_topk" in RUNS[name]:
        statistics = [*(f"topk_{quantity}" for quantity in statistics), "student_mass", "teacher_mass"]
    for quantity in (*statistics, "tokens", "grad_norm", "completion_length"):
        want = [row[quantity] for row in metrics(one)]
        assert [row[quantity] for row in metrics(two)] == pytest.approx(want, rel=1e-3), quantity


@pytest.mark.parametrize(("strategy", "name"), OFF_POLICY)
def test_two_processes_save_the_student_of_one(runs: Path, strategy: str, name: str) -> None:
    want, got = (weights(runs / run / name / "student") for run in ("one", strategy))
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-3)
    transformers.AutoModelForCausalLM.from_pretrained(runs / strategy / name / "student")


def test_the_first_loss_does_not_depend_on_slices_processes_and_shards(runs: Path) -> None:
    first = [
        losses(runs / run / name)[0]
        for run in ("one", *STRATEGIES)
        for name in ("one_slice", "two_slices", "long", "adapters")
    ]
    assert first == pytest.approx([first[0]] * 12, rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["on_policy", "on_policy_adapters"])
def test_two_processes_generate_train_and_evaluate(runs: Path, strategy: str, name: str) -> None:
    rows = metrics(runs / strategy / name)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] > 0 for row in rows)
    assert [row["step"] for row in metrics(runs / strategy / name, "evaluation")] == [0, 2, 3]


def test_sharded_models_generate_what_unsharded_models_generate(runs: Path) -> None:
    """Compares the first step only: later ones are of students that differ by rounding."""
    for name in ("on_policy", "on_policy_adapters"):
        ddp, fsdp2 = (metrics(runs / strategy / name)[0] for strategy in STRATEGIES)
        assert fsdp2["tokens"] == ddp["tokens"]
        assert fsdp2["loss"] == pytest.approx(ddp["loss"], rel=1e-5)


def test_two_processes_save_on_sigterm_and_resume_bit_for_bit(lab: Lab, runs: Path, tmp_path: Path) -> None:
    config = lab.config(tmp_path, *SHARED, *RUNS["on_policy"])
    process = start_two("fsdp2", config)
    while not (tmp_path / "metrics.jsonl").exists() or not metrics(tmp_path):
        assert process.poll() is None, wait_for_output(process)
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    wait_for_output(process)
    last = metrics(tmp_path)[-1]["step"]
    assert 0 < last < 3
    assert list_checkpoints(tmp_path)[-1].name == f"step-{last:08}"
    process = start_two("fsdp2", config)
    output = wait_for_output(process)
    assert process.returncode == 0, output
    assert losses(tmp_path) == losses(runs / "fsdp2" / "on_policy")


def test_two_processes_write_the_store_of_one(lab: Lab, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in lab.data.read_text().splitlines()]
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({**row, "prompt": f"{row['prompt']}{i}"}) + "\n" for i in range(7) for row in rows)
    )
    config = lab.config(tmp_path, f"data.path={data}", "teacher.targets=topk", "teacher.k=5", "lmbda=0")
    store_teacher(config, tmp_path / "one", "float32")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    process = launch(
        "ddp", "-m", "fused_distill.cli", "cache-teacher", f"{tmp_path}/run.yaml", f"--output={tmp_path}/two"
    )
    output = wait_for_output(process)
    assert process.returncode == 0, output
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert sorted(one) == ["part-000000.parquet", "part-000001.parquet", "teacher.json"]
    assert one == two


def test_unequal_shares_of_prompts_are_refused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 3))
    for message, *overrides in (
        ("prompts_per_step: 8 must be a multiple of 3",),
        (
            "data.evaluation_prompts: 4 must be a multiple of 3",
            "prompts_per_step=9",
            "data.evaluation_prompts=4",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(lab.config(tmp_path, *overrides))


def test_fsdp1_is_refused(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    fsdp: Any = property(lambda _: DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "distributed_type", fsdp)
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda _: False))
    with pytest.raises(ConfigError, match="fsdp_version: must be 2"):
        Trainer(lab.config(tmp_path))
