"""Launches of the row kernels of the divergences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from .elementwise import FORWARD, MIXED, MIXTURE, REVERSE, TOTAL_VARIATION
from .jsd import divergence_sums_kernel, gradient_kernel
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
    shards, merges them, and adds up the results of `sums`.
    """

    student_logits: Tensor  # (n, V) float32, columns contiguous
    teacher_logits: Tensor  # (n, V) float32, columns contiguous
    student_bias: Tensor | None  # (V,) float32
    teacher_bias: Tensor | None  # (V,) float32
    labels: Tensor | None  # (n,) int64; -100: no label; V or more: not a column
    config: LossConfig
    reverse_weight: Tensor | None = None  # (n,) float32, for divergence="mixed_kl"

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
            WANT_REVERSE=config.return_stats or config.form in (REVERSE.value, MIXED.value),
            WANT_FORWARD=config.return_stats or config.form in (FORWARD.value, MIXED.value),
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

    @property
    def needs_sums(self) -> bool:
        """True if the statistics do not give the loss."""
        return self._clips or self.config.form not in (FORWARD.value, REVERSE.value, MIXED.value)

    def sums(self, merged: Tensor) -> Tensor:
        """Return the sums of `divergence_sums_kernel`, (n, 2 or 3) float32."""
        sums = self._new(3 if self.config.form == TOTAL_VARIATION.value else 2, self._n_parts)
        self._launch(
            divergence_sums_kernel,
            *self._logits,
            merged,
            self.reverse_weight,
            sums,
            *self._transform,
            self.factor,
            *self._numbers,
            **self._constants,
        )
        return sums.sum(-1)

    def gradient(self, merged: Tensor, sums: Tensor | None, weight: Tensor, out: Tensor) -> None:
        """Write weight (n,) times the gradient of the rows' losses to out (n, V), of any floating dtype."""
        config = self.config
        sums = merged if sums is None else sums
        soft_factor = config.soft_weight * self._student_scale * config.inv_temperature
        if config.form == MIXTURE.value and not self._clips:
            soft_factor *= config.mixture.student_share
        self._launch(
            gradient_kernel,
            *self._logits,
            merged,
            sums,
            sums.stride(0),
            self.reverse_weight,
            out,
            out.stride(0),
            weight,
            self.labels,
            *self._transform,
            self.factor,
            self.label_factor,
            *self._numbers,
            soft_factor,
            config.hard_weight * self._student_scale,
            WANT_Y=self.wants_y,
            **self._constants,
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
    def _clips(self) -> bool:
        return self.config.entry_clip is not None

    @property
    def _numbers(self) -> tuple[float, ...]:
        """The numbers of `divergence_terms` and the clip; a weight per row replaces some of them."""
        config = self.config
        return *config.mixture, config.mixture.imbalance, config.entry_clip or 0.0

    @property
    def _constants(self) -> dict[str, Any]:
        config = self.config
        half = config.mixture.teacher_share == 0.5
        return {"DIVERGENCE": int(config.form), "CLIP": self._clips, "HALF": half}

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
