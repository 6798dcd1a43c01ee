"""A real vLLM server's weights, limits and forbidden tokens."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.vllm import VllmRollouts
from fused_distill.rollouts.weights import TokenLogprobs, WeightsError, model_logprobs
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from safetensors.torch import load_file, save_file
from servers import running
from vllm_cases import PYTHON, SETTINGS, VOCAB, load, vllm_command

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        PYTHON is None, reason="FUSED_DISTILL_VLLM_PYTHON names no Python with vLLM: make test-vllm"
    ),
]
GREEDY = Sampling(temperature=0, max_tokens=4)


def reference(folder: Path) -> TokenLogprobs:
    return model_logprobs(load(folder), VOCAB, torch.device("cpu"))


def test_a_sync_is_verified_by_log_probabilities(vllm: str, folder: Path, changed: Path) -> None:
    with VllmRollouts(vllm) as rollouts:
        rollouts.sync_from_disk(changed, reference(changed))
        rollouts.generate([[5, 9]], GREEDY)
        with pytest.raises(WeightsError, match=r"differ by .*, where rounding explains at most 0\.001"):
            rollouts.sync_from_disk(changed, reference(folder))
        rollouts.sync_from_disk(folder, reference(folder))


def test_checkpoints_that_do_not_fit_are_not_sent(
    vllm: str, folder: Path, changed: Path, tmp_path: Path
) -> None:
    empty, lacking, other = (tmp_path / name for name in ("empty", "lacking", "other"))
    empty.mkdir()
    shutil.copytree(changed, lacking)
    tensors = load_file(lacking / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, lacking / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.intermediate_size = 128
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    with VllmRollouts(vllm) as rollouts:
        for path, message in (
            (empty, "which has no config.json"),
            (lacking, "lacks layer 1"),
            (other, "has shape"),
        ):
            with pytest.raises((FileNotFoundError, ValueError), match=message):
                rollouts.sync_from_disk(path)
        rollouts.sync_from_disk(folder, reference(folder))
    assert httpx.get(f"{vllm}/health").status_code == 200


def test_a_restart_from_the_first_weights_is_noticed(folder: Path, changed: Path, tmp_path: Path) -> None:
    command = vllm_command(folder)
    with running(command, tmp_path / "log", **SETTINGS) as server:
        rollouts = VllmRollouts(server.url)
        rollouts.sync_from_disk(changed, reference(changed))
        rollouts.generate([[5, 9]], GREEDY)
    port = httpx.URL(server.url).port
    with running(command, tmp_path / "log", port, **SETTINGS):
        with pytest.raises(WeightsError, match="weights that it received last"):
            rollouts.generate([[5, 9]], GREEDY)
        rollouts.sync_from_disk(changed, reference(changed))
        completions = rollouts.generate([[5, 9]], GREEDY)
        rollouts.sync_from_disk(folder, reference(folder))
        # Versions tell even weights apart that are nearly the same.
        httpx.post(f"{server.url}/update_weight_version", json={"new_version": "default"})
        with pytest.raises(WeightsError, match="weights have the version 'default'"):
            rollouts.generate([[5, 9]], GREEDY)
    ids = load(changed).generate(torch.tensor([[5, 9]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert completions[0].tokens == ids[0, 2:].tolist()


def test_limits_are_checked_before_a_run_and_name_the_option(vllm: str) -> None:
    with TeacherClient(vllm) as client:
        client.check_limits(top_logprobs=64, length=511)
        with pytest.raises(TeacherError, match="Start vLLM with --max-logprobs 65 or more"):
            client.check_limits(top_logprobs=65, length=2)
        with pytest.raises(ValueError, match="Start vLLM with --max-model-len 513 or more"):
            client.check_limits(top_logprobs=1, length=512)
        assert client.get_sequence_logprobs([[5] * 511], [0]).lengths.tolist() == [510]


def test_vllm_itself_refuses_what_the_client_refuses(vllm: str) -> None:
    # If this fails, the client need not refuse sequences of exactly max_model_len.
    model = httpx.get(f"{vllm}/v1/models").json()["data"][0]
    assert model["max_model_len"] == 512
    body = {"model": model["id"], "prompt": [[5] * 512], "max_tokens": 1, "prompt_logprobs": 0}
    assert httpx.post(f"{vllm}/v1/completions", json=body).status_code == 400


def test_a_teacher_that_gets_other_weights_is_noticed(vllm: str, folder: Path, changed: Path) -> None:
    def load_weights(path: Path) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        httpx.post(f"{vllm}/collective_rpc", json=call).raise_for_status()

    with TeacherClient(vllm) as client:
        for sequence in ([5, 9, 30, 7], [8] * 400, [6]):
            client.get_sequence_logprobs([sequence, [4, 5]], [0, 0], top_logprobs=5)
        load_weights(changed)
        with pytest.raises(TeacherError, match=f"{vllm} answers with other weights"):
            client.get_sequence_logprobs([[4, 5]], [0])
        load_weights(folder)


@pytest.fixture(scope="module")
def forbidding(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi, whose LM head has a bias, that forbids the tokens 40 to 97."""
    path = tmp_path_factory.mktemp("phi")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = transformers.PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.bias[40:] = -torch.inf
    model.save_pretrained(path)
    return path


def test_forbidden_tokens_of_a_stock_vllm_server_are_minus_infinity(forbidding: Path, tmp_path: Path) -> None:
    k, tokens = 60, [5, 9, 50, 30, 97]
    with (
        running(vllm_command(forbidding, "--max-logprobs", str(k)), tmp_path / "log", **SETTINGS) as server,
        TeacherClient(server.url) as client,
    ):
        answer = client.get_sequence_logprobs([tokens], [0], top_logprobs=k)
        raw: dict[str, Any] = httpx.post(
            f"{server.url}/v1/completions",
            json={"model": str(forbidding), "prompt": [tokens], "max_tokens": 1, "prompt_logprobs": 0},
        ).json()
    assert raw["choices"][0]["prompt_logprobs"][2]["50"]["logprob"] == -9999.0, json.dumps(raw)
    with torch.no_grad():
        logprobs = load(forbidding)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    want = logprobs[:-1].gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
    assert want.isneginf().tolist() == [False, True, False, True]
    np.testing.assert_allclose(answer.actual_logprobs, want.numpy(), atol=1e-4)
    np.testing.assert_allclose(answer.logprobs, logprobs[:-1].topk(k).values.numpy(), atol=1e-4)
    assert (answer.logprobs[:, 40:] == -math.inf).all()
