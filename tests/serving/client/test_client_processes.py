"""A client in forked processes and in processes that get it pickled."""

from __future__ import annotations

import pickle
import subprocess
import sys

from fused_distill.serving.client.client import TeacherClient
from limits import seconds
from serving_cases import FakeEngine, serving

# In a process of its own: a fork of pytest's threads is not what this is about.
FORK = """
import os, sys, threading
from fused_distill.serving.client.client import TeacherClient

client = TeacherClient(sys.argv[1], concurrency=2)

def ask(token):
    answer = client.get_sequence_logprobs([[1, token], [1, token]], [1, 1])
    return answer.actual_logprobs.tolist() == [-token, -token]

assert ask(2)  # the parent has connections
children = []
for token in range(3, 6):
    child = os.fork()
    if not child:
        os._exit(0 if all(ask(token) for _ in range(5)) else 1)
    children.append(child)
assert all(ask(6) for _ in range(5))  # at the same time as its children
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert ask(7)  # the children have left the parent's connections open
"""

# The lock of the client is held by another thread at the moment of the fork.
FORK_WITH_A_HELD_LOCK = """
import os, sys
from fused_distill.serving.client.client import TeacherClient

client = TeacherClient(sys.argv[1], concurrency=1)
client.info()
session = client._http._session
session._slots.acquire(), session._lock.acquire(), client._http._lock.acquire()
child = os.fork()
if not child:
    os._exit(0 if client.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist() == [-2] else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def run_script(script: str, url: str) -> None:
    process = subprocess.run([sys.executable, "-c", script, url], timeout=seconds(120), capture_output=True)
    assert process.returncode == 0, process.stderr.decode()[-2000:]


def test_a_client_used_before_a_fork_answers_in_the_children_and_in_the_parent() -> None:
    with serving(FakeEngine()) as served:
        run_script(FORK, served.url)


def test_a_fork_amid_a_call_of_another_thread_leaves_the_child_free() -> None:
    with serving(FakeEngine()) as served:
        run_script(FORK_WITH_A_HELD_LOCK, served.url)


def test_a_used_client_can_be_pickled() -> None:
    with serving(FakeEngine(), token="secret") as served, TeacherClient(served.url, token="secret") as client:
        client.info()
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.get_sequence_logprobs([[1, 2]], [1]).actual_logprobs.tolist() == [-2]
        assert client.get_sequence_logprobs([[1, 3]], [1]).actual_logprobs.tolist() == [-3]
