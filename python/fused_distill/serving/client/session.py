"""The connections of one process, and calls over them that end at once when they are given up."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakSet

import httpx

T = TypeVar("T")

_SIGNAL_SECONDS = 0.5  # a signal that just misses the beginning of a wait is handled after so long


class ServerError(ConnectionError):
    """No server gave a usable answer; the message holds the last server's response or error."""

    retry_after: float | None = None  # seconds before another round over all servers; None: it is no use


# In the threads of `Session.run`: the event after which they must not try again.
_stop: ContextVar[threading.Event] = ContextVar("_stop")


class Session:
    """An httpx client whose waiting threads can be woken.

    httpx cannot interrupt a thread that waits for a server. `end` therefore shuts the sockets down, and `run`
    waits for its threads in a way that `end` and Ctrl-C interrupt even while a thread still connects.

    Args:
        http: the client. It is closed with the session.
        concurrency: calls that run at once, of all `run` together.
    """

    def __init__(self, http: httpx.Client, concurrency: int):
        self.http = http
        self.concurrency = concurrency
        self._slots = threading.Semaphore(concurrency)
        self._ended = threading.Event()
        self._lock = threading.Lock()  # of the two sets
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._wake: set[Callable[[], None]] = set()  # one function for each `run` that waits

    @property
    def stop(self) -> threading.Event:
        """Event after which this thread must not try again: its `run` was given up or the session ended."""
        return _stop.get(self._ended)

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run the calls in threads and return their results in order.

        After an error the other calls do not try again. Ctrl-C also drops all connections, and what other
        threads send on them is tried again.

        Raises:
            ServerError: the session ended.
        """
        pending: queue.SimpleQueue[tuple[int, Callable[[], T]]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, T] | BaseException] = queue.SimpleQueue()
        stop = threading.Event()
        for item in enumerate(calls):
            pending.put(item)

        def work() -> None:
            _stop.set(stop)
            with suppress(queue.Empty):
                while True:
                    index, call = pending.get_nowait()
                    with self._slots:
                        if stop.is_set():
                            return
                        try:
                            done.put((index, call()))
                        except BaseException as error:
                            done.put(error)

        def wake() -> None:
            stop.set()
            done.put(ServerError("the client was closed"))

        with self._lock:
            self._wake.add(wake)
            if self._ended.is_set():
                wake()
        results: dict[int, T] = {}
        try:
            for _ in range(min(len(calls), self.concurrency)):
                threading.Thread(target=work, name="fused-distill-client", daemon=True).start()
            while len(results) < len(calls):
                try:
                    outcome = done.get(timeout=_SIGNAL_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(outcome, BaseException):
                    raise outcome
                results[outcome[0]] = outcome[1]
        except BaseException as error:
            stop.set()
            if not isinstance(error, Exception):  # Ctrl-C
                self.drop_connections()
            raise
        finally:
            with self._lock:
                self._wake.discard(wake)
        return [results[index] for index in range(len(calls))]

    def end(self) -> None:
        """Close the connections and wake every thread that waits for one."""
        with self._lock:
            self._ended.set()
            for wake in self._wake:
                wake()
        self.drop_connections()
        self.http.close()

    def drop_connections(self) -> None:
        """Break every connection, so that a thread that waits for a server gets an error."""
        with self._lock:
            for connection in self._sockets:
                _shut_down(connection)

    def abandon(self) -> None:
        """Close a parent process's connections in its fork, without a message to the servers."""
        for connection in list(self._sockets):
            connection.close()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Learn of the sockets that httpx opens; see its request extension "trace"."""
        if event.endswith((".connect_tcp.complete", ".connect_unix_socket.complete", ".start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connection)
                if self._ended.is_set():
                    _shut_down(connection)


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # it was closed, or the server has left
        # Not SSLSocket.shutdown, which would take the TLS state from under the thread that reads.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
