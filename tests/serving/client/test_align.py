"""Placement of answers at the hidden states of a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd
from fused_distill.huggingface.lm_head import LMHeadParams, lm_head_of
from fused_distill.serving.client.align import align, align_hidden_states
from fused_distill.serving.client.client import TeacherClient
from fused_distill.serving.protocol.logprobs import decode_binary
from serving_cases import (
    VOCAB,
    direct_logprobs,
    one_position,
    random_sequences,
)


@pytest.mark.parametrize("layout", ["left and right padded", "packed"])
def test_aligned_answers_give_the_loss_of_a_local_teacher(url: str, model: Any, layout: str) -> None:
    sequences, prompts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]], [3, 1, 2]
    with TeacherClient(url) as client:
        answer = client.get_sequence_logprobs(sequences, prompts, top_logprobs=6)
    if layout == "packed":  # one row, sequences one after the other
        rows = [[(i, t) for i, s in enumerate(sequences) for t in range(len(s))]]
    else:  # prompts end at column 3
        rows = [
            [None] * (3 - p) + [(i, t) for t in range(len(s))] + [None] * (5 - (3 - p) - len(s))
            for i, (s, p) in enumerate(zip(sequences, prompts, strict=True))
        ]
    # True where the next token of the same sequence belongs to its completion.
    mask = torch.tensor(
        [[c is not None and prompts[c[0]] <= c[1] + 1 < len(sequences[c[0]]) for c in row] for row in rows]
    )
    aligned = align(answer, mask)
    hidden = torch.randn(*mask.shape, 8)
    head = torch.randn(VOCAB, 8)
    want = direct_logprobs(model, sequences, prompts).topk(6)
    got = fused_linear_topk_jsd(hidden, head, aligned.logprobs, aligned.ids, mask=mask)
    plain = fused_linear_topk_jsd(hidden[mask], head, want.values, want.indices)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)
    assert (aligned.logprobs[~mask] == -torch.inf).all()


def test_a_mask_that_does_not_fit_the_answer_is_named() -> None:
    answer = decode_binary(one_position().content)
    with pytest.raises(ValueError, match="mask must be True at the answer's 1 positions, got 2"):
        align(answer, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        align(answer, torch.ones(1))


def test_hidden_states_and_the_head_give_the_loss_of_a_local_teacher(
    url: str, model: Any, tmp_path: Path
) -> None:
    sequences, prompts = random_sequences(7, seed=5)
    states = [torch.empty(0, 16)]
    for tokens, prompt_length in zip(sequences, prompts, strict=True):
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=torch.tensor([tokens])).last_hidden_state[0, :-1]
        states.append(hidden[max(prompt_length, 1) - 1 :])
    local = torch.cat(states)
    student, student_head = torch.randn(len(local), 8), torch.randn(VOCAB, 8)
    with TeacherClient(url, request_tokens=30) as client:
        head = client.head(tmp_path)
        answer = client.get_hidden_states(sequences, prompts, dtype="float32")
    teacher = align_hidden_states(answer, torch.ones(len(local), dtype=torch.bool))
    local_head = lm_head_of(model)

    def loss(hidden: torch.Tensor, head: LMHeadParams) -> torch.Tensor:
        options: Any = {"teacher_softcap": head.softcap, "teacher_logit_scale": head.logit_scale}
        return fused_linear_jsd(student, student_head, hidden, head.weight.detach(), **options)

    torch.testing.assert_close(loss(teacher, head), loss(local, local_head), rtol=1e-5, atol=0)
