"""Checks of the models: their LM heads, and the loss of a few tokens."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

import pyarrow.compute
import torch

from ...huggingface.fingerprint import checkpoint_fingerprint, local_checkpoint
from ...huggingface.lm_head import LMHeadParams, checked_head
from ..data import Batch, Sample
from ..targets import Teacher
from ..teachers import HiddenStateTeacher, LocalTeacher, ServedTeacher
from .finding import Finding, error, ok, warning
from .teacher_of_run import TeacherOfRun

if TYPE_CHECKING:
    from ..loop import Trainer

pc: Any = pyarrow.compute
_PROBE_TOKENS = 8  # of a prompt and of a completion
# Nats per token. Equal weights in bfloat16 and float32, or behind a server, give less.
_EQUAL = 0.02
# Nats, mean over tokens, between a server's log-probabilities and those of its hidden states.
_ROUNDING = 0.1


def student_head(run: Trainer) -> Finding:
    """Compare the student's LM head with its own logits; the comparison at its loading is taken if known."""
    head, check = checked_head(run.model, run.wrapped if run.sharded else None)
    return _told_head(head, check is not None)


def teacher_head(teacher: Teacher) -> Finding | None:
    """Compare a teacher's LM head with its own logits, a served one with the server's log-probabilities."""
    if isinstance(teacher, LocalTeacher):
        head, check = checked_head(teacher.model)
        return _told_head(head, check is not None)
    if not isinstance(teacher, HiddenStateTeacher):
        return None
    tokens = [[i % teacher.vocab_size for i in range(2, 2 + _PROBE_TOKENS)]]
    served = teacher.client.get_sequence_logprobs(tokens, [1]).actual_logprobs
    states = teacher.client.get_hidden_states(tokens, [1]).states.to(teacher.head.weight)
    logprobs = teacher.head.logits(states).float().log_softmax(-1).cpu()
    own = logprobs.gather(-1, torch.tensor(tokens[0][1:])[:, None]).squeeze(-1)
    difference = float((own - torch.as_tensor(served)).abs().mean())
    if not difference <= _ROUNDING:
        return error(
            f"its log-probabilities of the server's hidden states differ by {difference:.3g} nats from the "
            "server's own: the server's model does more after its LM head than scale and softcap"
        )
    return ok(f"gives the server's log-probabilities from its hidden states, {difference:.1g} nats off")


def check_loss(run: Trainer, teacher: TeacherOfRun) -> Finding:
    """Check that the loss of a few tokens is finite, and near 0 if the teacher has the student's weights.

    All processes call this together.
    """
    sample = next(filter(teacher.scores, map(_sample, run.samples)), None)
    if sample is None:
        return warning("no training sample has this teacher: remove it, or check the column of the data")
    if teacher.settings.stored is None:
        prompt = sample.prompt[:_PROBE_TOKENS]
        completion = (sample.completion or prompt)[:_PROBE_TOKENS]
        # Two tokens at least.
        completion = (completion * 2)[: max(2, len(completion))]
        # After the student's prompt, because an equal teacher gives another loss after one of its own.
        sample = sample._replace(prompt=prompt, completion=completion, teacher_prompt=None)
    batch = Batch.collate([sample], run.device)
    with torch.no_grad():
        loss = float(run.loss(batch, float(len(batch.valid)))[0])
    text = f"{loss:.3g} nats per token before training, on a few tokens"
    if not isfinite(loss):
        return error(run.diagnose([batch]))
    if run.step or not _same_weights(run.config.student, teacher):
        return ok(text)
    if abs(loss) > _EQUAL:
        return error(f"{text}, but the teacher has the student's weights, so it should be 0")
    if _has_own_prompts(run, teacher):
        return ok(f"{text}: the teacher has the student's weights, and prompts of its own")
    return warning(
        f"{text}: the teacher has the student's weights, so there is nothing to learn from it "
        "without prompts of its own (column teacher_prompt)"
    )


def _has_own_prompts(run: Trainer, teacher: TeacherOfRun) -> bool:
    """Return whether a row of the data has a prompt of its own for the teacher."""
    table: Any = run.samples.data
    own = pc.is_valid(table.column("teacher_prompt"))
    return bool(pc.any(pc.and_(own, pc.equal(table.column("teacher"), teacher.name))).as_py())


def _sample(row: Any) -> Sample:
    return Sample(**row)


def _same_weights(student: str, of_run: TeacherOfRun) -> bool:
    """Return whether a teacher has the weights of the student's checkpoint, False if unknown."""
    folder = local_checkpoint(student)
    own = None if folder is None else checkpoint_fingerprint(folder)
    settings, teacher = of_run.settings, of_run.teacher
    if settings.is_self:
        return True
    if isinstance(teacher, HiddenStateTeacher | ServedTeacher):
        return own is not None and own == teacher.client.info().get("weights_fingerprint")
    if settings.model is None or folder is None:
        return False
    other = local_checkpoint(settings.model)
    return other is not None and (
        other.resolve() == folder.resolve() or (own is not None and own == checkpoint_fingerprint(other))
    )


def _told_head(head: LMHeadParams, compared: bool) -> Finding:
    parts: list[Any] = [f"{len(head.weight):,} tokens", f"logit scale {head.logit_scale:g}"]
    parts += [] if head.softcap is None else [f"softcap {head.softcap:g}"]
    parts += [] if head.bias is None else ["bias"]
    told = ", ".join(parts)
    if compared:
        return ok(f"reproduces the model's logits ({told})")
    return warning(
        f"was not compared with the model's logits, because its weights are sharded ({told}, of its config): "
        "run `fused-distill check` in one process"
    )
