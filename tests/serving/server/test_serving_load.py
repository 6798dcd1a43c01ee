"""Many clients at once: every answer belongs to its request, and memory stays flat."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.server.transformers_engine import TransformersEngine
from serving_cases import (
    VOCAB,
    direct_logprobs,
    random_sequences,
    scored_tokens,
    serving,
)
from worker import status_bytes

CLIENTS, REQUESTS = 64, 2000


N_SEQUENCES = 150  # different sequences, scored beforehand one by one


@pytest.mark.slow
def test_2000_requests_of_64_clients_get_their_own_answers(model: Any) -> None:
    sequences, prompts = random_sequences(N_SEQUENCES, seed=3)
    temperatures = (1.0, 0.7)
    logprobs = {
        t: [direct_logprobs(model, [s], [p], t) for s, p in zip(sequences, prompts, strict=True)]
        for t in temperatures
    }
    generator = np.random.default_rng(4)
    requests = [
        (
            generator.integers(0, N_SEQUENCES, generator.integers(1, 6)).tolist(),
            int(generator.choice([0, 1, 5])),
            float(generator.choice(temperatures)),
        )
        for _ in range(REQUESTS)
    ]
    memory: list[int] = []

    with serving(TransformersEngine(model)) as served:

        def client_of(first: int) -> Counter[str]:
            seen: Counter[str] = Counter()
            with TeacherClient(served.url, concurrency=1) as client:
                for index in range(first, REQUESTS, CLIENTS):
                    indices, k, temperature = requests[index]
                    batch = [sequences[i] for i in indices], [prompts[i] for i in indices]
                    answer = client.get_sequence_logprobs(*batch, top_logprobs=k, temperature=temperature)
                    want = torch.cat([torch.empty(0, VOCAB), *(logprobs[temperature][i] for i in indices)])
                    actual = want.gather(-1, scored_tokens(*batch).unsqueeze(-1)).squeeze(-1)
                    right = np.allclose(answer.actual_logprobs, actual.numpy(), atol=2e-5)
                    right &= np.allclose(answer.logprobs, want.topk(k).values.numpy(), atol=2e-5)
                    seen["right" if right else "wrong"] += 1
                    if first == 0:
                        memory.append(status_bytes("VmRSS"))
            return seen

        with ThreadPoolExecutor(CLIENTS) as pool:
            total = sum(pool.map(client_of, range(CLIENTS)), Counter())
    assert total == {"right": REQUESTS}
    # Half of the requests of one client into the run against the end.
    assert memory[-1] - memory[len(memory) // 2] < 50 << 20
