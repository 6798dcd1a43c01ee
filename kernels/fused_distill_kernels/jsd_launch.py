"""Launches of the row kernels of the generalized Jensen-Shannon divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from .jsd import FORWARD, MIXTURE, REVERSE, gradient_kernel, mixture_sums_kernel
from .launch import MAX_PARTS, THREADS, launch_options
from .row_statistics import PART, merge_kernel, statistics_kernel
from .tile import LINEAR, SEPARATE, SOFTCAP, WIDTH

if TYPE_CHECKING:  # not imported at run time: any object with these attributes works
    from fused_distill.config import LossConfig

GROUPS = THREADS
BLOCK = 2 * GROUPS * WIDTH.value


@dataclass(frozen=True)
class JSDKernels:
    """Launches of the row kernels on one chunk of logits. Only `gradient` may overwrite the logits.

    Where the columns are a shard of the vocabulary, the caller gathers the results of `statistics` over the
    shards, merges them, and adds up the results of `mixture_sums`.
    """

    student_logits: Tensor  # (n, V) float32, columns contiguous
    teacher_logits: Tensor  # (n, V) float32, columns contiguous
    student_bias: Tensor | None  # (V,) float32
    teacher_bias: Tensor | None  # (V,) float32
    labels: Tensor | None  # (n,) int64; -100: no label; V or more: not a column
    config: LossConfig

    def statistics(self) -> Tensor:
        """Return the row statistics, (n, PART) float32, whose columns row_statistics.py names."""
        config = self.config
        parts = self._new(PART.value, self._n_parts)
        self._launch(
            statistics_kernel,
            *self._logits,
            self.labels,
            parts,
            *self._transform,
            self.factor,
            self.label_factor,
            WANT_REVERSE=config.return_stats or config.form == REVERSE.value,
            WANT_FORWARD=config.return_stats or config.form == FORWARD.value,
            WANT_STATS=config.return_stats,
            WANT_Y=self.wants_y,
        )
        return self.merge(parts)

    def merge(self, parts: Tensor) -> Tensor:
        """Return the row statistics, (n, PART), of the union of disjoint parts, (n, PART, n_parts)."""
        merged = self._new(PART.value)
        if len(parts):
            launch: Any = merge_kernel[len(parts),]
            with torch.cuda.device_of(parts):
                launch(
                    parts,
                    self.labels,
                    merged,
                    parts.shape[-1],
                    self.factor,
                    self.label_factor,
                    WANT_Y=self.wants_y,
                    MAX_PARTS=triton.next_power_of_2(parts.shape[-1]),
                    num_warps=1,
                    enable_fp_fusion=True,
                )
        return merged

    def mixture_sums(self, merged: Tensor) -> Tensor:
        """Return KL(student || mixture) and KL(teacher || mixture), (n, 2) float32."""
        sums = self._new(2, self._n_parts)
        self._launch(
            mixture_sums_kernel,
            *self._logits,
            merged,
            sums,
            *self._transform,
            self.factor,
            *self._mixture,
            HALF=self.config.beta == 0.5,
        )
        return sums.sum(-1)

    def gradient(self, merged: Tensor, mixture_kls: Tensor | None, weight: Tensor, out: Tensor) -> None:
        """Write weight (n,) times the gradient of the rows' losses to out (n, V), of any floating dtype."""
        config = self.config
        kls = merged if mixture_kls is None else mixture_kls
        soft_factor = config.soft_weight * self._student_scale * config.inv_temperature
        self._launch(
            gradient_kernel,
            *self._logits,
            merged,
            kls,
            kls.stride(0),
            out,
            out.stride(0),
            weight,
            self.labels,
            *self._transform,
            self.factor,
            self.label_factor,
            *self._mixture,
            soft_factor * (config.mixture.student_share if config.form == MIXTURE.value else 1.0),
            config.hard_weight * self._student_scale,
            WANT_Y=self.wants_y,
            DIVERGENCE=int(config.form),
            HALF=config.beta == 0.5,
        )

    @property
    def _transform_kind(self) -> int:
        config = self.config
        if config.student_logit_scale != config.teacher_logit_scale:
            return SEPARATE.value
        if config.student_softcap != config.teacher_softcap:
            return SEPARATE.value
        return LINEAR.value if config.student_softcap is None else SOFTCAP.value

    @property
    def label_factor(self) -> float:
        """The factor that turns v into logits at temperature 1; see tile.py."""
        config, kind = self.config, self._transform_kind
        if kind == SEPARATE.value:
            return 1.0
        return float(config.student_logit_scale if kind == LINEAR.value else config.student_softcap or 1.0)

    @property
    def factor(self) -> float:
        """The factor that turns v into logits over temperature; see tile.py."""
        return self.label_factor * self.config.inv_temperature

    @property
    def _student_scale(self) -> float:
        return float(self.config.student_logit_scale)

    @property
    def _mixture(self) -> tuple[float, float]:
        return float(self.config.beta), self.config.mixture.student_share

    @property
    def wants_y(self) -> bool:
        """True if the statistics have another softmax at temperature 1."""
        return self.labels is not None and self.config.temperature != 1

    @property
    def _n_parts(self) -> int:
        return min(MAX_PARTS, triton.cdiv(self.student_logits.shape[1], BLOCK))

    @property
    def _logits(self) -> tuple[Any, ...]:
        student, teacher = self.student_logits, self.teacher_logits
        return student, student.stride(0), teacher, teacher.stride(0), self.student_bias, self.teacher_bias

    @property
    def _transform(self) -> tuple[Any, ...]:
        config = self.config
        return (
            self.student_logits.shape[1],
            self._student_scale,
            float(config.teacher_logit_scale),
            config.student_softcap and float(config.student_softcap),
            config.teacher_softcap and float(config.teacher_softcap),
        )

    def _new(self, *shape: int) -> Tensor:
        return self.student_logits.new_empty(len(self.student_logits), *shape)

    def _launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        n = len(self.student_logits)
        if n == 0:
            return
        with torch.cuda.device_of(self.student_logits):
            kernel[n, self._n_parts](
                *arguments,
                TRANSFORM=self._transform_kind,
                GROUPS=GROUPS,
                **launch_options(self.student_logits.device),
                **constants,
            )
