"""Options of a loss: all arguments but tensors, validated once and passed unchanged to the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "cpp", "torch", "reference"]
Tail = Literal["bucket", "renormalize", "truncate"]
Surplus = Literal["ignore", "count"]
Divergence = Literal["jsd", "skew_forward_kl", "skew_reverse_kl", "mixed_kl", "total_variation"]


class DivergenceForm(IntEnum):
    """The row arithmetic that a divergence takes. The kernels use the same numbers."""

    FORWARD_KL = 0
    REVERSE_KL = 1
    MIXTURE = 2  # of the generalized Jensen-Shannon divergence
    SKEW_FORWARD_KL = 3
    SKEW_REVERSE_KL = 4
    MIXED_KL = 5
    TOTAL_VARIATION = 6


class Mixture(NamedTuple):
    """The constants of a KL(p_t || m) + b KL(p_s || m) with m = c p_t + (1 - c) p_s."""

    teacher_weight: float  # a
    student_weight: float  # b
    teacher_share: float  # c
    student_share: float  # 1 - c

    @property
    def imbalance(self) -> float:
        """Return a (1 - c) - b c, the factor of p_t / m in the gradient, which is 0 for "jsd"."""
        a, b, c, rest = self
        return a * rest - b * c

    @property
    def log_student_share(self) -> float:
        """Return log(1 - c)."""
        return math.log1p(-self.teacher_share) if self.teacher_share < 0.5 else math.log(self.student_share)


class Scalars(NamedTuple):
    """The numbers of a `LossConfig` as 0-d tensors; rows/cpp/ reads them in this order."""

    teacher_weight: Tensor
    student_weight: Tensor
    teacher_share: Tensor
    student_share: Tensor
    imbalance: Tensor
    inv_temperature: Tensor
    student_logit_scale: Tensor
    teacher_logit_scale: Tensor
    student_softcap: Tensor
    teacher_softcap: Tensor
    hard_weight: Tensor
    soft_weight: Tensor
    entry_clip: Tensor


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of `fused_linear_jsd`, which documents the fields.

    Raises:
        ValueError, TypeError: an option is invalid (the message names it).
    """

    divergence: Divergence = "jsd"
    beta: float = 0.5
    alpha: float = 0.1
    entry_clip: float | None = None
    temperature: float = 1.0
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    hard_weight: float = 0.0
    soft_weight: float = 1.0
    vocab_size: int | None = None
    surplus: Surplus = "ignore"
    reduction: Reduction = "mean"
    workspace_bytes: int | None = None
    backend: Backend = "auto"
    return_stats: bool = False
    process_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        for require, names in _CHECKS.items():
            for name in names:
                # Stored as Python's own numbers, whatever was given: a NumPy scalar, an int for a float.
                object.__setattr__(self, name, require(name, getattr(self, name)))
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 (forward KL) and 1 (reverse KL), got {self.beta}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be at least 0 and less than 1, got {self.alpha}")
        hint = 'forward and reverse KL are "jsd" with beta 0 and 1'
        require_choice("divergence", self.divergence, get_args(Divergence), hint)
        _require_used(self, "beta", 'divergence "jsd"', self.divergence == "jsd")
        _require_used(self, "alpha", "a skewed KL", self.divergence.startswith("skew"))
        require_choice("surplus", self.surplus, get_args(Surplus))
        require_choice("reduction", self.reduction, get_args(Reduction))
        require_choice("backend", self.backend, get_args(Backend))
        _require_process_group(self.process_group, self.backend)
        if self.process_group is not None and self.surplus == "count":
            raise ValueError('surplus must be "ignore" with process_group, got "count"')
        if self.entry_clip is not None and self.surplus == "count":
            raise ValueError('surplus must be "ignore" with entry_clip, got "count"')

    @property
    def form(self) -> DivergenceForm:
        """The row arithmetic of the divergence, which its parameters may reduce to a plain KL."""
        if self.divergence == "mixed_kl":
            return DivergenceForm.MIXED_KL
        if self.divergence == "total_variation":
            return DivergenceForm.TOTAL_VARIATION
        mixture = self.mixture
        if mixture.teacher_share == 0:
            return DivergenceForm.FORWARD_KL
        if mixture.student_share == 0:
            return DivergenceForm.REVERSE_KL
        if mixture.student_weight == 0:
            return DivergenceForm.SKEW_FORWARD_KL
        return DivergenceForm.MIXTURE if mixture.teacher_weight else DivergenceForm.SKEW_REVERSE_KL

    @property
    def mixture(self) -> Mixture:
        """The constants of the divergence, which must be "jsd" or a skewed KL (others: those of "jsd")."""
        beta, alpha = self.beta, self.alpha
        if self.divergence == "skew_forward_kl":
            return Mixture(1.0, 0.0, alpha, 1.0 - alpha)
        if self.divergence == "skew_reverse_kl":
            return Mixture(0.0, 1.0, 1.0 - alpha, alpha)
        if beta in (0, 1):  # forward and reverse KL
            return Mixture(1.0 - beta, beta, beta, 1.0 - beta)
        return Mixture(beta, 1.0 - beta, beta, 1.0 - beta)

    @property
    def inv_temperature(self) -> float:
        """The factor that applies the temperature to logits."""
        return 1.0 / self.temperature

    @property
    def transforms_logits(self) -> bool:
        """True if an option changes the logits: a scale, a softcap or the temperature."""
        scales = (self.temperature, self.student_logit_scale, self.teacher_logit_scale)
        return scales != (1, 1, 1) or (self.student_softcap, self.teacher_softcap) != (None, None)

    @property
    def needs_two_softmaxes(self) -> bool:
        """True if the cross entropy and the divergence use different temperatures."""
        return self.hard_weight != 0 and self.temperature != 1

    @property
    def projects_support_only(self) -> bool:
        """True if the loss needs the student's logits at a top-k teacher's ids and at no other token."""
        return False

    def scalars(self, dtype: torch.dtype) -> Tensor:
        """(13,) CPU tensor of the options that enter the row arithmetic, in the order of `Scalars`."""
        mixture = self.mixture
        owners = (mixture if hasattr(mixture, name) else self for name in Scalars._fields)
        numbers = [getattr(owner, name) for owner, name in zip(owners, Scalars._fields, strict=True)]
        values = [1.0 if number is None else number for number in numbers]
        return torch.tensor(values, dtype=dtype, device="cpu")

    def changed_fields(self) -> str:
        """Return the options that differ from their defaults, e.g. `beta=1.0, temperature=0.9`."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)


@dataclass(frozen=True, kw_only=True)
class TopKLossConfig(LossConfig):
    """Options of `fused_linear_topk_jsd`. The teacher's logits are not known, so they have no options."""

    tail: Tail = "bucket"
    teacher_logit_scale: float = field(default=1.0, init=False)
    teacher_softcap: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("tail", self.tail, get_args(Tail))
        if self.tail == "truncate" and (self.divergence != "jsd" or self.entry_clip is not None):
            given = f"divergence {self.divergence!r} and entry_clip {self.entry_clip}"
            raise ValueError(f'tail "truncate" goes with divergence "jsd" without entry_clip, got {given}')

    @property
    def projects_support_only(self) -> bool:
        """True if the loss needs the student's logits at a top-k teacher's ids and at no other token."""
        return self.tail == "renormalize" and self.hard_weight == 0


C = TypeVar("C", bound=LossConfig)
P = ParamSpec("P")


def config_from(config: type[C], arguments: Mapping[str, Any]) -> C:
    """Create a config from the `locals()` of a public function: the options among its arguments."""
    return config(**{f.name: arguments[f.name] for f in fields(config) if f.init})


def keywords_of(
    config: Callable[P, LossConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Decorate a constructor that forwards its keywords to a config: type checkers see the config's."""
    del config
    return lambda constructor: cast("Callable[Concatenate[Any, P], None]", constructor)


def require_number(name: str, value: object) -> float:
    """Require a finite number, of Python or NumPy, and return it as a float."""
    # int and float come first because torch.compile traces only those.
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def require_positive(name: str, value: object) -> float:
    """Require value > 0."""
    if not (number := require_number(name, value)) > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return number


def require_positive_or_none(name: str, value: object) -> float | None:
    """Require None or value > 0."""
    if value is None:
        return None
    if not (number := require_number(name, value)) > 0:
        raise ValueError(f"{name} must be positive or None, got {value}")
    return number


def require_non_negative(name: str, value: object) -> float:
    """Require value >= 0."""
    if not (number := require_number(name, value)) >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return number


def require_integer(name: str, value: object, expected: str = "an int") -> int:
    """Require an integer, of Python or NumPy, and return it as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return int(value)


def require_count(name: str, value: object) -> int | None:
    """Require None or an integer >= 1."""
    if value is None:
        return None
    if (number := require_integer(name, value, "an int or None")) < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


_CHECKS: dict[Callable[[str, object], object], tuple[str, ...]] = {
    require_number: ("beta", "alpha"),
    require_positive: ("temperature", "student_logit_scale", "teacher_logit_scale"),
    require_positive_or_none: ("student_softcap", "teacher_softcap", "entry_clip"),
    require_non_negative: ("hard_weight", "soft_weight"),
    require_count: ("vocab_size", "workspace_bytes"),
}


def require_choice(name: str, value: object, choices: tuple[str, ...], hint: str = "") -> None:
    """Require one of the choices; the hint is for those who miss one."""
    if value not in choices:
        known = ", ".join(map(repr, choices)) + (f" ({hint})" if hint else "")
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def _require_used(config: LossConfig, name: str, user: str, used: bool) -> None:
    """Require the default of an option that the divergence does not use."""
    default = type(config).__dataclass_fields__[name].default
    if not used and getattr(config, name) != default:
        raise ValueError(
            f"{name} is an option of {user}, got {getattr(config, name)} with {config.divergence!r}"
        )


def _require_process_group(group: object, backend: str) -> None:
    if group is None:
        return
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            "process_group must be None or a torch.distributed.ProcessGroup that this process belongs to "
            f"(for a DeviceMesh: mesh.get_group()), got {type(group).__name__}"
        )
    if backend == "reference":
        raise ValueError('process_group does not go with backend="reference"')
