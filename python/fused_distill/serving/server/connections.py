"""Limits of connections, which uvicorn lacks: their number, and how long they may keep the server waiting."""

from __future__ import annotations

import asyncio
import resource
from dataclasses import asdict, dataclass
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_BACKLOG = 128  # asyncio accepts so many connections before it looks at any


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of one server.

    A connection keeps the server waiting until the headers of its next request are complete, or until the
    next bytes of a body arrive. When there are too many, the one that has done so longest is closed.
    """

    connections: int = 512  # and at most half of the files that the process may open
    header_seconds: float = 30.0  # from the first to the last byte of the headers, or without any byte
    body_seconds: float = 60.0  # between two parts of a body
    read_seconds: float = 300.0  # for a client to read the bytes of a response that are ready
    stopping_seconds: float = 5.0  # as body_seconds, once the server shuts down

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def uvicorn_options(self) -> dict[str, Any]:
        """Return the arguments of uvicorn.Config that apply these limits."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most, backlog = self.connections, _BACKLOG
        if files != resource.RLIM_INFINITY:
            most, backlog = max(1, min(most, files // 2)), max(1, min(backlog, files // 4))
        protocol = type("Protocol", (LimitedProtocol,), {"limits": self, "most_connections": most})
        return {"http": protocol, "backlog": backlog}


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with time limits. `ConnectionLimits.uvicorn_options` makes its subclasses."""

    limits: ConnectionLimits
    most_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Close one connection if this is one too many."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._stopping = False
        self._phase: Any = None
        self._watch()
        others = cast("set[LimitedProtocol]", self.connections)
        there = [connection for connection in others if not connection.transport.is_closing()]
        if len(there) > self.most_connections:
            waiting = [connection for connection in there if connection.keeps_waiting]
            min(waiting, key=lambda connection: connection.waiting_since).transport.abort()

    @property
    def keeps_waiting(self) -> bool:
        """True if the client has to send something before the server can go on."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def data_received(self, data: bytes) -> None:
        """Restart the time limit."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        """Wait only shortly for the rest of a body."""
        self._stopping = True
        super().shutdown()
        self._watch()

    def pause_writing(self) -> None:
        """Start the time in which the client must read."""
        super().pause_writing()
        self._reading = self.loop.call_later(self.limits.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that time."""
        super().resume_writing()
        _cancel(self._reading)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all times."""
        super().connection_lost(exc)
        _cancel(self._timer)
        _cancel(self._reading)

    def _watch(self) -> None:
        phase = self.conn.their_state
        cycle = cast("RequestResponseCycle | None", self.cycle)
        discarded = cycle is not None and cycle.response_complete  # bytes of a refused body
        if phase is self._phase and not self._stopping and (phase is h11.IDLE or discarded):
            return  # single bytes do not prolong the time for the headers
        _cancel(self._timer)
        self._phase, self.waiting_since = phase, self.loop.time()
        if self.keeps_waiting and not self.transport.is_closing():
            limits = self.limits
            seconds = limits.header_seconds if phase is h11.IDLE else limits.body_seconds
            if self._stopping:
                seconds = min(seconds, limits.stopping_seconds)
            self._timer = self.loop.call_later(seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
