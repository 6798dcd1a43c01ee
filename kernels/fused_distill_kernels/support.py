"""Row kernel of the K + 1 outcomes of a top-k teacher, one program for one row.

The outcomes are the K columns of the support, and the tail, of which only the log-sum-exp parts are known.
All arithmetic is in float64, because a log-probability minus a logit is not exact in float32.
"""

# The parameters of Triton kernels have no Python types, and a branch on a constant may define a variable.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import FORWARD, MIXTURE, REVERSE, exp_sub_max, mul_zero_safe
from .elementwise64 import expm1, from_parts, log_gap, logaddexp, transform_derivative
from .outcomes import (
    is_jsd,
    jsd_terms,
    load_outcomes,
    log_prob_gradient,
    row_numbers,
    summed_terms,
    tail_parts,
)
from .support_columns import float_parts, support_block, support_warps

if TYPE_CHECKING:  # not imported at run time: any object with these attributes works
    from fused_distill.config import TopKLossConfig

BUCKET = tl.constexpr(0)
RENORMALIZE = tl.constexpr(1)
TRUNCATE = tl.constexpr(2)
TAIL_OPTIONS = {"bucket": BUCKET, "renormalize": RENORMALIZE, "truncate": TRUNCATE}

# The same clamp as in `fused_distill.rows.support`, which explains it.
MIN_TEACHER_TAIL_PROB = tl.constexpr(1e-7)

# Statistics of a row, in the order of `fused_distill.stats.DistillStats`.
N_STATS = tl.constexpr(7)


@triton.jit
def support_loss_kernel(
    y_ptr,  # (n, K) float64 logits at temperature 1, -inf where absent
    logprobs_ptr,  # (n, K) float, -inf where absent
    columns_ptr,  # (n, K) int64, negative where absent or on another rank
    tail_ptr,  # (n, 4, n_parts) float64: max_z, others_z, max_y, others_y
    weight_ptr,  # (n,) float32, factors of the losses
    grad_weight_ptr,  # (n,) float32, factors of the gradients
    labels_ptr,  # (n,) int64
    label_y_ptr,  # (n,) float64 logits at temperature 1
    loss_ptr,  # (n,) float32, written
    stats_ptr,  # (n, N_STATS) float32, written
    grad_ptr,  # (n, K) any float, written
    grad_stride,
    label_grad_ptr,  # (n,) like grad, written
    factors_ptr,  # (n, 4) float32, written: max_z, factor_z, max_y, factor_y
    k,
    n_parts,
    inv_temperature,
    inv_temperature_low,
    scale,
    scale_low,
    softcap,
    softcap_low,
    teacher_share,
    teacher_share_low,
    clip,
    clip_low,
    reverse_weight_ptr,  # (n,) float32 or None
    soft_weight,
    hard_weight,
    DIVERGENCE: tl.constexpr,
    CLIP: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    TWO_SOFTMAXES: tl.constexpr,
    WANT_STATS: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one row's loss, with WANT_STATS its statistics, and with WANT_GRAD its gradients.

    The gradients are those by the projections of the support, the one by the label's projection where it lies
    in the tail, and the numbers from which `tail_gradient_kernel` computes all others. K may exceed BLOCK:
    the row is then read in blocks, in each of four passes. Reads 16 to 24 bytes per outcome, and 8 or 16 per
    part of the tail; writes one gradient element per outcome and at most 52 bytes per row.
    """
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * k
    logprobs_ptr += row * k
    columns_ptr += row * k
    inv_temperature = from_parts(inv_temperature, inv_temperature_low)
    scale, softcap = from_parts(scale, scale_low), from_parts(softcap, softcap_low)
    teacher_share, clip = from_parts(teacher_share, teacher_share_low), from_parts(clip, clip_low)
    numbers = row_numbers(reverse_weight_ptr, row, teacher_share, DIVERGENCE)
    student_share = numbers[3]
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float64)

    highest_y, highest_t = zeros + float("-inf"), zeros + float("-inf")
    for start in range(0, k, BLOCK):
        y, logprob = load_outcomes(y_ptr, logprobs_ptr, start + lanes, k)
        highest_y, highest_t = tl.maximum(highest_y, y), tl.maximum(highest_t, logprob)
    top_y, top_t = tl.max(highest_y, 0), tl.max(highest_t, 0)
    top_z = top_y * inv_temperature

    sum_z, sum_y, sum_t, mass_t = zeros, zeros, zeros, zeros
    for start in range(0, k, BLOCK):
        y, logprob = load_outcomes(y_ptr, logprobs_ptr, start + lanes, k)
        sum_z += exp_sub_max(y * inv_temperature, top_z)
        if TWO_SOFTMAXES:
            sum_y += exp_sub_max(y, top_y)
        sum_t += exp_sub_max(logprob, top_t)
        mass_t += tl.exp(logprob)
    named_s, named_t = top_z + tl.log(tl.sum(sum_z, 0)), top_t + tl.log(tl.sum(sum_t, 0))
    named_mass_t = tl.sum(mass_t, 0)
    whole_s, whole_y = named_s, named_s
    if HAS_TAIL:
        tail_ptr += row * (4 * n_parts)
        tail_max_z, tail_sum_z = tail_parts(tail_ptr, n_parts, PARTS)
        tail_s = tail_max_z + tl.log(tail_sum_z)
        whole_s = logaddexp(named_s, tail_s)
        tail_max_y, whole_y = tail_max_z, whole_s
        if TWO_SOFTMAXES:
            tail_max_y, tail_sum_y = tail_parts(tail_ptr + 2 * n_parts, n_parts, PARTS)
            named_y = top_y + tl.log(tl.sum(sum_y, 0))
            whole_y = logaddexp(named_y, tail_max_y + tl.log(tail_sum_y))

    # The log-sum-exps of the compared distributions, and the mass of the outcomes in each of them.
    lse_s, lse_t = named_s, named_t
    mass_s, mass_t = 1.0, 1.0
    nothing = False
    if TAIL == BUCKET:
        tail_prob = 1.0 - named_mass_t
        tail_prob = tl.where(tail_prob < MIN_TEACHER_TAIL_PROB, MIN_TEACHER_TAIL_PROB, tail_prob)
        tail_t = tl.log(tl.where(tail_sum_z == 0, 0.0, tail_prob))
        lse_s, lse_t = whole_s, logaddexp(named_t, tail_t)
    elif TAIL == RENORMALIZE:
        # A row without entries, or whose entries the student forbids, has one outcome for both models.
        nothing = named_s == float("-inf")
    else:
        lse_s, lse_t = whole_s, 0.0
        mass_s, mass_t = tl.exp(named_s - whole_s), named_mass_t
    lse_gap = tl.where(nothing, 0.0, lse_t - lse_s)

    kl_s, kl_t, forward, reverse, entropy_s, entropy_t = zeros, zeros, zeros, zeros, zeros, zeros
    is_top1 = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, BLOCK):
        y, logprob = load_outcomes(y_ptr, logprobs_ptr, start + lanes, k)
        z = y * inv_temperature
        z_t = tl.where(nothing, float("-inf"), logprob)
        p_s, p_t, d = exp_sub_max(z, lse_s), exp_sub_max(z_t, lse_t), log_gap(z, z_t) - lse_gap
        student, teacher = summed_terms(p_s, p_t, d, numbers, clip, DIVERGENCE, CLIP, TAIL != TRUNCATE)
        kl_s += student
        kl_t += teacher
        if WANT_STATS:
            forward += jsd_terms(p_s, p_t, d, teacher_share, student_share, FORWARD, TAIL != TRUNCATE)[1]
            reverse += jsd_terms(p_s, p_t, d, teacher_share, student_share, REVERSE, TAIL != TRUNCATE)[0]
            entropy_s += mul_zero_safe(p_s, lse_s - z)
            entropy_t += mul_zero_safe(p_t, lse_t - z_t)
            top = top_z
            if HAS_TAIL:
                top = tl.maximum(top_z, tail_max_z)
            is_top1 |= ((z == top) & (logprob == top_t) & (logprob != float("-inf"))).to(tl.int32)
    kl_s, kl_t = tl.sum(kl_s, 0), tl.sum(kl_t, 0)
    if TAIL == BUCKET:
        tail_p_s, tail_p_t = exp_sub_max(tail_s, lse_s), exp_sub_max(tail_t, lse_t)
        tail_d = log_gap(tail_s, tail_t) - lse_gap
        student, teacher = summed_terms(tail_p_s, tail_p_t, tail_d, numbers, clip, DIVERGENCE, CLIP, True)
        kl_s += student
        kl_t += teacher

    soft = kl_t
    if is_jsd(DIVERGENCE, CLIP) and DIVERGENCE == MIXTURE:
        soft = teacher_share * kl_t + student_share * kl_s
    loss = soft_weight * soft
    grad_weight = tl.load(grad_weight_ptr + row).to(tl.float64)
    hard_scale = 0.0 * grad_weight
    if HAS_LABELS:
        label, label_y = tl.load(labels_ptr + row), tl.load(label_y_ptr + row)
        label_log_p = label_y - whole_y
        loss += tl.where(label >= 0, -hard_weight * label_log_p, 0.0)
        hard_scale = tl.where(label >= 0, grad_weight * hard_weight, 0.0)
    weight = tl.load(weight_ptr + row).to(tl.float64)
    tl.store(loss_ptr + row, (weight * loss).to(tl.float32))

    if WANT_STATS:
        forward, reverse = tl.sum(forward, 0), tl.sum(reverse, 0)
        entropy_s, entropy_t = tl.sum(entropy_s, 0), tl.sum(entropy_t, 0)
        if TAIL == BUCKET:
            forward += jsd_terms(tail_p_s, tail_p_t, tail_d, teacher_share, student_share, FORWARD, True)[1]
            reverse += jsd_terms(tail_p_s, tail_p_t, tail_d, teacher_share, student_share, REVERSE, True)[0]
            entropy_s += mul_zero_safe(tail_p_s, lse_s - tail_s)
            entropy_t += mul_zero_safe(tail_p_t, lse_t - tail_t)
        stats_ptr += row * N_STATS
        tl.store(stats_ptr, entropy_s.to(tl.float32))
        tl.store(stats_ptr + 1, entropy_t.to(tl.float32))
        tl.store(stats_ptr + 2, forward.to(tl.float32))
        tl.store(stats_ptr + 3, reverse.to(tl.float32))
        tl.store(stats_ptr + 4, tl.max(is_top1, 0).to(tl.float32))
        tl.store(stats_ptr + 5, tl.exp(named_s - whole_s).to(tl.float32))
        tl.store(stats_ptr + 6, named_mass_t.to(tl.float32))

    if WANT_GRAD:
        soft_scale = grad_weight * soft_weight * inv_temperature
        if not is_jsd(DIVERGENCE, CLIP):
            total = kl_s
        elif DIVERGENCE == FORWARD:
            total = -mass_t
        elif DIVERGENCE == REVERSE:
            total = mass_s + kl_s
        else:
            total = student_share * kl_s
        if HAS_TAIL:
            factor_z = 0.0 * grad_weight
            if TAIL == BUCKET:
                factor_z = (
                    log_prob_gradient(tail_p_s, tail_p_t, tail_d, numbers, clip, DIVERGENCE, CLIP)
                    - tail_p_s * total
                )
            elif TAIL == TRUNCATE:
                factor_z = -exp_sub_max(tail_s, lse_s) * total
            factor_z = tl.where(tail_sum_z == 0, 0.0, soft_scale * factor_z / tail_sum_z)
            factors_ptr += 4 * row
            tl.store(factors_ptr, tail_max_z.to(tl.float32))
            tl.store(factors_ptr + 1, factor_z.to(tl.float32))
            if HAS_LABELS:
                tl.store(factors_ptr + 2, tail_max_y.to(tl.float32))
                tl.store(factors_ptr + 3, (hard_scale * tl.exp(tail_max_y - whole_y)).to(tl.float32))
                # The label's whole entry: p - 1 has no digits in half precision.
                entry = factor_z * tl.exp(label_y * inv_temperature - tail_max_z)
                entry += hard_scale * expm1(label_log_p)
                entry *= transform_derivative(label_y, scale, softcap, HAS_SOFTCAP)
                tl.store(label_grad_ptr + row, entry.to(tl.float32).to(label_grad_ptr.dtype.element_ty))
        for start in range(0, k, BLOCK):
            index = start + lanes
            y, logprob = load_outcomes(y_ptr, logprobs_ptr, index, k)
            column = tl.load(columns_ptr + index, mask=index < k, other=-1)
            z = y * inv_temperature
            z_t = tl.where(nothing, float("-inf"), logprob)
            p_s, p_t, d = exp_sub_max(z, lse_s), exp_sub_max(z_t, lse_t), log_gap(z, z_t) - lse_gap
            grad = log_prob_gradient(p_s, p_t, d, numbers, clip, DIVERGENCE, CLIP) - p_s * total
            grad *= soft_scale
            if HAS_LABELS:
                at_label = tl.where((column == label) & (column >= 0), 1.0, 0.0)
                grad += hard_scale * (exp_sub_max(y, whole_y) - at_label)
            grad *= transform_derivative(y, scale, softcap, HAS_SOFTCAP)
            grad = tl.where(column >= 0, grad, 0.0).to(tl.float32).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + row * grad_stride + index, grad, mask=index < k)


class SupportLoss(NamedTuple):
    """Results of `support_loss`."""

    loss: Tensor  # (n,) float32
    stats: Tensor | None  # (n, 7) float32, in the order of `DistillStats`
    label_grad: Tensor | None  # (n,) like grad: the label's entry of the gradient where it lies in the tail
    factors: Tensor | None  # (n, 4) float32: max_z, factor_z, max_y, factor_y for `tail_gradient`


def support_loss(
    y: Tensor,  # (n, K) float64
    logprobs: Tensor,  # (n, K) float, -inf where absent
    columns: Tensor,  # (n, K) int64, negative where absent or on another rank
    weight: Tensor,  # (n,) float32
    config: TopKLossConfig,
    *,
    grad_weight: Tensor,  # (n,) float32
    tail: Tensor | None,  # (n, 4, n_parts) float64, of `tail_sums`
    labels: Tensor | None,  # (n,) int64
    label_y: Tensor | None,  # (n,) float64
    reverse_weight: Tensor | None,  # (n,) float32, for divergence="mixed_kl"
    grad: Tensor | None,  # (n, K) any float, written
) -> SupportLoss:
    """Return losses, statistics and the numbers of the tail's gradient; write the support's gradient."""
    (n, k), n_parts = y.shape, 1 if tail is None else tail.shape[-1]
    loss = y.new_empty(n, dtype=torch.float32)
    stats = y.new_empty(n, N_STATS.value, dtype=torch.float32) if config.return_stats else None
    label_grad = None if grad is None or labels is None else grad.new_empty(n)
    factors = None if grad is None or tail is None else y.new_empty(n, 4, dtype=torch.float32)
    if n == 0:
        return SupportLoss(loss, stats, label_grad, factors)
    block = support_block(k)
    with torch.cuda.device_of(y):
        launch: Any = support_loss_kernel[(n,)]
        launch(
            y,
            logprobs,
            columns,
            y if tail is None else tail,
            weight,
            grad_weight,
            columns if labels is None else labels,
            y if label_y is None else label_y,
            loss,
            loss if stats is None else stats,
            loss if grad is None else grad,
            0 if grad is None else grad.stride(0),
            loss if label_grad is None else label_grad,
            loss if factors is None else factors,
            k,
            n_parts,
            *float_parts(config.inv_temperature),
            *float_parts(config.student_logit_scale),
            *float_parts(config.student_softcap or 1.0),
            *float_parts(config.mixture.teacher_share),
            *float_parts(config.entry_clip or 0.0),
            reverse_weight,
            float(config.soft_weight),
            float(config.hard_weight),
            DIVERGENCE=int(config.form),
            CLIP=config.entry_clip is not None,
            TAIL=TAIL_OPTIONS[config.tail].value,
            HAS_TAIL=tail is not None,
            HAS_SOFTCAP=config.student_softcap is not None,
            HAS_LABELS=labels is not None,
            TWO_SOFTMAXES=config.needs_two_softmaxes,
            WANT_STATS=stats is not None,
            WANT_GRAD=grad is not None,
            PARTS=triton.next_power_of_2(n_parts),
            BLOCK=block,
            num_warps=support_warps(block),
            enable_fp_fusion=True,
        )
    return SupportLoss(loss, stats, label_grad, factors)
