"""TRL's distillation trainers train as before with our losses under them, and make no logits of prompts."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill.compat import trl as compat
from fused_distill.compat.trl import patch_trl, unpatch_trl
from torch import Tensor

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
local = pytest.importorskip("trl.trainer.distillation_trainer")
server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="about what is computed, not on which backend"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 20
PROMPTS = ["ab", "Hello there", "x y z", "Why?"]
SERVER_CASES = [
    (0.0, 1, True),
    (0.0, 5, True),
    (0.0, 5, False),
    (0.3, 1, True),
    (0.3, 1, False),
    (1.0, 1, True),
]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch_trl()


@pytest.fixture
def make_trainer(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """make_trainer(beta, **options): a local teacher, or with loss_top_k one behind a server that is played.

    In float32; with the server in float64, as TRL's float32 tails lose digits.
    """

    def make(beta: float, **options: Any) -> Any:
        torch.manual_seed(1)
        config = transformers.AutoConfig.from_pretrained(tiny_model)
        student = transformers.AutoModelForCausalLM.from_config(config)
        config.hidden_size = 24
        teacher = transformers.AutoModelForCausalLM.from_config(config).eval()
        for model in (student, teacher):
            model.get_input_embeddings().weight.data.mul_(20)  # random models are nearly uniform
        settings = {
            "output_dir": str(tmp_path),
            "beta": beta,
            "temperature": 0.8,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 8,
            # Adam would make steps of the rounding where a gradient should be 0.
            "optim": "sgd",
            "learning_rate": 0.02,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
        arguments = {
            "model": student,
            "train_dataset": datasets.Dataset.from_dict({"prompt": PROMPTS * STEPS}),
            "processing_class": transformers.AutoTokenizer.from_pretrained(tiny_model, padding_side="left"),
        }
        if "loss_top_k" not in options:
            args = trl.DistillationConfig(**settings)
            return trl.DistillationTrainer(teacher_model=teacher, args=args, **arguments)
        student.double()
        monkeypatch.setattr(
            "trl.generation.vllm_client.VLLMClient", lambda **_: PlayedClient(teacher.double())
        )
        monkeypatch.setattr(
            server.ServerDistillationTrainer, "_get_teacher_token_logprobs_from_server", answer_in_float64
        )
        args = trl.experimental.server_distillation.ServerDistillationConfig(
            teacher_model_server_url="http://nowhere", **settings
        )
        return server.ServerDistillationTrainer(args=args, **arguments)

    return make


answer_in_float32 = server.ServerDistillationTrainer._get_teacher_token_logprobs_from_server


def answer_in_float64(self: Any, inputs: dict[str, Any], aligned_prompt_length: int) -> dict[str, Tensor]:
    answer = answer_in_float32(self, inputs, aligned_prompt_length)
    return {name: t.double() if t.is_floating_point() else t for name, t in answer.items()}


class PlayedClient:
    """Answers as TRL's VLLMClient does, from a model at hand."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
    ) -> dict[str, list[Any]]:
        answers: dict[str, list[Any]] = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for sequence, length in zip(sequences, prompt_lengths, strict=True):
            tokens = torch.tensor([sequence])
            with torch.no_grad():
                logits = self.teacher(input_ids=tokens).logits[0, length - 1 : -1]
            logprobs = torch.log_softmax(logits / temperature, -1)
            top = logprobs.topk(top_logprobs)
            answers["logprobs"].append(top.values.tolist())
            answers["logprob_token_ids"].append(top.indices.tolist())
            answers["actual_logprobs"].append(logprobs.gather(-1, tokens[0, length:, None]).tolist())
        return answers


def train(trainer: Any) -> tuple[list[float], list[float], list[Tensor]]:
    """Losses and entropies of all steps, the parameters after the last."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == STEPS
    entropies = [entry["entropy"] for entry in steps if "entropy" in entry]
    return [entry["loss"] for entry in steps], entropies, [p.detach() for p in trainer.model.parameters()]


def assert_trains_as_trl(make: Callable[[], Any], tolerance: float) -> None:
    theirs = train(make())
    with patch_trl():
        ours = train(make())
    assert theirs[0][-1] != pytest.approx(theirs[0][0], rel=0.01)  # it did train
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)  # logged in float32
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    torch.testing.assert_close(ours[2], theirs[2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_training_with_a_local_teacher_equals_trls(make_trainer: Callable[..., Any], beta: float) -> None:
    assert_trains_as_trl(lambda: make_trainer(beta), 1e-5)


@pytest.mark.parametrize(("beta", "k", "tail"), SERVER_CASES)
def test_training_with_a_server_teacher_equals_trls(
    make_trainer: Callable[..., Any], beta: float, k: int, tail: bool
) -> None:
    assert_trains_as_trl(lambda: make_trainer(beta, loss_top_k=k, loss_add_tail=tail), 1e-10)


@pytest.mark.parametrize("options", [{}, {"loss_top_k": 1}], ids=["local", "server"])
def test_evaluation_equals_trls(make_trainer: Callable[..., Any], options: Any) -> None:
    trainer = make_trainer(0.5, **options)
    inputs = training_inputs(trainer)
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, inputs)
        patch_trl()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), theirs)


@pytest.mark.parametrize("options", [{}, {"loss_top_k": 1}], ids=["local", "server"])
def test_no_logits_are_made_by_the_models(make_trainer: Callable[..., Any], options: Any) -> None:
    trainer = make_trainer(0.5, **options)
    inputs = training_inputs(trainer)

    def refuse(*_: Any) -> None:
        raise AssertionError("the output layer ran")

    trainer.model.lm_head.register_forward_hook(refuse)
    if trainer.teacher_model is not None:
        trainer.teacher_model.lm_head.register_forward_hook(refuse)
    patch_trl()
    trainer.compute_loss(trainer.model, inputs).backward()


def test_mixed_precision_covers_the_students_backbone(make_trainer: Callable[..., Any]) -> None:
    # accelerate's autocast wraps model.forward, which is not what runs.
    trainer = make_trainer(0.5, loss_top_k=1, bf16=True, max_steps=1)
    autocast = []

    def record(*_: Any) -> None:
        if torch.is_grad_enabled():
            autocast.append(torch.is_autocast_enabled("cpu"))

    trainer.model.base_model.norm.register_forward_hook(record)
    with patch_trl():
        trainer.train()
    assert autocast == [True, True]


def training_inputs(trainer: Any) -> dict[str, Any]:
    """What a training step gets: completions of different lengths."""
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": prompt} for prompt in PROMPTS])
    inputs["completion_mask"][0, -3:] = 0
    return inputs


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_log_probabilities_that_the_server_leaves_out_are_an_error(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    trainer = make_trainer(beta, loss_top_k=1)
    inputs = training_inputs(trainer)
    answer = PlayedClient.get_sequence_logprobs

    def incomplete(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        result["actual_logprobs"][1][0] = [-torch.inf]
        return result

    monkeypatch.setattr(PlayedClient, "get_sequence_logprobs", incomplete)
    patch_trl()
    with pytest.raises(ValueError, match=r"no log-probability .* at 1 of 13 completion tokens"):
        trainer.compute_loss(trainer.model, inputs)


def test_sharded_heads_are_gathered() -> None:
    # FSDP2's parameters are DTensors; one process suffices to see that both directions work.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    hidden, weight = torch.randn(2, 3, 8), torch.randn(40, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        loss, entropy, n_tokens = compat._divergence_loss(hidden, hidden + 1, sharded, sharded, mask, 0.5)
        (gradient,) = torch.autograd.grad(loss, sharded)
        whole = weight.requires_grad_()
        expected = local._chunked_divergence_loss(hidden, hidden + 1, whole, whole, mask, 0.5)
        torch.testing.assert_close((loss, entropy, n_tokens), expected)
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), torch.autograd.grad(expected[0], whole)[0])
    finally:
        distributed.destroy_process_group()


def state() -> tuple[Any, Any]:
    return local._chunked_divergence_loss, server.ServerDistillationTrainer.compute_loss


def test_patching_twice_is_patching_once() -> None:
    before = state()
    patch_trl()
    patch_trl()
    assert state() == (compat._divergence_loss, compat._server_loss)
    unpatch_trl()
    assert state() == before
    unpatch_trl()
    assert state() == before


def test_as_a_context_manager_it_ends_what_it_began() -> None:
    before = state()
    with patch_trl():
        with patch_trl():
            pass
        assert state() == (compat._divergence_loss, compat._server_loss)
    assert state() == before


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setattr(trl, "__version__", "1.160.0")
    with pytest.raises(ImportError, match=r"knows TRL 1\.16, found 1\.160\.0: pip install 'trl==1\.16\.\*'"):
        patch_trl()
    assert state() == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.delattr(server.ServerDistillationTrainer, "compute_loss"), "no such function"),
        (
            lambda m: m.setattr(local, "_chunked_divergence_loss", lambda hidden: hidden),
            r"found \['hidden'\]",
        ),
    ],
)
def test_another_structure_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], match: str
) -> None:
    change(monkeypatch)
    before = vars(server.ServerDistillationTrainer).get("compute_loss"), local._chunked_divergence_loss
    with pytest.raises(RuntimeError, match=match):
        patch_trl()
    after = vars(server.ServerDistillationTrainer).get("compute_loss"), local._chunked_divergence_loss
    assert after == before


def test_without_trl_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["trl"] = None
from fused_distill.compat.trl import patch_trl
try:
    patch_trl()
except ImportError as error:
    sys.exit("pip install 'trl==1.16.*'" not in str(error))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
