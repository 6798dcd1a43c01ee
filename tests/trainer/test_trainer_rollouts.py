"""Tests of rollouts by vLLM: engines are built by the settings and have the student's weights."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fused_distill.huggingface.adapters import merged_weights
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.transformers import TransformersRollouts
from fused_distill.rollouts.weights import TokenLogprobs, WeightsError, model_logprobs
from fused_distill.trainer.checkpoint import list_checkpoints
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.rollouts import fallback_ends
from trainer_cases import NOT_INTERPRETED, Lab, losses, metrics, save_model, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


class FakeEngine:
    """Stands for VllmRollouts: generates with the weights that it received."""

    syncs_at_generate: list[int]  # the number of syncs before each call of generate
    arguments: list[Any]
    expected: TokenLogprobs

    def __init__(self, *arguments: Any, **options: Any):
        self.syncs = 0
        FakeEngine.syncs_at_generate, FakeEngine.arguments = [], [*arguments, options]

    def generate(self, prompts: Any, sampling: Any) -> Any:
        FakeEngine.syncs_at_generate.append(self.syncs)
        return TransformersRollouts(self.model).generate(prompts, sampling)

    def sync_from_disk(self, folder: Path, expected: TokenLogprobs) -> None:
        self.syncs += 1
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.verify_weights(expected)

    def verify_weights(self, expected: TokenLogprobs) -> None:
        FakeEngine.expected = expected


class FakeInProcessEngine(FakeEngine):
    """Stands for VllmInProcessRollouts."""


class FakeLlm:
    """Stands for vllm.LLM."""

    def __init__(self, **options: Any):
        self.options = options


class FakeNccl:
    """Stands for NcclWeightSync: the server receives the weights of the model."""

    calls: list[Any]

    def __init__(self, url: str, model: torch.nn.Module, **options: Any):
        self.model = model
        FakeNccl.calls = [(url, options)]

    def sync(self) -> None:
        sent = dict(self.model.named_parameters())
        if hasattr(self.model, "get_base_model"):
            sent = dict(merged_weights(self.model, sent))
        FakeNccl.calls.append({name: tensor.detach().clone() for name, tensor in sent.items()})

    def close(self) -> None:
        FakeNccl.calls.append("closed")


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.__spec__, module.LLM = ModuleSpec("vllm", None), FakeLlm
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name, fake in (
        ("VllmRollouts", FakeEngine),
        ("VllmInProcessRollouts", FakeInProcessEngine),
        ("NcclWeightSync", FakeNccl),
    ):
        monkeypatch.setattr(f"fused_distill.trainer.rollouts.{name}", fake)


RUN = ("steps=5", "data.evaluation_prompts=4", "evaluate_every=3", "save_every=3")
SERVER = ("rollouts.engine=vllm_server", "rollouts.url=http://x")
NCCL = (*SERVER, "rollouts.sync=nccl", "rollouts.nccl_address=10.0.0.1", "rollouts.nccl_port=29600")
IN_PROCESS = ("rollouts.engine=vllm",)
ENGINES = pytest.mark.parametrize("engine", [SERVER, IN_PROCESS], ids=["server", "in_process"])


@ENGINES
def test_vllm_generates_with_the_students_weights(lab: Lab, tmp_path: Path, engine: tuple[str, ...]) -> None:
    train(lab.config(tmp_path / "transformers", *RUN))
    train(lab.config(tmp_path / "vllm", *RUN, *engine))
    for kind in ("train", "evaluation"):
        expected = [row["loss"] for row in metrics(tmp_path / "transformers", kind)]
        assert [row["loss"] for row in metrics(tmp_path / "vllm", kind)] == expected


@ENGINES
def test_weights_are_sent_every_sync_every_steps_and_for_every_evaluation(
    lab: Lab, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    train(lab.config(tmp_path, *RUN, *engine, "rollouts.sync_every=2"))
    # Evaluation at 0, steps 0 1 2, evaluation at 3, steps 3 4, evaluation at 5.
    assert FakeEngine.syncs_at_generate == [1, 1, 1, 2, 3, 3, 4, 5]


@ENGINES
def test_a_resumed_run_sends_its_weights_first(lab: Lab, tmp_path: Path, engine: tuple[str, ...]) -> None:
    settings = ("steps=6", "save_every=3", *engine, "rollouts.sync_every=4")
    train(lab.config(tmp_path, *settings))
    assert FakeEngine.syncs_at_generate == [1, 1, 1, 2, 3, 3]  # at step 3 because of the checkpoint
    uninterrupted = losses(tmp_path)
    for checkpoint in list_checkpoints(tmp_path)[1:]:
        checkpoint.rename(tmp_path / "away")
    train(lab.config(tmp_path, *settings), resume=True)
    assert FakeEngine.syncs_at_generate == [1, 2, 2]
    assert losses(tmp_path) == uninterrupted


def test_a_server_is_called_by_url_and_its_own_token(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_DISTILL_TOKEN", "the-teachers-token")
    monkeypatch.delenv("FUSED_DISTILL_ROLLOUT_TOKEN", raising=False)
    Trainer(lab.config(tmp_path, *SERVER))
    assert FakeEngine.arguments == ["http://x", {"token": None, "vocab_size": 98}]
    monkeypatch.setenv("FUSED_DISTILL_ROLLOUT_TOKEN", "secret-of-16-chars")
    Trainer(lab.config(tmp_path, *SERVER))
    assert FakeEngine.arguments == ["http://x", {"token": "secret-of-16-chars", "vocab_size": 98}]


def test_an_engine_in_process_is_built_from_the_settings(lab: Lab, tmp_path: Path) -> None:
    options = "rollouts.engine_options={gpu_memory_utilization: 0.25, max_model_len: 99}"
    for overrides, expected in (
        ((), {"dtype": "float32", "max_model_len": 512 + 6}),
        ((options,), {"dtype": "float32", "max_model_len": 99, "gpu_memory_utilization": 0.25}),
    ):
        Trainer(lab.config(tmp_path, *IN_PROCESS, *overrides))
        llm, no_options = FakeEngine.arguments
        assert no_options == {"vocab_size": 98}
        assert llm.options == {"model": str(lab.student), **expected}


def test_engines_of_several_processes_share_the_launchers_process_group(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    Trainer(lab.config(tmp_path, *IN_PROCESS))
    assert FakeEngine.arguments[0].options["distributed_executor_backend"] == "external_launcher"


def test_every_process_loads_the_weights_into_its_own_engine_but_one_sends_them_to_a_server(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    for engine, syncs in ((IN_PROCESS, 1), (SERVER, 0)):
        trainer = Trainer(lab.config(tmp_path, *engine))
        trainer.save(tmp_path / "weights")
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "is_main_process", property(lambda _: False))
            trainer.rollouts.sync_weights(0)
        assert trainer.rollouts.engine.syncs == syncs  # pyright: ignore[reportAttributeAccessIssue]


def test_nccl_sends_the_students_weights_as_often_as_disk_would(lab: Lab, tmp_path: Path) -> None:
    class Receiver(FakeEngine):
        def generate(self, prompts: Any, sampling: Any) -> Any:
            self.syncs = sum(isinstance(call, dict) for call in FakeNccl.calls)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(lab.student)
            for parameter, sent in zip(self.model.parameters(), FakeNccl.calls[-1].values(), strict=True):
                parameter.data.copy_(sent)
            return super().generate(prompts, sampling)

    train(lab.config(tmp_path / "transformers", *RUN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_distill.trainer.rollouts.VllmRollouts", Receiver)
        train(lab.config(tmp_path / "nccl", *RUN, *NCCL, "rollouts.sync_every=1"))
    assert FakeEngine.syncs_at_generate == [1, 1, 2, 3, 4, 4, 5, 6]
    assert losses(tmp_path / "nccl") == losses(tmp_path / "transformers")
    options = {"address": "10.0.0.1", "port": 29600, "token": None, "rank": 0}
    assert FakeNccl.calls[0] == ("http://x", options)
    assert FakeNccl.calls[-1] == "closed"
    assert not (tmp_path / "nccl" / "weights").exists()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (IN_PROCESS, "rollouts.engine: vllm needs vllm beside the trainer: pip install vllm"),
        (NCCL, "rollouts.sync: nccl needs vllm beside the trainer: pip install vllm"),
    ],
)
def test_missing_vllm_is_reported_before_any_work(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("fused_distill.trainer.start.find_spec", lambda _: None)
    with pytest.raises(ConfigError) as error:
        Trainer(lab.config(tmp_path, *engine, "student=/nowhere"))
    assert str(error.value) == message


def test_vllm_is_compared_with_the_students_log_probabilities(lab: Lab, tmp_path: Path) -> None:
    for engine in (SERVER, IN_PROCESS, NCCL):
        trainer = Trainer(lab.config(tmp_path, *engine))
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(2)
        trainer.rollouts.sync_weights(0)
        vocab_size = trainer.model.config.get_text_config().vocab_size
        assert FakeEngine.expected == model_logprobs(trainer.model, vocab_size, trainer.device)


class RestartedEngine(FakeEngine):
    """Stands for VllmRollouts on a server that was restarted before the third call of generate."""

    calls = 0

    def generate(self, prompts: Any, sampling: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise WeightsError("vLLM does not have the weights that it received last")
        return super().generate(prompts, sampling)


def test_a_restarted_server_gets_the_weights_again_and_the_run_goes_on(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(lab.config(tmp_path / "uninterrupted", *RUN, *SERVER))
    monkeypatch.setattr("fused_distill.trainer.rollouts.VllmRollouts", RestartedEngine)
    train(lab.config(tmp_path / "restarted", *RUN, *SERVER))
    assert losses(tmp_path / "restarted") == losses(tmp_path / "uninterrupted")
    assert "vLLM gets the student's weights again: vLLM does not have" in caplog.text


def test_a_restarted_server_ends_a_run_that_sends_weights_over_nccl(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_distill.trainer.rollouts.VllmRollouts", RestartedEngine)
    trainer = Trainer(lab.config(tmp_path, *NCCL))
    engine: Any = trainer.rollouts.engine
    engine.calls = 2
    with pytest.raises(WeightsError, match="does not have the weights"):
        trainer.rollouts.generate([[5]], Sampling())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, (1,)),  # <eos>
        ("{% for m in messages %}{{ m.content }}<end>{% endfor %}", (1, 98)),
        ("{{ raise_exception('no') }}", (1,)),
    ],
)
def test_a_student_without_end_token_gets_the_tokenizers_and_the_chat_templates(
    lab: Lab, tmp_path: Path, template: str | None, expected: tuple[int, ...]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    tokenizer.add_tokens("<end>", special_tokens=True)
    tokenizer.chat_template = template
    assert fallback_ends(tokenizer, lab.config(tmp_path)) == expected


def test_the_fallback_is_used_where_no_config_names_an_end_token(lab: Lab, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(lab.student, student)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((student / name).read_text())
        settings["eos_token_id"] = None
        (student / name).write_text(json.dumps(settings))
    without = Trainer(lab.config(tmp_path / "without", f"student={student}"))
    assert without.rollouts.sampling(1, 0).stop_token_ids == (1,)
    assert Trainer(lab.config(tmp_path)).rollouts.sampling(1, 0).stop_token_ids == ()


def test_rollouts_follow_the_settings_and_the_common_vocabulary(lab: Lab, tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", lab.student, vocab_size=101)
    options = "rollouts={max_completion_length: 7, temperature: 0.5, top_p: 0.9, top_k: 3, batch_size: 5}"
    trainer = Trainer(lab.config(tmp_path, options))
    assert trainer.rollouts.sampling(2, 9) == Sampling(2, 7, 0.5, 0.9, 3, 9)
    assert trainer.rollouts.engine.batch_size == 5  # pyright: ignore[reportAttributeAccessIssue]
    wider = lab.config(tmp_path, f"student={student}", f"teacher.model={lab.student}")
    assert Trainer(wider).rollouts.sampling(1, 0).vocab_size == 98


def test_vllm_refuses_a_student_with_many_tokens_that_the_teacher_lacks(lab: Lab, tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", lab.student, vocab_size=98 + 1025)
    with pytest.raises(ConfigError, match=r"rollouts\.engine: vllm_server cannot exclude the 1025 tokens"):
        Trainer(lab.config(tmp_path, *SERVER, f"student={student}", f"teacher.model={lab.student}"))


def test_processes_evaluate_with_random_numbers_of_their_own(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completion i of a call has the random numbers of seed + i."""
    trainer: Any = Trainer(lab.config(tmp_path, "data.evaluation_prompts=6"))
    seeds: list[int] = []
    generate = trainer.generate

    def noting(samples: Any, seed: int, n: int) -> Any:
        seeds.extend(range(seed, seed + len(samples) * n))
        return generate(samples, seed, n)

    monkeypatch.setattr(trainer, "generate", noting)
    trainer.processes = 2
    for trainer.rank in range(2):
        trainer.evaluate()
    assert len(seeds) == len(set(seeds)) == 6
