"""The options that kernel launches read."""

from typing import Protocol


class KernelOptions(Protocol):
    """Options of a loss, e.g. `fused_distill.config.LossConfig`, which documents them."""

    @property
    def beta(self) -> float:
        """Return the weight of the teacher in the mixture."""
        ...

    @property
    def one_minus_beta(self) -> float:
        """Return the weight of the student in the mixture."""
        ...

    @property
    def divergence(self) -> int:
        """Return 0 for forward KL, 1 for reverse KL, 2 for a mixture."""
        ...

    @property
    def temperature(self) -> float:
        """Return the divisor of both models' logits."""
        ...

    @property
    def student_logit_scale(self) -> float:
        """Return the factor of the student's logits."""
        ...

    @property
    def teacher_logit_scale(self) -> float:
        """Return the factor of the teacher's logits."""
        ...

    @property
    def student_softcap(self) -> float | None:
        """Return the bound on the student's logits, or None."""
        ...

    @property
    def teacher_softcap(self) -> float | None:
        """Return the bound on the teacher's logits, or None."""
        ...

    @property
    def hard_weight(self) -> float:
        """Return the weight of the cross entropy."""
        ...

    @property
    def soft_weight(self) -> float:
        """Return the weight of the divergence."""
        ...

    @property
    def return_stats(self) -> bool:
        """Return True to compute statistics."""
        ...
