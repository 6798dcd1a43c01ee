"""Loss and logit gradient by definition in long double (80 bits on x86), which keeps digits of close models.

The tests compare both with fifty-digit arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def jsd_rows(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return each row's divergence, (n,), and its gradient by the student's logits, (n, V), in float64.

    Args:
        student: (n, V) the student's logits.
        teacher: (n, V) the teacher's logits.
        beta: in [0, 1], as for `fused_linear_jsd`.
    """
    losses, gradients = zip(*(_row(s, t, beta) for s, t in zip(student, teacher, strict=True)), strict=True)
    return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients)


def _row(student: Tensor, teacher: Tensor, beta: float) -> tuple[float, Tensor]:
    log_s, log_t = _log_softmax(student), _log_softmax(teacher)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    if beta == 0:
        return float(_kl(log_t, log_s)), _tensor(p_s - p_t)
    log_m = log_t if beta == 1 else np.log(beta * p_t + (1 - beta) * p_s)
    kl_student = _kl(log_s, log_m)
    factor = 1 if beta == 1 else 1 - beta
    loss = factor * kl_student + (0 if beta == 1 else beta * _kl(log_t, log_m))
    return float(loss), _tensor(factor * p_s * (log_s - log_m - kl_student))


def _log_softmax(logits: Tensor) -> np.ndarray:
    z = logits.double().cpu().numpy().astype(np.longdouble)
    z -= z.max()
    return z - np.log(np.exp(z).sum())


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.longdouble:
    return (np.exp(log_p) * (log_p - log_q)).sum()


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))
