"""vLLM's weights are checked before they are sent, after they were received, and after every generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.vllm import VllmRollouts
from fused_distill.rollouts.weights import Checkpoint, TokenLogprobs, WeightsError, probe_tokens
from fused_distill.serving.client.retry import RetryPolicy, ServerError
from safetensors.torch import load_file, save_file

VOCAB, LAYERS = 30, 2


def save_checkpoint(folder: Path, weight: float = 1.0, hidden: int = 4) -> Path:
    """Save a checkpoint whose log-probabilities in the fake server below are multiples of `weight`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "tie_word_embeddings": True})
    )
    tensors = {f"model.layers.{i}.weight": torch.full((hidden, hidden), weight) for i in range(LAYERS)}
    save_file(tensors | {"model.embed.weight": torch.ones(VOCAB, hidden)}, folder / "model.safetensors")
    return folder


def expected(weight: float) -> TokenLogprobs:
    tokens = probe_tokens(VOCAB)
    return TokenLogprobs(tokens, [-weight * (1 + token % 5) for token in tokens[1:]])


class FakeVllm:
    """The endpoints of a vLLM server. Its weights are one number of a checkpoint."""

    def __init__(self, folder: Path, versions: bool = True):
        self.folder, self.versions = folder, versions
        self.paths: list[str] = []
        self.loads = 0
        self.before_generation: Callable[[], None] = lambda: None
        self.restart()

    def restart(self) -> None:
        """Load the weights of the start."""
        self.load(self.folder)
        self.version = "default"

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        self.weight = tensors["model.layers.1.weight"][0, 0].item()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content or "null")
        self.paths.append(path)
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "root": str(self.folder)}]})
        if path == "/collective_rpc":
            self.loads += 1
            self.load(Path(body["kwargs"]["weights_path"]))
        elif path == "/update_weight_version" and self.versions:
            self.version = body["new_version"]
        elif path == "/weight_info" and self.versions:
            return httpx.Response(200, json={"weight_version": self.version})
        elif path == "/v1/completions":
            return httpx.Response(200, json={"choices": self.choices(body)})
        elif path != "/reset_prefix_cache":
            return httpx.Response(404, json={"detail": "Not Found"})
        return httpx.Response(200, json={"success": True})

    def choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        if "prompt_logprobs" not in body:
            self.before_generation()
            logprobs = {"token_logprobs": [-1.0]}
            return [{"index": 0, "token_ids": [5], "logprobs": logprobs, "finish_reason": "stop"}]
        [tokens] = body["prompt"]
        rows = [{str(t): {"logprob": -self.weight * (1 + t % 5), "rank": 2}} for t in tokens[1:]]
        return [{"index": 0, "prompt_logprobs": [None, *rows]}]

    def client(self) -> VllmRollouts:
        retries = RetryPolicy(attempts=3, first_wait_seconds=0.01, longest_wait_seconds=0.01)
        return VllmRollouts("http://vllm", transport=httpx.MockTransport(self), retries=retries)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """The checkpoint that the server loaded at its start."""
    return save_checkpoint(tmp_path / "start", weight=0.5)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint of the same model with other weights."""
    return save_checkpoint(tmp_path / "trained", weight=0.75)


def generate(rollouts: VllmRollouts) -> list[list[int]]:
    return [completion.tokens for completion in rollouts.generate([[3, 4]], Sampling())]


def test_weights_that_arrived_generate(start: Path, trained: Path) -> None:
    rollouts = FakeVllm(start).client()
    assert generate(rollouts) == [[5]]  # nothing was sent yet
    rollouts.sync_from_disk(trained, expected(0.75))
    assert generate(rollouts) == [[5]]


def test_a_server_that_loaded_something_else_is_an_error(start: Path, trained: Path) -> None:
    rollouts = FakeVllm(start).client()
    with pytest.raises(WeightsError, match=r"vLLM does not have the model that was sent.* differ by 4"):
        rollouts.sync_from_disk(trained, expected(2.0))


def test_rounding_is_no_difference_but_the_first_one_bounds_the_later_ones(
    start: Path, trained: Path
) -> None:
    exact, rounded = FakeVllm(start).client(), FakeVllm(start).client()
    rounded.sync_from_disk(trained, expected(0.75 + 0.02))
    rounded.sync_from_disk(trained, expected(0.75 - 0.03))
    exact.sync_from_disk(trained, expected(0.75))
    with pytest.raises(WeightsError, match=r"rounding explains at most 0\.001"):
        exact.sync_from_disk(trained, expected(0.75 - 0.03))


@pytest.mark.parametrize("reference", [expected(0.75), None], ids=["compared", "not compared"])
@pytest.mark.parametrize("versions", [True, False])
@pytest.mark.parametrize("when", ["before", "amid"])
def test_a_server_that_was_restarted_from_its_first_weights_is_noticed(
    start: Path, trained: Path, versions: bool, when: str, reference: TokenLogprobs | None
) -> None:
    server = FakeVllm(start, versions)
    rollouts = server.client()
    rollouts.sync_from_disk(trained, reference)
    generate(rollouts)
    if when == "before":
        server.restart()
    else:
        server.before_generation = server.restart
    with pytest.raises(WeightsError, match="weights that it received last"):
        generate(rollouts)


def test_a_restart_is_noticed_even_if_the_weights_are_nearly_the_same(start: Path, tmp_path: Path) -> None:
    server = FakeVllm(start)
    rollouts = server.client()
    rollouts.sync_from_disk(save_checkpoint(tmp_path / "one step", 0.5 + 1e-6), expected(0.5 + 1e-6))
    server.restart()
    with pytest.raises(WeightsError, match="weights have the version 'default'"):
        generate(rollouts)


def test_another_process_may_verify_what_the_first_sent(start: Path, trained: Path) -> None:
    server = FakeVllm(start)
    first, second = server.client(), server.client()
    first.sync_from_disk(trained, expected(0.75))
    second.verify_weights(expected(0.75))
    assert generate(second) == [[5]]
    server.restart()
    for rollouts in (first, second):
        with pytest.raises(WeightsError):
            generate(rollouts)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.weight"]
    save_file(tensors, folder / "model.safetensors")


def without_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed.weight"]
    save_file(tensors, folder / "model.safetensors")


def other_shapes(folder: Path) -> None:
    save_checkpoint(folder, hidden=6)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def incomplete_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, r"which has no config\.json"),
        (without_weights, r"which has no \*\.safetensors"),
        (without_layer, "lacks layer 1"),
        (without_embedding, r"lacks \['model\.embed\.weight'\]"),
        (other_shapes, r"whose model\.embed\.weight has shape \(30, 6\), not \(30, 4\)"),
        (truncated, r"model\.safetensors is not a whole safetensors file"),
        (incomplete_index, r"lacks \['model\.norm\.weight'\]"),
    ],
)
def test_a_folder_that_does_not_fit_is_not_sent(
    start: Path, trained: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(trained)
    server = FakeVllm(start)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        server.client().sync_from_disk(trained)
    assert server.loads == 0


def test_the_first_weights_that_were_sent_count_if_the_servers_are_elsewhere(
    start: Path, trained: Path, tmp_path: Path
) -> None:
    server = FakeVllm(start)
    rollouts = server.client()
    server.folder = tmp_path / "on another machine"
    rollouts.sync_from_disk(trained)
    other_shapes(start)
    with pytest.raises(ValueError, match="has shape"):
        rollouts.sync_from_disk(start)


@pytest.mark.parametrize("head_in", ["server", "folder"])
def test_a_tied_head_may_be_saved_or_not(start: Path, trained: Path, head_in: str) -> None:
    folder = start if head_in == "server" else trained
    tensors = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": torch.ones(VOCAB, 4)}
    save_file(tensors | head, folder / "model.safetensors")
    FakeVllm(start).client().sync_from_disk(trained, expected(0.75))


def test_renamed_tensors_are_the_same_model(start: Path) -> None:
    checkpoint = Checkpoint.read(start)
    like = {f"old.{name}": shape for name, shape in checkpoint.shapes.items()}
    checkpoint.check_shapes(like)
    with pytest.raises(ValueError, match=r"lacks \['old\.another', "):
        checkpoint.check_shapes({**like, "old.another": (3,)})


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_that_cannot_load_the_weights_is_asked_once(start: Path, trained: Path, status: int) -> None:
    calls: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "root": str(start)}]})
        return httpx.Response(status, json={"error": {"message": "worker failed"}})

    with (
        VllmRollouts("http://vllm", transport=httpx.MockTransport(answer)) as rollouts,
        pytest.raises(ServerError, match=rf"did not load .*{status} .*worker failed.*VLLM_SERVER_DEV_MODE=1"),
    ):
        rollouts.sync_from_disk(trained)
    assert calls.count("/collective_rpc") == 1


def with_config(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_vocabulary_size_that_a_config_omits_is_the_default_of_its_type(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with_config(trained, model_type="gemma3", text_config={"num_hidden_layers": LAYERS})
    assert Checkpoint.read(trained).vocab_size == transformers.Gemma3TextConfig().vocab_size


@pytest.mark.parametrize(
    "config",
    [{"model_type": "gemma3", "text_config": {"vocab_size": VOCAB}}, {"model_type": "gpt2", "n_layer": 3}],
    ids=["omitted", "under another name"],
)
def test_layers_are_counted_as_transformers_does(trained: Path, config: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="lacks layer 2"):
        Checkpoint.read(with_config(trained, **config))


def test_layers_with_two_caches_each_are_counted_once(trained: Path) -> None:
    pytest.importorskip("transformers")
    Checkpoint.read(with_config(trained, model_type="longcat_flash", num_layers=LAYERS))


def test_an_unknown_vocabulary_size_is_an_error_before_anything_is_sent(start: Path, trained: Path) -> None:
    server = FakeVllm(start)
    with_config(trained, model_type="unheard-of", num_hidden_layers=LAYERS, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"config\.json with vocab_size, got .*trained"):
        server.client().sync_from_disk(trained)
    assert server.loads == 0
    server.client().sync_from_disk(trained, expected(0.75))
