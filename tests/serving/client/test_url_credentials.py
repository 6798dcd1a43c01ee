"""A user name and a password in a server's address: sent to that server, shown nowhere."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from fused_distill.rollouts.vllm import VllmRollouts
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.client.retry import RetryPolicy, ServerError
from fused_distill.serving.protocol.urls import split_credentials, without_credentials

SECRET = "http://user:pa%3Ass@teacher:81/v"


def test_credentials_are_split_from_the_address() -> None:
    assert split_credentials(SECRET) == ("http://teacher:81/v", ("user", "pa:ss"))
    assert split_credentials("http://[::1]:8000") == ("http://[::1]:8000", None)
    assert without_credentials("http://token@x") == "http://x"


def test_credentials_are_sent_and_appear_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    requests: list[httpx.Request] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(403, text="no")

    with (
        TeacherClient([SECRET, "http://other"], transport=httpx.MockTransport(refuse)) as client,
        pytest.raises(ServerError) as failed,
    ):
        client.get_sequence_logprobs([[1, 2]], [1])
    assert requests[0].headers["authorization"] == httpx.BasicAuth("user", "pa:ss")._auth_header
    for text in (str(failed.value), caplog.text):
        assert "teacher:81" in text
        assert "user" not in text
        assert "pa:ss" not in text
        assert "pa%3Ass" not in text


def test_credentials_go_to_their_own_server_only() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        assert (request.url.host == "teacher") == ("authorization" in request.headers)
        return httpx.Response(500)

    once: dict[str, Any] = {"retries": RetryPolicy(attempts=1), "transport": httpx.MockTransport(fail)}
    with VllmRollouts(SECRET, **once) as rollouts, TeacherClient([SECRET, "http://other"], **once) as teacher:
        with pytest.raises(ServerError, match="http://teacher:81"):
            rollouts._http.send("GET", "/v1/models", 1e12, lambda r: r)
        with pytest.raises(ServerError, match="http://other"):
            teacher.info()


def test_an_address_that_is_refused_is_shown_without_credentials() -> None:
    with pytest.raises(ValueError, match=r"got 'ftp://teacher'"):
        TeacherClient("ftp://user:pass@teacher")


def test_servers_behind_one_gateway_get_their_own_credentials() -> None:
    sent: dict[str, str | None] = {}

    def fail(request: httpx.Request) -> httpx.Response:
        sent[request.url.path.split("/")[1]] = request.headers.get("authorization")
        return httpx.Response(500)

    urls = ["https://a:1@gateway/first", "https://b:2@gateway/first-but-longer", "https://gateway/third"]
    once: dict[str, Any] = {"retries": RetryPolicy(attempts=1), "transport": httpx.MockTransport(fail)}
    with TeacherClient(urls, **once) as teacher, pytest.raises(ServerError):
        teacher.info()
    assert sent == {
        "first": httpx.BasicAuth("a", "1")._auth_header,
        "first-but-longer": httpx.BasicAuth("b", "2")._auth_header,
        "third": None,
    }


@pytest.mark.parametrize("character", ["#", "/", "?", "[", "]", "@#"])
def test_a_password_that_must_be_escaped_is_not_shown(character: str) -> None:
    with pytest.raises(ValueError, match=r"^url must .*write #, /, \?, @ and \[ as %23") as refused:
        TeacherClient(f"https://user:se{character}cret@teacher")
    assert "'se" not in str(refused.value)
    assert "cret" not in str(refused.value)
