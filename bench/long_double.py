"""Loss and logit gradient by definition in long double (80 bits on x86), which keeps digits of close models.

The tests compare both with fifty-digit arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def divergence_rows(
    student: Tensor,  # (n, V) logits
    teacher: Tensor,  # (n, V) logits
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return each row's divergence, (n,), and its gradient by the student's logits, (n, V), in float64.

    The options are divergence, beta, alpha, reverse_weight (a number) and entry_clip of `fused_linear_jsd`.
    """
    rows = (_row(s, t, **options) for s, t in zip(student, teacher, strict=True))
    losses, gradients = zip(*rows, strict=True)
    return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients)


def _row(
    student: Tensor, teacher: Tensor, entry_clip: float | None = None, **divergence: Any
) -> tuple[float, Tensor]:
    log_s, log_t = _log_softmax(student), _log_softmax(teacher)
    p_s, terms, slopes = np.exp(log_s), *_terms_and_slopes(log_s, log_t, **divergence)
    if entry_clip is not None:
        slopes = np.where(terms > entry_clip, 0, slopes)
        terms = np.minimum(terms, entry_clip)
    gradient = p_s * (slopes - (p_s * slopes).sum())
    return float(terms.sum()), torch.from_numpy(gradient.astype(np.float64))


def _terms_and_slopes(
    log_s: np.ndarray,
    log_t: np.ndarray,
    divergence: str = "jsd",
    beta: float = 0.5,
    alpha: float = 0.1,
    reverse_weight: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Return each entry's term of the divergence, and its derivative by p_s."""
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    forward = p_t * (log_t - log_s), -p_t / p_s
    reverse = p_s * (log_s - log_t), log_s - log_t + 1
    if divergence == "total_variation":
        return abs(p_t - p_s) / 2, np.sign(p_s - p_t) / 2
    if divergence == "mixed_kl" or (divergence == "jsd" and beta in (0, 1)):
        weight = np.longdouble(reverse_weight if divergence == "mixed_kl" else beta)
        mixed = [(1 - weight) * f + weight * r for f, r in zip(forward, reverse, strict=True)]
        return mixed[0], mixed[1]
    share = np.longdouble(beta if divergence == "jsd" else alpha)
    of_teacher, of_student = {"jsd": (share, 1 - share), "skew_forward_kl": (1, 0)}.get(divergence, (0, 1))
    if divergence == "skew_reverse_kl":
        share = 1 - share
    m = share * p_t + (1 - share) * p_s
    terms = of_teacher * p_t * (log_t - np.log(m)) + of_student * p_s * (log_s - np.log(m))
    by_mixture = (of_teacher * p_t + of_student * p_s) * (1 - share) / m
    return terms, of_student * (log_s - np.log(m) + 1) - by_mixture


def _log_softmax(logits: Tensor) -> np.ndarray:
    z = logits.double().cpu().numpy().astype(np.longdouble)
    z -= z.max()
    return z - np.log(np.exp(z).sum())
