"""Start and end of the teacher server as a command: all that can be checked comes before the model."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import uvicorn

from .app import check_token, create_app
from .batching import BatchLimits
from .connections import ConnectionLimits
from .engine import TeacherEngine
from .validation import ServerLimits

TOKEN_VARIABLE = "FUSED_DISTILL_TOKEN"


def serve(options: argparse.Namespace) -> None:
    """Run the server that the options of `fused-distill serve-teacher` describe until a signal ends it.

    Raises:
        ValueError: an option is invalid, or the model cannot be served.
        OSError: the address cannot be bound, or the model cannot be read.
        ImportError: the engine's package is missing.
    """
    limits = ServerLimits(request_seconds=options.request_seconds, numbers=options.answer_numbers)
    batch_limits = BatchLimits(options.max_waiting, options.batch_tokens)
    token = os.environ.get(TOKEN_VARIABLE)
    check_token(token)
    with bind(options.host, options.port) as listener:
        if token is None and not options.allow_no_token:
            _require_loopback(listener)
        load = engine_loader(options)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again after its shutdown
        end_on_hangup()
        engine = load()
        app = create_app(engine, token=token, hosts=(options.host,), limits=limits, batch_limits=batch_limits)
        config = uvicorn.Config(
            app,
            access_log=options.access_log,
            timeout_graceful_shutdown=int(options.request_seconds) + 10,
            **ConnectionLimits().uvicorn_options(),
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the summary says what its log would
        lines = summary(engine, limits, batch_limits, token is not None, listener.getsockname())
        # Connections inherit it, so that those of a server that has stopped do not hold the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _Server(config, engine, lines).run([listener])


def end_on_hangup() -> None:
    """Let the end of the terminal's session end the server as SIGTERM does, except under nohup."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def bind(host: str, port: int) -> socket.socket:
    """Return a TCP socket that is bound but does not listen yet. No other can be bound to its address.

    Raises:
        OSError: the address does not exist, is in use or may not be used.
    """
    try:
        # IPv4 first, e.g. for localhost.
        addresses = sorted(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            # Otherwise a second server could be bound until this one listens.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot bind {host} port {port}: {error.strerror or error}") from error
    return listener


def _require_loopback(listener: socket.socket) -> None:
    address = listener.getsockname()[0]
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise ValueError(
            f"{TOKEN_VARIABLE} must be set to serve on {address}, because everyone who reaches this address "
            "could query the teacher and download its LM head; --allow-no-token serves without a token"
        )


def engine_loader(options: argparse.Namespace) -> Callable[[], TeacherEngine]:
    """Check the options of the engine and return a function that loads it."""
    if options.engine == "vllm":
        if options.device != "auto":
            raise ValueError(f"--device must be auto with --engine vllm, got {options.device!r}")
        from .vllm_engine import VllmEngine

        settings = options.engine_options
        VllmEngine.check_options(settings)
        return lambda: VllmEngine.load(options.model, options.dtype, options.max_length, settings)
    if options.engine_options:
        raise ValueError("--engine-options must not be given with --engine transformers")
    device = available_device(options.device)
    from .transformers_engine import TransformersEngine

    return lambda: TransformersEngine.load(
        options.model, device, options.dtype, options.max_length, not options.no_hidden_states
    )


def available_device(name: str) -> str:
    """Return a device that torch can use here; "auto" is a GPU, or the CPU if there is none.

    Raises:
        ValueError: the name is no device, or there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto or a device such as cpu or cuda:1, got {name!r}") from None
    if device.type == "cpu":
        return "cpu"
    module: Any = getattr(torch, device.type, None)
    count: int = module.device_count() if hasattr(module, "device_count") and module.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name} is not available: torch finds {count} devices of this type")
    return name


def summary(
    engine: TeacherEngine, limits: ServerLimits, batches: BatchLimits, has_token: bool, address: Any
) -> str:
    """Return what an operator needs to know about a server that has started, in a few lines."""
    info, (host, port, *_) = engine.info, address
    host = f"[{host}]" if ":" in host else host
    token = f"clients must send {TOKEN_VARIABLE}" if has_token else "none, every client is answered"
    top = min(limits.top_logprobs, info.vocab_size)
    rows = {
        "model": f"{info.model}, {engine.dtype} on {engine.device}, {info.vocab_size} tokens",
        "offers": ", ".join(("top log-probabilities", *info.capabilities)),
        "limits": f"{info.max_length} tokens per sequence, top {top} tokens per position, "
        f"{limits.request_seconds:g} s per request, {batches.batch_tokens} tokens per forward pass, "
        f"{batches.max_waiting} waiting requests",
        "token": token,
        "URL": f"http://{host}:{port}",
    }
    return "\n".join(f"{name:<7}{text}" for name, text in rows.items())


class _Server(uvicorn.Server):
    """Print a summary when the server accepts requests; end at once on a second Ctrl-C."""

    def __init__(self, config: uvicorn.Config, engine: TeacherEngine, summary: str):
        super().__init__(config)
        self.engine, self.summary = engine, summary

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.summary, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if sig == signal.SIGINT and self.should_exit:
            # The engine's thread may be in a forward pass, which nothing interrupts.
            closing = threading.Thread(target=self.engine.close, daemon=True)
            closing.start()
            closing.join(1.0)
            os._exit(130)
        super().handle_exit(sig, frame)
