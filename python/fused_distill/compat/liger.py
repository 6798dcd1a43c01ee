"""Liger-Kernel's two fused linear JSD losses on `fused_linear_jsd`. Nothing of Liger-Kernel is needed.

    from fused_distill.compat.liger import LigerFusedLinearJSDLoss  # of liger_kernel.chunked_loss
    from fused_distill.compat.liger import LigerFusedLinearJSD  # of liger_kernel.transformers

Names, signatures, defaults and results are those of liger-kernel 0.8.5
(https://github.com/linkedin/Liger-Kernel), and so is the meaning of beta: 0 is KL(teacher || student), 1 is
KL(student || teacher). Both average over the tokens whose label is not ignore_index. What differs:

- Surplus rows of a padded teacher head are left out on both sides. Liger's chunked loss gives the student a
  logit of 0 there, a probability that no model has: the loss then depends on a constant added to all of the
  student's logits, and is not 0 for equal models. Liger's Triton loss takes the teacher's softmax over all
  rows and compares the student's. Where the surplus rows have no probability all of them agree.
- Logits, softmaxes and accumulated gradients are float32 whatever the inputs; Liger's chunked loss keeps the
  inputs' dtype. A frozen head costs no weight gradient.
- With both models nearly alike Liger's loss is rounding noise, at times negative; this one keeps its digits.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..config import LossConfig, require_count, require_non_negative
from ..linear_jsd import fused_linear_jsd
from ..validation import IGNORED_LABEL


class LigerFusedLinearJSDLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: cross entropy and JSD, weighted.

    loss = weight_hard_loss * cross entropy at temperature 1 + weight_soft_loss * JSD at `temperature`, both
    the mean over the tokens whose label is not ignore_index (0 if there is none).

    Args:
        weight_hard_loss: >= 0.
        weight_soft_loss: >= 0.
        beta: in [0, 1].
        ignore_index: tokens of this label count for neither loss.
        temperature: > 0.
        compiled: taken for compatibility; the backend compiles where it pays.
        chunk_size: taken for compatibility; chunks follow from `fused_linear_jsd`'s default workspace, which
            bounds bytes instead of tokens.
        return_soft_hard_loss: return (loss, soft_loss, hard_loss), the latter two without gradient and
            unweighted. Each is computed once more for it: about twice the time.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
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
        self.compiled = compiled
        self.chunk_size = chunk_size
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
        """The loss, 0-d; with return_soft_hard_loss (loss, soft_loss, hard_loss)."""
        _check_rows(student_weight, teacher_weight)
        mask = true_labels != self.ignore_index
        loss_of = partial(
            fused_linear_jsd,
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
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
    """`liger_kernel.transformers.LigerFusedLinearJSD`: JSD alone, without biases.

    Args:
        jsd_beta: in [0, 1].
        ignore_index: tokens of this label do not count.
        temperature: > 0.
        accum_dtype: None or torch.float32, in which weight gradients are accumulated in any case.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        LossConfig(beta=jsd_beta, temperature=temperature)
        if accum_dtype not in (None, torch.float32):
            raise ValueError(
                f"accum_dtype must be None or torch.float32, as gradients are accumulated, got {accum_dtype}"
            )
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,  # (BT, Ds)
        student_weight: Tensor,  # (Vs, Ds)
        teacher_input: Tensor,  # (BT, Dt)
        teacher_weight: Tensor,  # (Vt, Dt), Vt >= Vs
        shift_labels: Tensor | None = None,  # (BT,) int64; None: all tokens count
    ) -> Tensor:
        """The loss, 0-d."""
        _check_rows(student_weight, teacher_weight)
        return fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            mask=None if shift_labels is None else shift_labels != self.ignore_index,
            beta=self.jsd_beta,
            temperature=self.temperature,
        )


def _check_rows(student_weight: Tensor, teacher_weight: Tensor) -> None:
    """The teacher knows all of the student's tokens, over which the cross entropy is taken."""
    if len(teacher_weight) < len(student_weight):
        raise ValueError(
            "teacher_weight must have at least the rows of student_weight, "
            f"got {tuple(teacher_weight.shape)} and {tuple(student_weight.shape)}"
        )
