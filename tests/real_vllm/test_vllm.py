"""Against a real vLLM server: `make test-vllm` installs vLLM in a separate venv and runs these tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fused_distill.huggingface.loading import tokenizer_fingerprint
from fused_distill.rollouts.base import Completion, Sampling
from fused_distill.rollouts.transformers import TransformersRollouts
from fused_distill.rollouts.vllm import VllmRollouts
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import ServerError
from fused_distill.serving.protocol.logprobs import TeacherLogprobs
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer.config import TrainConfig
from fused_distill.trainer.loop import train
from limits import seconds
from servers import START_SECONDS, running
from serving_cases import process_ended, serving, wait_until
from vllm_cases import PYTHON, SETTINGS, VOCAB, load

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        PYTHON is None, reason="FUSED_DISTILL_VLLM_PYTHON names no Python with vLLM: make test-vllm"
    ),
]


def our_command(folder: Path) -> list[str]:
    """Return the command of our server with vLLM in its process."""
    command = [str(PYTHON), "-m", "fused_distill.cli", "serve-teacher", str(folder), "--engine", "vllm"]
    options = ["--dtype", "float32", "--engine-options", '{"enforce_eager": true}', "--max-length", "511"]
    return command + options


@pytest.fixture(scope="module")
def ours_vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Our server with vLLM in its process."""
    with running(our_command(folder), tmp_path_factory.mktemp("ours") / "log", **SETTINGS) as server:
        yield server.url


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[str]:
    """Our server with transformers."""
    with serving(TransformersEngine.load(str(folder), "cpu", "float32")) as served:
        yield served.url


def in_vllm(script: str, *arguments: str) -> Any:
    """What a script prints last, run by the Python that has vLLM."""
    done = subprocess.run(
        [str(PYTHON), "-c", script, *arguments],
        env={**os.environ, **SETTINGS, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def random_sequences(count: int) -> tuple[list[list[int]], list[int]]:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(3, VOCAB, generator.integers(2, 40)).tolist() for _ in range(count)]
    return sequences, [int(generator.integers(0, len(s))) for s in sequences]


@pytest.mark.parametrize("k", [1, 16, 64])
def test_stock_vllm_our_server_with_vllm_and_with_transformers_agree(
    vllm: str, ours_vllm: str, ours: str, k: int
) -> None:
    sequences, prompts = random_sequences(12)

    def answer(url: str) -> TeacherLogprobs:
        with TeacherClient(url) as client:
            return client.get_sequence_logprobs(sequences, prompts, top_logprobs=k)

    reference = answer(ours)
    for other in (answer(vllm), answer(ours_vllm)):
        np.testing.assert_array_equal(other.lengths, reference.lengths)
        np.testing.assert_allclose(other.actual_logprobs, reference.actual_logprobs, atol=1e-4)
        np.testing.assert_allclose(other.logprobs, reference.logprobs, atol=1e-4)
        assert (other.ids == reference.ids).mean() > 0.99  # near ties may fall either way


def test_a_killed_server_leaves_no_engine_behind(folder: Path, tmp_path: Path) -> None:
    with running(our_command(folder), tmp_path / "log", **SETTINGS) as server:
        pid = server.process.pid
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        assert children
        server.process.kill()
        wait_until(lambda: all(map(process_ended, children)), seconds(60))


def test_our_server_with_vllm_describes_its_capabilities(ours_vllm: str, folder: Path) -> None:
    with TeacherClient(ours_vllm) as client:
        info = client.info()
        assert (info["vocab_size"], info["max_length"], info["capabilities"]) == (VOCAB, 511, [])
        assert info["tokenizer_fingerprint"] == tokenizer_fingerprint(
            transformers.AutoTokenizer.from_pretrained(folder)
        )
        longest = client.get_sequence_logprobs([[5] * 511], [0])
        assert longest.lengths.tolist() == [510]
        with pytest.raises(ServerError, match="temperature"):
            client.get_sequence_logprobs([[5, 6]], [1], temperature=0.5)
        with pytest.raises(ServerError, match="score_ids"):
            client.get_sequence_logprobs([[5, 6]], [1], score_ids=[[[1]]])


@pytest.mark.parametrize("server", ["vllm", "ours_vllm", "ours"])
def test_a_sequence_without_positions_gets_an_empty_answer(
    server: str, request: pytest.FixtureRequest
) -> None:
    with TeacherClient(request.getfixturevalue(server)) as client:
        assert client.get_sequence_logprobs([[5]], [1]).lengths.tolist() == [0]
        answer = client.get_sequence_logprobs([[5], [5, 6, 7], [5, 6]], [1, 1, 2], top_logprobs=3)
    assert answer.lengths.tolist() == [0, 2, 0]
    assert answer.logprobs.shape == (2, 3)


def test_a_stock_vllm_server_ignores_temperature_for_prompt_logprobs(vllm: str) -> None:
    # The reason why the client refuses other temperatures. If this fails, the client can support them.
    body = {"model": httpx.get(f"{vllm}/v1/models").json()["data"][0]["id"], "prompt": [[5, 9, 30]]}
    body |= {"max_tokens": 1, "prompt_logprobs": 3}
    cold, warm = (
        httpx.post(f"{vllm}/v1/completions", json={**body, "temperature": t}, timeout=seconds(60)).json()
        for t in (0.5, 1.0)
    )
    assert cold["choices"][0]["prompt_logprobs"] == warm["choices"][0]["prompt_logprobs"]


def test_greedy_rollouts_equal_those_of_transformers(vllm: str, folder: Path) -> None:
    prompts, sampling = [[5, 9, 30], [7], [8, 8]], Sampling(n=2, temperature=0, max_tokens=12)
    with VllmRollouts(vllm) as rollouts:
        answers = rollouts.generate(prompts, sampling, groups=[4, 5, 4])
    reference = TransformersRollouts(load(folder)).generate(prompts, sampling, groups=[4, 5, 4])
    for a, b in zip(answers, reference, strict=True):
        assert (a.group, a.prompt, a.tokens, a.finish_reason) == (
            b.group,
            b.prompt,
            b.tokens,
            b.finish_reason,
        )
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


IN_PROCESS = """
import json, sys
from vllm import LLM
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.vllm import VllmInProcessRollouts

if __name__ == "__main__":
    folder, changed = sys.argv[1:]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512)
    rollouts = VllmInProcessRollouts(llm)
    greedy = Sampling(n=2, temperature=0, max_tokens=12)
    prompts = [[5, 9, 30], [7], [8, 8]]
    completions = [rollouts.generate(prompts, greedy, groups=[4, 5, 4])]
    seeded = Sampling(n=4, max_tokens=10, seed=3)
    completions += [rollouts.generate([[5, 9], [5, 9]], seeded) for _ in range(2)]
    rollouts.sync_from_disk(changed)
    completions.append(rollouts.generate(prompts, greedy))
    llm.llm_engine.engine_core.shutdown()
    print(json.dumps(completions))
"""


def test_in_process_rollouts_are_transformers_repeat_by_seed_and_follow_new_weights(
    folder: Path, changed: Path
) -> None:
    prompts, greedy = [[5, 9, 30], [7], [8, 8]], Sampling(n=2, temperature=0, max_tokens=12)
    completions = in_vllm(IN_PROCESS, str(folder), str(changed))
    first, seeded, again, after = [[Completion(*c) for c in part] for part in completions]
    for got, want in ((first, folder), (after, changed)):
        expected = TransformersRollouts(load(want)).generate(prompts, greedy)
        assert [c.tokens for c in got] == [c.tokens for c in expected]
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert [c.group for c in first] == [4, 4, 5, 5, 4, 4]
    assert seeded == again
    assert len({tuple(c.tokens) for c in seeded}) == 8


# vLLM's own sender, up to the NCCL group that it would open and broadcast in.
NCCL = """
import json, sys, torch, httpx
from vllm.distributed.weight_transfer import nccl_engine
from fused_distill.rollouts.nccl import NcclWeightSync

calls = []

def answer(request):
    body = json.loads(request.content) if request.content else None
    calls.append([request.method, request.url.path, body])
    return httpx.Response(200, json={"world_size": 2, "success": True})

nccl_engine.open_trainer_endpoint = lambda info: calls.append(["group of", info.world_size])
nccl_engine.NCCLTrainerWeightTransferEngine._broadcast = lambda self, source, meta: [*source]
sync = NcclWeightSync("http://server", torch.nn.Linear(3, 2), address="10.0.0.1", port=29600,
                      transport=httpx.MockTransport(answer))
sync.sync()
print(json.dumps(calls))
"""


def test_nccl_weight_sync_drives_vllms_own_endpoints_in_order() -> None:
    calls = in_vllm(NCCL)
    assert ["group of", 3] in calls
    posts = {path: body for method, path, body in (c for c in calls if len(c) == 3) if method == "POST"}
    assert list(posts) == [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
    ]
    init = posts["/init_weight_transfer_engine"]["init_info"]
    assert (init["master_address"], init["master_port"], init["world_size"]) == ("10.0.0.1", 29600, 3)
    assert posts["/update_weights"]["update_info"]["names"] == ["weight", "bias"]


def test_seeded_rollouts_repeat_and_differ_within_a_group(vllm: str) -> None:
    with VllmRollouts(vllm) as rollouts:
        first, again = (
            rollouts.generate([[5, 9], [5, 9]], Sampling(n=4, max_tokens=10, seed=3)) for _ in range(2)
        )
    assert first == again
    assert len({tuple(c.tokens) for c in first}) == 8
    assert {c.finish_reason for c in first} <= {"stop", "length"}


def test_rollouts_follow_new_weights_after_a_sync(vllm: str, folder: Path, changed: Path) -> None:
    prompts, sampling = [[5, 9, 30], [7]], Sampling(temperature=0, max_tokens=12)
    with VllmRollouts(vllm) as rollouts:
        before = rollouts.generate(prompts, sampling)
        rollouts.sync_from_disk(changed)
        after = rollouts.generate(prompts, sampling)
        rollouts.sync_from_disk(folder)
        back = rollouts.generate(prompts, sampling)
    want = TransformersRollouts(load(changed)).generate(prompts, sampling)
    assert [c.tokens for c in after] == [c.tokens for c in want] != [c.tokens for c in before]
    assert [c.tokens for c in back] == [c.tokens for c in before]


def test_a_run_with_rollouts_of_a_vllm_server_and_our_teacher_server(
    vllm: str, ours: str, folder: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "prompts.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": f"number {i} is"}) + "\n" for i in range(12)))
    student = load(folder)
    with torch.no_grad():
        student.lm_head.weight.mul_(0.5)
    student.save_pretrained(tmp_path / "student")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "student")
    config = {
        "student": str(tmp_path / "student"),
        "teacher": {"url": ours},
        "data": {"path": str(data), "evaluation_prompts": 4},
        "rollouts": {"engine": "vllm_server", "url": vllm, "max_completion_length": 8, "num_generations": 2},
        "output": str(output),
        "steps": 4,
        "prompts_per_step": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
    }
    trained = train(TrainConfig.model_validate(config))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    before, after = (line["loss"] for line in lines if line["kind"] == "evaluation")
    assert after < before
    with VllmRollouts(vllm) as rollouts:
        # The server generated the last evaluation's completions with the weights of the last sync.
        rollouts.sync_from_disk(trained)
        prompts, greedy = [[5, 9, 30]], Sampling(temperature=0, max_tokens=8)
        completions = rollouts.generate(prompts, greedy)
        rollouts.sync_from_disk(folder)
    want = TransformersRollouts(load(trained)).generate(prompts, greedy)
    assert [c.tokens for c in completions] == [c.tokens for c in want]
