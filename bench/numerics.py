"""How exact the losses are: ours, naive float32, Liger and TRL against long double on the same numbers.

    python bench/numerics.py [--output FILE] [--small]

Close models: float32 logits of size about 10, student = teacher + noise; every loss gets them through an
identity (hidden states are unit vectors, the head's columns logits), so that no product rounds.
linkedin/Liger-Kernel issue 1432: bfloat16 hidden states and heads from randn, where rounding the logits to
bfloat16 shows in the gradients. Close half-precision models: equal heads, and hidden states with noise.
The rows "as on a GPU" round the logit gradient as the losses do there; its products are emulated on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from emulated_gpu import gpu_rules
from fused_distill import fused_linear_jsd, reference
from long_double import divergence_rows
from providers import LOSSES, Inputs
from suite import header, results_folder, write_json
from torch import Tensor

PROVIDERS = ["fused-distill", "naive", "Liger chunked", "TRL"]
ON_GPU = "fused-distill, as on a GPU"
ROUNDED = "exact, rounded once"
DIVERGENCES: dict[str, dict[str, Any]] = {
    "skew_forward_kl, alpha 0.1": {"divergence": "skew_forward_kl", "alpha": 0.1},
    "skew_reverse_kl, alpha 0.1": {"divergence": "skew_reverse_kl", "alpha": 0.1},
    "mixed_kl, weight 0.5": {"divergence": "mixed_kl", "reverse_weight": 0.5},
    "total_variation": {"divergence": "total_variation"},
    "forward KL, entry_clip 1e-5": {"beta": 0.0, "entry_clip": 1e-5},
}
NOISES = (1e-2, 1e-3, 1e-4, 1e-5)
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def close_models(noise: float, vocab: int) -> Inputs:
    """Return two tokens whose logits are the columns of the heads."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(2, vocab, generator=generator)
    student = teacher + noise * torch.randn(2, vocab, generator=generator)
    return Inputs(torch.eye(2), student.T.contiguous(), torch.eye(2), teacher.T.contiguous())


def liger_issue_1432(tokens: int, dim: int, vocab: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator).bfloat16()

    return Inputs(randn(tokens), randn(vocab), randn(tokens), randn(vocab))


def close_half(dtype: torch.dtype, tokens: int, dim: int, vocab: int) -> Inputs:
    """Return equal heads and close hidden states, whose logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator)
    student = hidden + 1e-2 * torch.randn(tokens, dim, generator=generator)
    head = (3 / dim**0.5 * torch.randn(vocab, dim, generator=generator)).to(dtype)
    return Inputs(student.to(dtype), head, hidden.to(dtype), head.clone())


def loss_and_gradients(provider: str, inputs: Inputs, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and the gradients of the student's hidden states and head."""
    hs, ws, ht, wt = (t.detach() for t in inputs)
    loss = LOSSES[provider](beta)(hs.requires_grad_(), ws.requires_grad_(), ht, wt)
    grad_hidden, grad_weight = torch.autograd.grad(loss, [hs, ws])
    return loss.detach(), grad_hidden, grad_weight


def exact(inputs: Inputs, **divergence: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same by definition: float64 products around long double losses and logit gradients."""
    hs, ws, ht, wt = (t.detach().double() for t in inputs)
    losses, logit_grads = divergence_rows(hs @ ws.T, ht @ wt.T, **divergence)
    logit_grads /= len(hs)
    return losses.mean(), logit_grads @ ws, logit_grads.T @ hs


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def rows(small: bool) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for beta in BETAS:
        for noise in NOISES:
            inputs = close_models(noise, 500 if small else 32000)
            true = exact(inputs, beta=beta)
            for provider in PROVIDERS:
                got = loss_and_gradients(provider, inputs, beta)
                case = f"beta {beta:g}, noise {noise:g}"
                for name, mine, want in (("loss", got[0], true[0]), ("logit gradient", got[2], true[2])):
                    results.append(
                        {
                            "table": f"Close models, relative error of the {name}",
                            "case": case,
                            "provider": provider,
                            "error": relative_error(mine, want),
                            **({"text": "negative"} if name == "loss" and mine < 0 else {}),
                        }
                    )
    return results + other_divergences(small) + half_precision_rows(small)


def other_divergences(small: bool) -> list[dict[str, Any]]:
    """Return the errors of the divergences that no peer has, against the reference in float32."""
    results: list[dict[str, Any]] = []
    functions = {"fused-distill": fused_linear_jsd, "naive": reference.linear_jsd}
    for name, options in DIVERGENCES.items():
        for noise in NOISES:
            inputs = close_models(noise, 500 if small else 32000)
            true = exact(inputs, **options)
            for provider, function in functions.items():
                hs, ws, ht, wt = (t.detach() for t in inputs)
                loss = function(hs, ws.requires_grad_(), ht, wt, **options)
                (grad,) = torch.autograd.grad(loss, [ws])
                for index, quantity, mine in ((0, "loss", loss.detach()), (2, "logit gradient", grad)):
                    results.append(
                        {
                            "table": f"Close models, other divergences, relative error of the {quantity}",
                            "case": f"{name}, noise {noise:g}",
                            "provider": provider,
                            "error": relative_error(mine, true[index]),
                            **({"text": "negative"} if quantity == "loss" and mine < 0 < true[0] else {}),
                        }
                    )
    return results


def half_precision_rows(small: bool) -> list[dict[str, Any]]:
    """Return the errors of losses of bfloat16 and float16 inputs, and of exact results rounded once."""
    sizes, results = (16, 64, 300) if small else (256, 1024, 32000), list[dict[str, Any]]()
    cases = {"bfloat16 inputs (N 256, D 1024, V 32000, randn), relative error": liger_issue_1432(*sizes)}
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        cases[f"Close models in {name} (N 256, D 1024, V 32000), relative error"] = close_half(dtype, *sizes)
    for table, inputs in cases.items():
        for beta in (0.0, 0.5, 1.0):
            true = exact(inputs, beta=beta)
            for provider in (*PROVIDERS, ON_GPU, ROUNDED):
                got = half_precision_result(provider, inputs, beta, true)
                for index, name in enumerate(("loss", "hidden gradient", "weight gradient")):
                    error = relative_error(got[index], true[index])
                    case = f"beta {beta:g}, {name}"
                    results.append({"table": table, "case": case, "provider": provider, "error": error})
    return results


def half_precision_result(
    provider: str, inputs: Inputs, beta: float, true: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    if provider == ROUNDED:  # the best that a gradient in the inputs' dtype can be
        return true[0].float(), *(gradient.to(inputs[0].dtype) for gradient in true[1:])
    if provider != ON_GPU:
        return loss_and_gradients(provider, inputs, beta)
    with gpu_rules():
        return loss_and_gradients("fused-distill, torch", inputs, beta)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks the code paths")
    arguments = parser.parse_args()
    output = arguments.output or results_folder(arguments.small) / "numerics.json"
    write_json(output, {**header(), "rows": rows(arguments.small)})
    print(output)


if __name__ == "__main__":
    main()
