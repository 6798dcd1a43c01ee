"""Terms of the divergences over the outcomes of two distributions p_t and p_s, and their slopes.

With m = c p_t + (1 - c) p_s and the numbers a and b, one family is

    a KL(p_t || m) + b KL(p_s || m) = sum T,  T = a N_t + b N_s + k (p_t - p_s),  k = a (1 - c) - b c

where N_t and N_s are `kl_terms`, which are >= 0. The sum of p_t - p_s is 0, so `divergence_terms` leaves it
out: nothing cancels. The derivative of T by p_s is h - k with

    h = -b log(m / p_s) - k (1 - c) (p_t - p_s) / m

A constant has no effect on the gradient through a softmax, p_s (h - sum p_s h), and `slope` is p_s h. A
clipped term has the derivative 0, so its h is k. The total variation 0.5 sum |p_t - p_s| is beside the
family, with k 0.

`fused_distill_kernels.elementwise` and cpp/divergences.h have the same functions by the same names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DivergenceForm, Scalars
from .elementwise import kl_terms, mixture_log_ratios, mixture_ratio, mul_zero_safe


class Numbers(NamedTuple):
    """The numbers of the family, 0-d or with one row each, (n, 1)."""

    of_teacher: Tensor  # a
    of_student: Tensor  # b
    teacher_share: Tensor  # c
    student_share: Tensor  # 1 - c
    imbalance: Tensor  # k

    @classmethod
    def of(cls, scalars: Scalars, reverse_weight: Tensor | None) -> Numbers:
        """Return the numbers of a loss, or of each row if "mixed_kl" gives it a weight (n,)."""
        if reverse_weight is None:
            return cls(*scalars[:5])
        b = reverse_weight.unsqueeze(-1)
        return cls(1 - b, b, scalars.teacher_share, scalars.student_share, 1 - 2 * b)


class Outcomes(NamedTuple):
    """Probabilities of n rows of outcomes, (n, V) each."""

    p_s: Tensor
    p_t: Tensor
    d: Tensor  # log p_t - log p_s
    difference: Tensor  # p_t - p_s


def divergence_terms(outcomes: Outcomes, numbers: Numbers, form: DivergenceForm) -> Tensor:
    """Return T - k (p_t - p_s) of each outcome, which is >= 0."""
    p_s, p_t, d, difference = outcomes
    if form is DivergenceForm.TOTAL_VARIATION:
        return 0.5 * difference.abs()
    if form in (DivergenceForm.FORWARD_KL, DivergenceForm.REVERSE_KL, DivergenceForm.MIXED_KL):
        forward, reverse = kl_terms(p_t, -d, -difference), kl_terms(p_s, d, difference)
        if form is DivergenceForm.MIXED_KL:  # a weight of 0 drops an infinite term
            return mul_zero_safe(numbers.of_teacher, forward) + mul_zero_safe(numbers.of_student, reverse)
        return forward if form is DivergenceForm.FORWARD_KL else reverse
    u, v = mixture_log_ratios(d, numbers.teacher_share, numbers.student_share)
    of_teacher = kl_terms(p_t, v, -numbers.student_share * difference)
    of_student = kl_terms(p_s, u, numbers.teacher_share * difference)
    if form is DivergenceForm.MIXTURE:
        return numbers.of_teacher * of_teacher + numbers.of_student * of_student
    return of_teacher if form is DivergenceForm.SKEW_FORWARD_KL else of_student


def slope(outcomes: Outcomes, numbers: Numbers, form: DivergenceForm) -> Tensor:
    """Return p_s h of each outcome, where h is the derivative of T by p_s, plus k."""
    p_s, _, d, difference = outcomes
    if form is DivergenceForm.TOTAL_VARIATION:
        return -0.5 * p_s * torch.where(d.isnan(), d, d.sign())
    if form is DivergenceForm.FORWARD_KL:
        return -difference
    reverse = mul_zero_safe(p_s, -d)
    if form is DivergenceForm.REVERSE_KL:
        return reverse
    if form is DivergenceForm.MIXED_KL:
        return mul_zero_safe(numbers.of_student, reverse) - numbers.of_teacher * difference
    u, _ = mixture_log_ratios(d, numbers.teacher_share, numbers.student_share)
    by_log = numbers.of_student * mul_zero_safe(p_s, -u)
    if form is DivergenceForm.MIXTURE:
        return by_log
    ratio = mixture_ratio(d, numbers.teacher_share, numbers.student_share)
    by_ratio = (-numbers.imbalance * numbers.student_share) * (p_s * ratio)
    return by_ratio if form is DivergenceForm.SKEW_FORWARD_KL else by_log + by_ratio


def clipped(
    outcomes: Outcomes, numbers: Numbers, terms: Tensor, slopes: Tensor, clip: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `divergence_terms` and `slope` of min(T, clip)."""
    bound = clip - numbers.imbalance * outcomes.difference
    return torch.minimum(terms, bound), torch.where(terms > bound, numbers.imbalance * outcomes.p_s, slopes)


def terms_and_slopes(
    outcomes: Outcomes,
    scalars: Scalars,
    reverse_weight: Tensor | None,  # (n,)
    form: DivergenceForm,
    clips: bool,
) -> tuple[Tensor, Tensor]:
    """Return `divergence_terms` and `slope` of each outcome, clipped or not, both (n, V)."""
    numbers = Numbers.of(scalars, reverse_weight)
    terms, slopes = (function(outcomes, numbers, form) for function in (divergence_terms, slope))
    return clipped(outcomes, numbers, terms, slopes, scalars.entry_clip) if clips else (terms, slopes)


def led_parts(p_s: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Return p_s where the student leads, and where the teacher leads, given slopes of the total variation.

    Outcomes whose slope is 0 count half in each. With the sums S and T of the two, the gradient is p_s T
    where the student leads and -p_s S where the teacher leads. No numbers close to 1 are subtracted.
    """
    return 0.5 * p_s + slopes, 0.5 * p_s - slopes
