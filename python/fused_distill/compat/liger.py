"""Liger-Kernel's two fused linear JSD losses, computed by `fused_linear_jsd`. Liger-Kernel is not needed.

    from fused_distill.compat.liger import LigerFusedLinearJSDLoss  # as in liger_kernel.chunked_loss
    from fused_distill.compat.liger import LigerFusedLinearJSD  # as in liger_kernel.transformers

Names, signatures, defaults, results and the meaning of beta are those of liger-kernel 0.8.5
(https://github.com/linkedin/Liger-Kernel): beta 0 is KL(teacher || student), 1 is KL(student || teacher).
Losses are means over tokens whose label is not ignore_index, 0 without any. Differences:

- Extra rows of a padded teacher head are ignored. Liger's chunked loss gives the student a logit of 0 there,
  so that the loss changes if a constant is added to all of the student's logits, and is not 0 for equal
  models. Liger's Triton loss takes the teacher's softmax over all rows and compares the student's rows. All
  three agree where the extra rows have probability 0.
- Logits, softmaxes and accumulated gradients are float32 for every input dtype. Liger's chunked loss keeps
  the input dtype. No weight gradient is computed for a frozen head.
- If the models are nearly equal, Liger's loss is dominated by rounding and can be negative. This one stays
  accurate.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..config import LossConfig, require_count, require_non_negative, require_number
from ..linear_jsd import fused_linear_jsd
from ..validation import IGNORED_LABEL, check_ids, check_per_token


class LigerFusedLinearJSDLoss(nn.Module):
    """Replacement for `liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: weighted cross entropy and JSD.

    loss = weight_hard_loss * cross entropy at temperature 1 + weight_soft_loss * JSD at `temperature`.

    Args:
        weight_hard_loss, weight_soft_loss: >= 0.
        beta: in [0, 1].
        ignore_index: tokens with this label are skipped.
        temperature: > 0.
        compiled, chunk_size: ignored; torch.compile is not used, and the workspace determines the chunk size.
        return_soft_hard_loss: return (loss, soft_loss, hard_loss), the latter two unweighted and without
            gradient. They are computed separately, which about doubles the time.

    Raises:
        ValueError, TypeError: an argument is invalid (the message names it).
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        require_non_negative("weight_hard_loss", weight_hard_loss)
        require_non_negative("weight_soft_loss", weight_soft_loss)
        LossConfig(beta=beta, temperature=temperature)
        require_count("chunk_size", chunk_size)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # (..., Ds)
        student_weight: Tensor,  # (Vs, Ds)
        teacher_input: Tensor,  # (..., Dt)
        teacher_weight: Tensor,  # (Vt, Dt), Vt >= Vs
        true_labels: Tensor,  # (...) int64
        student_bias: Tensor | None = None,  # (Vs,)
        teacher_bias: Tensor | None = None,  # (Vt,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the 0-d loss, or (loss, soft_loss, hard_loss) if return_soft_hard_loss is set."""
        _check_rows(student_weight, teacher_weight)
        _check_labels("true_labels", true_labels, student_input)
        mask = true_labels != self.ignore_index
        models = student_input, student_weight, teacher_input, teacher_weight
        loss_of = partial(
            fused_linear_jsd,
            *models,
            mask=mask,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            beta=self.beta,
            temperature=self.temperature,
            labels=true_labels.masked_fill(~mask, IGNORED_LABEL),
        )
        loss = loss_of(hard_weight=self.weight_hard_loss, soft_weight=self.weight_soft_loss)
        if not self.return_soft_hard_loss:
            return loss
        with torch.no_grad():
            return loss, loss_of(), loss_of(hard_weight=1.0, soft_weight=0.0)


class LigerFusedLinearJSD(nn.Module):
    """Replacement for `liger_kernel.transformers.LigerFusedLinearJSD`: JSD alone, without biases.

    Args:
        jsd_beta: in [0, 1].
        ignore_index: tokens with this label are skipped.
        temperature: > 0.
        accum_dtype: None or torch.float32; weight gradients are always accumulated in float32.

    Raises:
        ValueError, TypeError: an argument is invalid (the message names it).
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= require_number("jsd_beta", jsd_beta) <= 1:
            raise ValueError(f"jsd_beta must be between 0 and 1, got {jsd_beta}")
        LossConfig(temperature=temperature)
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"accum_dtype must be None or torch.float32, got {accum_dtype}")
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,  # (BT, Ds)
        student_weight: Tensor,  # (Vs, Ds)
        teacher_input: Tensor,  # (BT, Dt)
        teacher_weight: Tensor,  # (Vt, Dt), Vt >= Vs
        shift_labels: Tensor | None = None,  # (BT,) int64; None: no token is skipped
    ) -> Tensor:
        """Return the 0-d loss."""
        _check_rows(student_weight, teacher_weight)
        if shift_labels is not None:
            _check_labels("shift_labels", shift_labels, student_input)
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        models = student_input, student_weight, teacher_input, teacher_weight
        return fused_linear_jsd(*models, mask=mask, beta=self.jsd_beta, temperature=self.temperature)


def _check_labels(name: str, labels: Tensor, hidden: Tensor) -> None:
    """Require a label per token."""
    check_ids(name, labels, hidden.device)
    check_per_token(name, labels, hidden.shape[:-1], hidden.device)


def _check_rows(student_weight: Tensor, teacher_weight: Tensor) -> None:
    """Require that the teacher's vocabulary covers the student's."""
    if len(teacher_weight) < len(student_weight):
        shapes = f"{tuple(teacher_weight.shape)} and {tuple(student_weight.shape)}"
        raise ValueError(f"teacher_weight must have at least the rows of student_weight, got {shapes}")
