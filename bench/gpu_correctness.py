"""Checks of a first run on a GPU that concern values: versions, matrix products, losses against float64."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from first_run_checks import CheckResult, Setting, check, relative_error
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd, reference, topk_logprobs
from fused_distill.chunked.gemm import gemm, supports_fp32_output
from suite import machine
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
BETAS = (0.0, 0.3, 0.5, 1.0)
SUPPORT = 64
# Losses are computed from float32 logits; half-precision gradients are rounded once or twice on the way.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@check("versions, card and C compiler")
def environment(setting: Setting) -> CheckResult:
    result = CheckResult([{**machine(), "torch": torch.__version__}])
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    version = (
        subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
        if compiler
        else None
    )
    result.rows.append({"C compiler": version.stdout.splitlines()[0] if version and version.stdout else None})
    result.expect(compiler is not None, "Triton needs a C compiler, and none was found (set CC)")
    if setting.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(setting.device)
        import triton

        free, total = torch.cuda.mem_get_info(setting.device)
        result.rows.append(
            {"capability": f"{major}.{minor}", "triton": triton.__version__, "python": sys.version}
        )
        result.rows.append({"free GiB": free / 2**30, "total GiB": total / 2**30})
        result.expect(
            free > 0.5 * total, "less than half of the GPU's memory is free: is something else running?"
        )
    return result


@check("half-precision products into float32: values and rate")
def products(setting: Setting) -> CheckResult:
    result = CheckResult()
    for dtype in HALF:
        supported = supports_fp32_output(setting.device, dtype)
        result.rows.append({"dtype": dtype_name(dtype), "supported": supported})
        if supported:
            for rows in (24, 17) if setting.small else (683, 640, 704, 768, 2048, 8192):
                _compare_products(setting, dtype, rows, result)
        else:
            works = setting.device.type != "cuda"
            result.expect(works, f"{dtype_name(dtype)} products into float32 do not work")
    return result


def _compare_products(setting: Setting, dtype: torch.dtype, rows: int, result: CheckResult) -> None:
    """Add the errors, on some columns, and the rates of a product of logits and of a weight gradient."""
    vocab, width = setting.vocab, 32 if setting.small else 2048
    hidden = setting.randn(rows, width, dtype=dtype)
    weight = setting.randn(vocab, width, dtype=dtype, scale=width**-0.5, seed=1)
    gradient = setting.randn(rows, vocab, dtype=dtype, seed=2)
    padded = torch.zeros(rows, vocab + 64, dtype=torch.float32, device=setting.device)
    logits = padded[:, :vocab]
    total = torch.zeros(vocab, width, dtype=torch.float32, device=setting.device)

    def project() -> None:
        gemm(hidden, weight.T, logits)

    def accumulate() -> None:
        gemm(gradient.T, hidden, total, accumulate=True)

    project()
    gemm(gradient.T, hidden, total)
    accumulate()
    part = slice(None, None, max(vocab // 200, 1))
    errors = {
        "logits": relative_error(logits[:, part], hidden.double() @ weight[part].double().T),
        "gradient": relative_error(total[part], 2 * (gradient[:, part].double().T @ hidden.double())),
    }
    for (name, error), terms in zip(errors.items(), (width, rows), strict=True):
        where = f"{name}, {dtype_name(dtype)}, {rows} rows"
        # Tensor cores cut off the sum after every few terms instead of rounding it.
        result.expect(error < max(1e-5, 5e-9 * terms), f"{where}: relative error {error:.1e}")
    result.expect(not padded[:, vocab:].any(), "a product wrote outside its columns")
    tera_operations = 2e-12 * rows * vocab * width
    rates = {
        "logits TFLOP/s": tera_operations / setting.seconds(project),
        "gradient TFLOP/s": tera_operations / setting.seconds(accumulate),
    }
    result.rows.append({"dtype": dtype_name(dtype), "rows": rows, **errors, **rates})


@dataclass
class LossCall:
    """One comparison of a loss and its gradients with the float64 reference."""

    vocab: int
    dtype: torch.dtype
    beta: float
    option: str = "plain"
    tail: str | None = None  # of a top-k teacher; None: a full-vocabulary teacher

    def compare(self, setting: Setting, result: CheckResult) -> None:
        """Add the relative errors of the loss and its gradients."""
        tokens, student_dim, teacher_dim = (12, 16, 24) if setting.small else (200, 256, 384)
        hidden = setting.randn(tokens, student_dim, dtype=self.dtype)
        weight = setting.randn(self.vocab, student_dim, dtype=self.dtype, scale=3 / student_dim**0.5, seed=1)
        if self.tail is None:
            teacher = (
                setting.randn(tokens, teacher_dim, dtype=self.dtype, seed=2),
                setting.randn(self.vocab, teacher_dim, dtype=self.dtype, scale=3 / teacher_dim**0.5, seed=3),
            )
            function, exact = fused_linear_jsd, reference.linear_jsd
        else:
            teacher = _support(setting, tokens, self.vocab)
            function, exact = fused_linear_topk_jsd, reference.linear_topk_jsd
        keywords = self._keywords(setting, tokens)
        # A few chunks: about fifty tokens' logits of both models and their gradient at a time.
        bound = {} if setting.small else {"workspace_bytes": 64 * self.vocab * 12}
        calls = (
            _loss_and_gradients(function, (hidden, weight, *teacher), keywords | bound),
            _loss_and_gradients(exact, tuple(map(_to_float64, (hidden, weight, *teacher))), keywords),
        )
        loss, *gradients = (relative_error(ours, theirs) for ours, theirs in zip(*calls, strict=True))
        where = f"V {self.vocab}, {dtype_name(self.dtype)}, beta {self.beta:g}, {self.option}"
        where += f", {self.tail}" if self.tail else ""
        result.rows.append({"call": where, "loss": loss, "gradients": max(gradients)})
        result.expect(loss <= LOSS_TOLERANCE, f"{where}: relative error of the loss {loss:.1e}")
        tolerance = GRADIENT_TOLERANCE[self.dtype]
        result.expect(
            max(gradients) <= tolerance, f"{where}: relative error of a gradient {max(gradients):.1e}"
        )

    def _keywords(self, setting: Setting, tokens: int) -> dict[str, Any]:
        device = setting.device
        options: dict[str, dict[str, Any]] = {
            "plain": {},
            "mask": {"mask": torch.arange(tokens, device=device) % 3 > 0},
            "all masked": {"mask": torch.zeros(tokens, dtype=torch.bool, device=device)},
            "labels": {"labels": torch.arange(tokens, device=device) % 90, "hard_weight": 0.5},
            "softcap": {"student_softcap": 20.0} | ({} if self.tail else {"teacher_softcap": 30.0}),
        }
        tail = {} if self.tail is None else {"tail": self.tail}
        return {"beta": self.beta, **tail, **options[self.option]}


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _support(setting: Setting, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and ids of a top-k teacher whose support holds 95 % of the probability."""
    k = min(SUPPORT, vocab // 2)
    logprobs = torch.log_softmax(setting.randn(tokens, k, dtype=torch.float32, scale=2.0, seed=4), -1)
    ids = torch.arange(k, device=setting.device) * (vocab // k)
    return logprobs + math.log(0.95), ids.expand(tokens, k).contiguous()


def _loss_and_gradients(
    function: Any, tensors: tuple[Tensor, ...], keywords: dict[str, Any]
) -> tuple[Tensor, ...]:
    hidden, weight = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    loss = function(hidden, weight, *tensors[2:], **keywords)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@check("fused_linear_jsd against the float64 reference")
def full_loss(setting: Setting) -> CheckResult:
    result = CheckResult()
    calls = [
        LossCall(vocab, dtype, beta)
        for vocab in setting.vocabs
        for dtype in (*HALF, torch.float32)
        for beta in BETAS
    ]
    calls += [
        LossCall(setting.vocabs[-1], torch.bfloat16, beta, option)
        for option in ("mask", "labels", "softcap", "all masked")
        for beta in (0.0, 0.5, 1.0)
    ]
    for call in calls:
        call.compare(setting, result)
    return result


@check("fused_linear_topk_jsd against the float64 reference")
def topk_loss(setting: Setting) -> CheckResult:
    result = CheckResult()
    for tail in ("bucket", "renormalize", "truncate"):
        for dtype in (torch.bfloat16, torch.float32):
            for beta in (0.0, 0.5, 1.0):
                LossCall(setting.vocabs[0], dtype, beta, tail=tail).compare(setting, result)
        for option in ("mask", "labels", "softcap", "all masked"):
            LossCall(setting.vocabs[-1], torch.bfloat16, 0.5, option, tail=tail).compare(setting, result)
    return result


@check("topk_logprobs against float64")
def logprobs(setting: Setting) -> CheckResult:
    result = CheckResult()
    for vocab in setting.vocabs:
        hidden, weight = setting.randn(64, 64), setting.randn(vocab, 64, scale=3 / 8, seed=1)
        k = min(SUPPORT, vocab // 2)
        found = topk_logprobs(hidden, weight, k)
        exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
        error = (found.logprobs.double() - exact.topk(k).values).abs().max().item()
        at_ids = (found.logprobs.double() - exact.gather(-1, found.ids)).abs().max().item()
        result.rows.append({"vocab": vocab, "largest error": error, "at the ids": at_ids})
        result.expect(
            max(error, at_ids) < 1e-4, f"V {vocab}: a log-probability is off by {max(error, at_ids):.1e}"
        )
    return result
