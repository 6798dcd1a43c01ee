"""Garbage over real sockets: every invalid request gets a 4xx and the server lives."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import httpx
from fault_cases import (
    FaultCounts,
    raw,
    read_to_end,
    responses,
)
from fused_distill.serving.protocol.request import SCORE_PATH, scored_positions
from limits import seconds
from serving_cases import (
    FULL_BODY,
    FakeEngine,
    from_json,
    serving,
)

INVALID_VALUES: list[Any] = [
    "",
    "x",
    [],
    {},
    [None],
    [[None]],
    [[[]]],
    -1,
    2**31,
    10**4000,
    1e300,
    True,
    [1.5],
    {"a": 1},
]


def garbage(generator: random.Random, i: int) -> bytes:
    """A body that is no request: bytes, a beginning, other JSON, a field that does not fit."""
    valid = json.dumps(FULL_BODY).encode()
    kind = i % 4
    if kind == 0:
        return generator.randbytes(generator.randrange(300))
    if kind == 1:
        return valid[: generator.randrange(len(valid))]
    if kind == 2:
        return json.dumps(generator.choice(INVALID_VALUES)).encode()
    field = generator.choice([*FULL_BODY, "score_ids", "response_format", "dtype", "else"])
    return json.dumps({**FULL_BODY, field: generator.choice(INVALID_VALUES)}).encode()


def test_garbage_bodies_get_a_4xx_and_the_server_lives(row: FaultCounts) -> None:
    generator, engine = random.Random(0), FakeEngine()
    bodies = [garbage(generator, i) for i in range(1200)]
    statuses: Counter[int] = Counter()
    with serving(engine) as served, httpx.Client(timeout=seconds(60)) as http:
        for body in bodies:
            response = http.post(served.url + SCORE_PATH, content=body)
            statuses[response.status_code] += 1
        assert not engine.batches
        row.right = int(http.post(served.url + SCORE_PATH, json=FULL_BODY).status_code == 200)
    row.asked, row.refused = len(bodies) + 1, statuses[422]
    assert row == FaultCounts(row.fault, 1201, 1, 1200)


def test_bodies_with_changed_bytes_are_understood_or_get_a_4xx(row: FaultCounts) -> None:
    generator = random.Random(1)
    with serving(FakeEngine()) as served, httpx.Client(timeout=seconds(60)) as http:
        for _ in range(600):
            body = bytearray(json.dumps(FULL_BODY).encode())
            for _ in range(generator.randint(1, 3)):
                body[generator.randrange(len(body))] = generator.choice(b'0123456789,.[]{}":-e ntx\xff')
            response = http.post(served.url + SCORE_PATH, content=bytes(body))
            row.asked += 1
            row.refused += response.status_code == 422
            if response.status_code == 200:
                lengths = from_json(response.json()).lengths.tolist()
                request = json.loads(body)
                pairs = zip(request["sequences"], request["prompt_lengths"], strict=True)
                row.right += lengths == [scored_positions(len(s), p) for s, p in pairs]
    assert row.right + row.refused == row.asked == 600
    assert row.right > 0


def test_bytes_that_are_not_http_get_a_4xx_and_the_server_lives(row: FaultCounts) -> None:
    generator = random.Random(2)
    with serving(FakeEngine()) as served:
        for _ in range(200):
            with raw(served) as connection:
                connection.sendall(b"\0" + generator.randbytes(generator.randrange(1, 300)) + b"\r\n\r\n")
                answers = responses(read_to_end(connection))
            row.asked += 1
            row.refused += [status for status, _ in answers] == [400]
        assert httpx.get(f"{served.url}/health").status_code == 200
    assert row == FaultCounts(row.fault, 200, 0, 200)
