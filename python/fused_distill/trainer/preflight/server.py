"""Checks of a teacher's servers: their limits, and that all of them give the same answer, twice."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ...rollouts.weights import probe_tokens
from ...serving.client.client import TeacherClient
from ...serving.client.identity import mean_difference
from ...serving.client.retry import RetryPolicy, ServerError
from ...serving.protocol.logprobs import TeacherLogprobs
from ...serving.protocol.urls import without_credentials
from ..teachers import HiddenStateTeacher, ServedTeacher
from .finding import Finding, error, ok, one_line, warning
from .teacher_of_run import TeacherOfRun

_SECONDS = 60.0  # a replica that does not answer for so long is taken for absent
_ROUNDING = 1e-3  # nats
_OTHER_WEIGHTS = 0.1  # nats, mean over tokens; half-precision servers with equal weights differ by less


class _Replica(NamedTuple):
    url: str
    answers: list[TeacherLogprobs]  # to the same request
    weights: str | None  # fingerprint, if the server knows it
    problem: str | None  # why it does not answer


def limits(of_run: TeacherOfRun) -> Finding | None:
    """Say which limits a server has; the run's k and lengths were compared with them at its start."""
    teacher = of_run.teacher
    if not isinstance(teacher, ServedTeacher | HiddenStateTeacher):
        return None
    info = teacher.client.info()
    k = "" if of_run.settings.targets == "full" else f"k {of_run.settings.k} and "
    longest = info.get("max_length", info.get("max_model_len"))
    return ok(f"{k}the longest sequence fit the server, which takes {longest} tokens")


def same_answers(of_run: TeacherOfRun) -> Finding | None:
    """Ask every replica of a server for the log-probabilities of the same tokens, each of them twice."""
    settings, teacher = of_run.settings, of_run.teacher
    if settings.url is None:
        return None
    urls = [settings.url] if isinstance(settings.url, str) else settings.url
    k = settings.k if settings.targets == "topk" else 1
    tokens = probe_tokens(teacher.vocab_size)
    seconds = min(_SECONDS, settings.deadline_seconds)
    with ThreadPoolExecutor(len(urls)) as threads:
        replicas = [*threads.map(lambda url: _ask(url, tokens, k, seconds), urls)]
    present = [replica for replica in replicas if replica.problem is None]
    if not present:
        return error(str(replicas[0].problem))
    first = present[0]
    differences: list[float] = []
    for replica in present:
        for answer in replica.answers:
            difference = mean_difference(answer.actual_logprobs, first.answers[0].actual_logprobs)
            known = None not in (first.weights, replica.weights)
            if difference > _OTHER_WEIGHTS or (known and first.weights != replica.weights):
                return error(
                    f"{replica.url} has other weights than {first.url}, or changes its answers: the "
                    f"log-probabilities of {len(tokens)} tokens differ by {difference:.3g} nats on average"
                )
            differences.append(difference)
            differences.append(float(np.abs(_top(answer) - _top(first.answers[0])).max(initial=0)))
    absent = [f"{replica.url} does not answer ({replica.problem})" for replica in replicas if replica.problem]
    if absent:
        return warning(
            f"{'; '.join(absent)}. The run uses the others: start it, or remove it from teacher.url"
        )
    count = "the server gives" if len(present) == 1 else f"all {len(present)} servers give"
    if max(differences) > _ROUNDING:
        return warning(
            f"{count} answers that differ by up to {max(differences):.2g} nats, e.g. because results depend "
            "on the batch: a resumed run will not repeat the same numbers"
        )
    return ok(f"{count} the same answer twice")


def _top(answer: TeacherLogprobs) -> np.ndarray:
    """Return the top log-probabilities, in which infinities are large numbers."""
    return np.nan_to_num(np.asarray(answer.logprobs, np.float64))


def _ask(url: str, tokens: list[int], k: int, seconds: float) -> _Replica:
    name = without_credentials(url)
    client = TeacherClient(
        url,
        token=os.environ.get("FUSED_DISTILL_TOKEN"),
        deadline_seconds=seconds,
        timeout_seconds=seconds,
        retries=RetryPolicy(attempts=2, wrong_answers=2),
    )
    with client:
        try:
            weights = client.info().get("weights_fingerprint")
            answers = [client.get_sequence_logprobs([tokens], [1], top_logprobs=k) for _ in range(2)]
        except (ServerError, ValueError) as problem:
            return _Replica(name, [], None, one_line(problem))
    return _Replica(name, answers, weights, None)
