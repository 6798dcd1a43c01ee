"""Retries, failover, the deadline and closing of the client."""

from __future__ import annotations

import json
import ssl
import time
from typing import Any

import httpx
import pytest
from fused_distill.serving.client import retry
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import RetryPolicy, ServerError
from fused_distill.serving.server.app import create_app
from fused_distill.serving.server.transformers_engine import TransformersEngine
from limits import seconds
from raw_server import RawServer, http_response
from serving_cases import (
    DESCRIPTION,
    FAST_ATTEMPTS,
    FAST_RETRIES,
    Served,
    assert_equals_forward_pass,
    client_of_responses,
    in_background,
    one_position,
    random_sequences,
    wait_until,
)


def test_a_call_survives_a_restart_of_the_server(model: Any) -> None:
    served = Served(create_app(TransformersEngine(model)))
    sequences, prompts = random_sequences(12)
    with TeacherClient(served.url, request_tokens=1, concurrency=3) as client:
        client.get_sequence_logprobs(sequences[:1], prompts[:1])
        served.stop()
        with in_background(
            1, lambda _: client.get_sequence_logprobs(sequences, prompts, top_logprobs=4)
        ) as futures:
            time.sleep(0.3)
            again = Served(create_app(TransformersEngine(model)), port=served.port)
            answer = futures[0].result()
        again.stop()
    assert_equals_forward_pass(answer, model, sequences, prompts, 4, 1.0)


def test_a_failing_server_is_passed_over_for_the_next(url: str, model: Any) -> None:
    with TeacherClient(["http://127.0.0.1:9", url], retries=FAST_RETRIES) as client:
        assert_equals_forward_pass(
            client.get_sequence_logprobs([[1, 2, 3]], [1], top_logprobs=2), model, [[1, 2, 3]], [1], 2, 1.0
        )


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_statuses_that_may_pass_are_retried(status: int) -> None:
    client, seen = client_of_responses(httpx.Response(status), httpx.Response(status), one_position())
    assert client.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist() == [-2]
    assert len(seen) == 3
    assert len({request.content for request in seen}) == 1


BROKEN = [
    httpx.Response(200, content=b"nonsense"),
    httpx.Response(200, content=b""),
    httpx.Response(503, json=[]),
    httpx.Response(503, json="busy"),
    httpx.Response(500, content=b"<html>"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_an_unreadable_response_is_retried(broken: httpx.Response) -> None:
    client, seen = client_of_responses(broken, one_position())
    assert client.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist() == [-2]
    assert len(seen) == 2


def test_responses_that_stay_unreadable_are_an_error_after_all_attempts() -> None:
    client, seen = client_of_responses(httpx.Response(200, content=b"nonsense"))
    with pytest.raises(ServerError, match="WireError"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(seen) == FAST_ATTEMPTS


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504])
def test_a_busy_server_is_retried_until_the_deadline_only(status: int) -> None:
    client, requests = client_of_responses(*[httpx.Response(status)] * 100, one_position())
    client._http.retries = RetryPolicy(first_wait_seconds=0.001, longest_wait_seconds=0.002)
    client.get_sequence_logprobs([[1, 2]], [1])
    assert len(requests) == 101


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.RemoteProtocolError]
)
def test_an_unreachable_server_is_retried_until_the_deadline_only(error: type[httpx.RequestError]) -> None:
    attempts: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        attempts.append(request.url.path)
        if len(attempts) <= 100:
            raise error("not now")
        content = json.dumps(DESCRIPTION).encode() if request.method == "GET" else one_position().content
        return httpx.Response(200, content=content)

    policy = RetryPolicy(first_wait_seconds=0.001, longest_wait_seconds=0.002)
    client = TeacherClient("http://teacher", retries=policy, transport=httpx.MockTransport(handle))
    assert client.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist() == [-2]


def test_a_server_whose_certificate_is_refused_is_not_asked_until_the_deadline() -> None:
    attempts: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        attempts.append(request)
        # httpx and httpcore each raise an error of their own from the one before.
        try:
            raise OSError from ssl.SSLCertVerificationError("self-signed certificate")
        except OSError as error:
            raise httpx.ConnectError("certificate verify failed") from error

    policy = RetryPolicy(wrong_answers=7, first_wait_seconds=0.001, longest_wait_seconds=0.002)
    client = TeacherClient("https://teacher", retries=policy, transport=httpx.MockTransport(handle))
    with pytest.raises(ServerError, match=r"in 7 rounds: .* certificate verify failed"):
        client.info()
    assert len(attempts) == 7


@pytest.mark.parametrize("wrong", [httpx.Response(500), httpx.Response(200, content=b"nonsense")])
def test_a_server_that_answers_wrongly_is_not_asked_until_the_deadline(wrong: httpx.Response) -> None:
    client, requests = client_of_responses(wrong)
    client._http.retries = RetryPolicy(wrong_answers=7, first_wait_seconds=0.001, longest_wait_seconds=0.002)
    with pytest.raises(ServerError, match="no usable answer in 7 rounds"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(requests) == 7


def test_what_is_retried_and_why_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "_LOG_SECONDS", 0.0)
    client, _ = client_of_responses(httpx.Response(503, json={"detail": "the reason"}), one_position())
    client.get_sequence_logprobs([[1, 2]], [1])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "POST /get_sequence_logprobs/" in record.getMessage()
    assert "http://teacher: 503 the reason" in record.getMessage()


def test_short_waits_and_frequent_ones_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = client_of_responses(*[httpx.Response(503)] * 3, one_position())
    monkeypatch.setattr(retry, "_LOG_SECONDS", 1e6)
    client.get_sequence_logprobs([[1, 2]], [1])
    assert not caplog.records


def test_credentials_in_a_url_appear_in_no_error() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(422, json={"detail": "because"}))
    client = TeacherClient("http://user:s3cret@teacher", transport=transport)
    with pytest.raises(ServerError, match=r"^http://teacher: 422 because"):
        client.info()


def test_waiting_until_a_server_is_ready() -> None:
    answers = [httpx.Response(503), httpx.Response(503), httpx.Response(200, json=DESCRIPTION)]
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answers[min(len(requests), len(answers)) - 1]

    client = TeacherClient("http://teacher", retries=FAST_RETRIES, transport=httpx.MockTransport(handle))
    client.wait_until_ready(timeout=seconds(60))
    assert len(requests) >= 3


def test_waiting_for_a_server_ends_with_its_timeout() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(503, headers={"Retry-After": "60"}))
    with pytest.raises(ServerError, match="503"):
        TeacherClient("http://teacher", transport=transport).wait_until_ready(timeout=0.2)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_of_the_environment_stands_before_a_loopback_host(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RawServer(lambda _: b"") as server, RawServer(lambda _: http_response(b"{}", "400 Bad")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with TeacherClient(server.url.replace("127.0.0.1", host)) as near:
            assert near.info() == DESCRIPTION
        assert not proxy.received
        with TeacherClient("http://teacher.example") as far, pytest.raises(ServerError, match="400"):
            far.info()
        assert proxy.received


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_statuses_that_will_not_pass_are_not_retried(status: int) -> None:
    client, seen = client_of_responses(httpx.Response(status, json={"detail": "because"}))
    with pytest.raises(ServerError, match=f"{status} because"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(seen) == 1


def test_a_server_that_asks_to_wait_beyond_the_deadline_is_not_waited_for() -> None:
    client, seen = client_of_responses(httpx.Response(503, headers={"Retry-After": "6000"}))
    client.deadline_seconds = seconds(60)
    with pytest.raises(ServerError, match=r"503 .*\(too late for another try\)"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert len(seen) == 1


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "1"}])
def test_a_wait_does_not_pass_over_the_time_before_the_deadline(headers: dict[str, str]) -> None:
    """A server that is ready by then answers, although the next wait would have been longer."""
    client, seen = client_of_responses(httpx.Response(503, headers=headers), one_position())
    client.deadline_seconds = seconds(5)
    client._http.retries = RetryPolicy(first_wait_seconds=1e6, longest_wait_seconds=1e6)
    client.get_sequence_logprobs([[1, 2]], [1])
    assert len(seen) == 2


def test_proxies_that_cannot_be_used_do_not_stand_before_a_loopback_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    monkeypatch.setenv("NO_PROXY", "localhost,[::1]")
    with RawServer(lambda _: b"") as server, TeacherClient(server.url) as near:
        assert near.info() == DESCRIPTION
    with TeacherClient("http://teacher.example") as far, pytest.raises(ServerError) as refused:
        far.info()
    assert "ALL_PROXY, NO_PROXY) cannot be used: " in str(refused.value)


def test_a_full_queue_is_retried_beyond_the_number_of_attempts() -> None:
    busy = [httpx.Response(429)] * (FAST_ATTEMPTS + 2)
    client, requests = client_of_responses(*busy, one_position())
    client.get_sequence_logprobs([[1, 2]], [1])
    assert len(requests) == len(busy) + 1


def test_retry_after_is_a_lower_bound_of_the_wait() -> None:
    client, _ = client_of_responses(httpx.Response(429, headers={"Retry-After": "1"}), one_position())
    started = time.monotonic()
    client.get_sequence_logprobs([[1, 2]], [1])
    assert time.monotonic() - started >= 1


def test_every_server_is_tried_in_every_round() -> None:
    hosts: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return httpx.Response(503)

    urls = ["http://first", "http://second"]
    transport = httpx.MockTransport(handle)
    client = TeacherClient(urls, protocol="fused-distill", retries=FAST_RETRIES, transport=transport)
    with pytest.raises(ServerError, match="http://second: 503"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert hosts == ["first", "second"] * FAST_ATTEMPTS


def test_a_response_with_a_number_out_of_range_is_retried() -> None:
    # Python's JSON has integers of any size, which no float holds.
    position = '{"2": {"logprob": 1' + "0" * 400 + "}}"
    body = '{"data": [{"id": "m"}], "choices": [{"index": 0, "prompt_logprobs": [null, POSITION]}]}'
    response = httpx.Response(200, text=body.replace("POSITION", position))
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=response.content))
    client = TeacherClient("http://vllm", protocol="openai", retries=FAST_RETRIES, transport=transport)
    with pytest.raises(ServerError, match="OverflowError"):
        client.get_sequence_logprobs([[1, 2]], [1])


def test_closing_a_client_ends_its_pending_call() -> None:
    client, requests = client_of_responses(httpx.Response(503, headers={"Retry-After": "600"}))
    with in_background(1, lambda _: client.get_sequence_logprobs([[1, 2]], [1])) as futures:
        wait_until(lambda: len(requests) == 1)
        client.close()
        with pytest.raises(ServerError, match="closed"):
            futures[0].result()
    assert len(requests) == 1


def test_a_closed_client_sends_no_request() -> None:
    client, requests = client_of_responses(one_position())
    client._http.close()
    with pytest.raises(ServerError, match="closed"):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert not requests
