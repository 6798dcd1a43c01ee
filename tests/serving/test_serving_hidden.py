"""Hidden states and the head over the wire, which together give the exact loss; prompts that run once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from cases import INTERPRETED
from fused_distill import fused_linear_jsd
from fused_distill.huggingface.lm_head import LMHeadParams, lm_head_of
from fused_distill.serving.client.align import align_hidden_states
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.request import TeacherError
from fused_distill.serving.client.retry import ServerError
from fused_distill.serving.protocol import packing as framing
from fused_distill.serving.protocol.hidden_states import HiddenStates, decode_hidden, encode_hidden
from fused_distill.serving.protocol.lm_head import load_head, save_head
from fused_distill.serving.protocol.packing import WireError
from fused_distill.serving.protocol.request import TokenSequence
from fused_distill.serving.server.app import ServerLimits
from fused_distill.serving.server.prefix_sharing import Decoder
from fused_distill.serving.server.transformers_engine import TransformersEngine
from hypothesis import given
from hypothesis import strategies as st
from test_serving import LENGTH, VOCAB, FakeEngine, post, random_sequences, serving
from test_serving import model as model
from test_serving import url as url

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")

SHA = "ab" * 32


@st.composite
def hidden_states(draw: st.DrawFn, dtype: torch.dtype) -> HiddenStates:
    lengths = np.array(draw(st.lists(st.integers(0, 4), max_size=4)), dtype=np.int64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    states = torch.randn(int(lengths.sum()), draw(st.integers(1, 5)), generator=generator).to(dtype)
    return HiddenStates(lengths, states, SHA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
def test_hidden_states_survive_the_wire(dtype: Any, data: st.DataObject) -> None:
    sent = data.draw(hidden_states(getattr(torch, dtype)))
    got = decode_hidden(encode_hidden(sent, dtype))
    assert got.head_sha256 == sent.head_sha256
    np.testing.assert_array_equal(got.lengths, sent.lengths)
    assert torch.equal(got.states, sent.states)
    assert got.states.dtype == sent.states.dtype


@given(hidden_states(torch.bfloat16), st.data())
def test_a_changed_or_cut_payload_is_refused(sent: HiddenStates, data: st.DataObject) -> None:
    payload = bytearray(encode_hidden(sent))
    at = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(WireError):
        decode_hidden(bytes(payload[:at]))
    payload[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        decode_hidden(bytes(payload))


def test_a_head_survives_its_file(tmp_path: Path) -> None:
    head = LMHeadParams(torch.randn(5, 3).bfloat16(), torch.randn(5), 0.25, None)
    save_head(head, tmp_path / "head")
    got = load_head(tmp_path / "head")
    assert got.bias is not None
    assert head.bias is not None
    assert torch.equal(got.weight, head.weight)
    assert torch.equal(got.bias, head.bias)
    assert got[2:] == (0.25, None)


def test_a_file_that_is_no_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="must be a teacher's head"):
        load_head(tmp_path / "head")


def test_hidden_states_and_the_head_give_the_loss_of_a_local_teacher(
    url: str, model: Any, tmp_path: Path
) -> None:
    sequences, prompts = random_sequences(7, seed=5)
    states = [torch.empty(0, 16)]
    for tokens, prompt_length in zip(sequences, prompts, strict=True):
        with torch.no_grad():
            whole = model.get_decoder()(input_ids=torch.tensor([tokens])).last_hidden_state[0, :-1]
        states.append(whole[max(prompt_length, 1) - 1 :])
    local = torch.cat(states)
    student, student_head = torch.randn(len(local), 8), torch.randn(VOCAB, 8)
    with TeacherClient(url, request_tokens=30) as client:
        head = client.head(tmp_path)
        answer = client.get_hidden_states(sequences, prompts, dtype="float32")
    teacher = align_hidden_states(answer, torch.ones(len(local), dtype=torch.bool))
    own = lm_head_of(model)

    def loss(hidden: torch.Tensor, head: LMHeadParams) -> torch.Tensor:
        options: Any = {"teacher_softcap": head.softcap, "teacher_logit_scale": head.logit_scale}
        return fused_linear_jsd(student, student_head, hidden, head.weight.detach(), **options)

    torch.testing.assert_close(loss(teacher, head), loss(local, own), rtol=1e-5, atol=0)


def test_bfloat16_states_take_two_bytes_a_number(url: str) -> None:
    body = {"sequences": [[1] * 40], "prompt_lengths": [0], "response": "hidden_states"}
    payload = post(url, **body, response_format="binary").content
    assert decode_hidden(payload).states.dtype == torch.bfloat16
    assert len(payload) < 39 * 16 * 2 + 60


def test_binary_and_base64_carry_the_same_hidden_states(url: str) -> None:
    body = {"sequences": [[1, 2, 3], [4, 5]], "prompt_lengths": [1, 0], "response": "hidden_states"}
    binary = decode_hidden(post(url, **body, response_format="binary").content)
    content = post(url, **body, response_format="base64").json()
    other = decode_hidden(framing.from_base64(content["binary"]))
    assert torch.equal(binary.states, other.states)
    assert binary.head_sha256 == other.head_sha256


class Counting(httpx.HTTPTransport):
    def __init__(self) -> None:
        super().__init__()
        self.downloads = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.downloads += request.method == "GET" and request.url.path == "/v1/teacher/head"
        return super().handle_request(request)


def test_the_head_is_downloaded_once(url: str, tmp_path: Path) -> None:
    transport = Counting()
    for _ in range(3):
        with TeacherClient(url, transport=transport) as client:
            client.head(tmp_path)
    assert transport.downloads == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kept_head_that_is_damaged_is_downloaded_again(url: str, model: Any, tmp_path: Path) -> None:
    with TeacherClient(url) as client:
        client.head(tmp_path)
        (kept,) = tmp_path.iterdir()
        kept.write_bytes(kept.read_bytes()[:-1] + b"\x7f")
        assert torch.equal(client.head(tmp_path).weight, lm_head_of(model).weight)


def test_a_head_that_arrives_damaged_is_asked_for_again_and_never_kept(url: str, tmp_path: Path) -> None:
    class Damaging(Counting):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            response = super().handle_request(request)
            if self.downloads == 1 and request.method == "GET":
                return httpx.Response(200, content=b"half of it")
            return response

    transport = Damaging()
    with TeacherClient(url, protocol="fused-distill", transport=transport) as client:
        client.head(tmp_path)
    assert transport.downloads == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_hidden_states_of_another_head_are_refused(url: str, model: Any, tmp_path: Path) -> None:
    other = TransformersEngine(model)
    assert other.head_file is not None
    other.head_file.head = other.head_file.head._replace(weight=other.head_file.head.weight + 1)
    with serving(other) as changed, TeacherClient([url, changed.url]) as client:
        client.head(tmp_path)
        client._http._preferred = 1
        with pytest.raises(TeacherError, match="another head"):
            client.get_hidden_states([[1, 2, 3]], [1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("response_format", {"response_format": "json"}),
        ("temperature", {"temperature": 1.0}),
        ("top_logprobs", {"top_logprobs": 4}),
        ("score_ids", {"score_ids": [[[1], [2]]]}),
        ("dtype", {"dtype": "float16"}),
    ],
)
def test_options_that_hidden_states_do_not_have_are_named(
    url: str, name: str, change: dict[str, Any]
) -> None:
    body = {"sequences": [[1, 2, 3]], "prompt_lengths": [1], "response": "hidden_states"}
    response = post(url, **{**body, "response_format": "binary", **change})
    assert response.status_code == 422
    assert response.json()["detail"].startswith(name)


def test_an_engine_without_hidden_states_says_so(tmp_path: Path) -> None:
    with serving(FakeEngine()) as served, TeacherClient(served.url) as client:
        with pytest.raises(ServerError, match="no hidden_states"):
            client.get_hidden_states([[1, 2]], [1])
        with pytest.raises(ServerError, match="no hidden_states"):
            client.head(tmp_path)
        assert httpx.get(f"{served.url}/v1/teacher/head").status_code == 404


@pytest.mark.parametrize(
    ("capability", "value"), [("temperature", 0.5), ("score_ids", [[[1]]]), ("vocab_size", 5)]
)
def test_an_engine_without_a_capability_refuses_what_needs_it(capability: str, value: Any) -> None:
    engine = FakeEngine()
    engine.info = engine.info._replace(capabilities=())
    with serving(engine) as served:
        response = post(served.url, sequences=[[1, 2]], prompt_lengths=[1], **{capability: value})
    assert response.status_code == 422
    assert capability in response.json()["detail"]


# Families whose attention differs: full, windows shorter than the prompts, both in turns, learned positions.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "sliding_window": 5,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": LENGTH},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 2,
        "window_size": 5,
    },
}


def model_of(family: str, **options: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    settings = {"max_position_embeddings": LENGTH, **({} if family == "gpt2" else sizes)}
    if family == "gpt_neo":
        del settings["num_hidden_layers"], settings["num_attention_heads"]
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCAB, **{**settings, **FAMILIES.get(family, {}), **options}
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def decoder_of(model: Any) -> Decoder:
    return Decoder(model, VOCAB, LENGTH, torch.device("cpu"))


def generations(seed: int) -> list[TokenSequence]:
    """Of three prompts of different lengths, up to four each; one only repeats its prompt."""
    generator = np.random.default_rng(seed)
    batch = []
    for length in (9, 17, 1):
        prompt = generator.integers(0, VOCAB, length).tolist()
        for count in range(generator.integers(1, 5)):
            rest = generator.integers(0, VOCAB, count * 3).tolist()
            batch.append(TokenSequence((*prompt, *rest), length))
    return [batch[i] for i in generator.permutation(len(batch))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_shared_prompt_gives_the_states_of_separate_ones(family: str, seed: int) -> None:
    decoder, batch = decoder_of(model_of(family)), generations(seed)
    assert decoder.shares_prompts
    apart = torch.cat([decoder.apart([sequence]) for sequence in batch])
    torch.testing.assert_close(decoder.shared(batch), apart, atol=1e-5, rtol=1e-5)


def test_generations_of_one_prompt_run_it_once(model: Any) -> None:
    engine, tokens = TransformersEngine(model), 0

    def count(_: Any, __: Any, options: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += options["input_ids"].numel()

    model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    prompt = list(range(40))
    with serving(engine) as served:
        sequences = [[*prompt, *range(i, i + 5)] for i in range(8)]
        post(served.url, sequences=sequences, prompt_lengths=[40] * 8)
    assert tokens == 40 + 8 * 4


def test_sharing_is_left_where_it_would_run_more_tokens() -> None:
    long, short = tuple(range(30)), tuple(range(5))
    decoder = decoder_of(model_of("llama"))
    assert not decoder.sharing_saves([TokenSequence((*long, 1), 30), TokenSequence((*short, *long), 5)])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_padding_never_reaches_beyond_the_models_positions(family: str) -> None:
    # Prompt and rest are within the limit of every sequence, the longest of each together are not.
    batch = [TokenSequence((*range(40), *range(10, 15 + i)), 40) for i in range(5)]
    batch.append(TokenSequence((*range(10), *range(30)), 10))
    decoder = decoder_of(model_of(family))
    apart = torch.cat([decoder.apart([sequence]) for sequence in batch])
    torch.testing.assert_close(decoder.states(batch), apart, atol=1e-5, rtol=1e-5)


def test_positions_that_depend_on_the_longest_sequence_run_one_by_one() -> None:
    # Phi 3's long rope takes other factors beyond the length it was trained at.
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = model_of("phi3", rope_parameters=rope, original_max_position_embeddings=32, pad_token_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # attention that is not nearly uniform
    batch = [TokenSequence(tuple(range(n)), 4) for n in (25, 45)]
    decoder = decoder_of(model)
    apart = torch.cat([decoder.apart([sequence]) for sequence in batch])
    assert torch.equal(decoder.states(batch), apart)
    assert not torch.allclose(decoder.apart(batch), apart, atol=1e-3)


def test_positions_that_depend_on_what_ran_before_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="dynamic rope"):
        TransformersEngine(model_of("llama", rope_parameters=rope))


def test_rounding_of_a_low_precision_does_not_stop_a_model() -> None:
    engine = TransformersEngine(model_of("llama").bfloat16())
    assert engine.decoder.shares_prompts


def test_without_the_head_a_server_gives_neither_it_nor_hidden_states(model: Any, tmp_path: Path) -> None:
    engine = TransformersEngine(model, hidden_states=False)
    with serving(engine) as served, TeacherClient(served.url) as client:
        assert client.info()["capabilities"] == ["temperature", "score_ids", "vocab_size"]
        with pytest.raises(ServerError, match="no hidden_states"):
            client.head(tmp_path)


def test_a_call_is_cut_so_that_every_answer_is_within_the_servers_limit(model: Any) -> None:
    sequences, prompts = random_sequences(6, seed=2)
    with serving(TransformersEngine(model), limits=ServerLimits(numbers=20 * 16)) as served:
        with TeacherClient(served.url) as client:
            answer = client.get_hidden_states(sequences, prompts)
        assert len(answer.lengths) == 6


def test_a_head_whose_file_was_cleaned_away_is_written_again(model: Any, tmp_path: Path) -> None:
    engine = TransformersEngine(model)
    assert engine.head_file is not None
    with serving(engine) as served, TeacherClient(served.url) as client:
        client.head(tmp_path / "first")
        engine.head_file.saved().path.unlink()
        client.head(tmp_path / "second")


def test_a_model_without_such_a_cache_is_served_without_sharing() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    torch.manual_seed(0)
    mamba = transformers.AutoModelForCausalLM.from_config(config)
    engine = TransformersEngine(mamba, max_length=64)
    assert not engine.decoder.shares_prompts


def test_hidden_states_of_different_heads_do_not_join() -> None:
    one = HiddenStates(np.array([1]), torch.ones(1, 2), SHA)
    with pytest.raises(WireError, match="one head"):
        HiddenStates.join([one, dataclasses.replace(one, head_sha256="cd" * 32)])
