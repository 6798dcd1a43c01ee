"""Patch TRL's distillation trainers to use the losses of this library.

    from fused_distill.compat.trl import patch_trl

    patch_trl()  # or: with patch_trl(): ...
    DistillationTrainer(...).train()

Two functions of TRL 1.16 (https://github.com/huggingface/trl) are replaced, for existing trainers as well:

- The function with which `DistillationTrainer` computes the loss from hidden states of completions becomes
  `fused_linear_jsd`.
- `ServerDistillationTrainer.compute_loss`, which computes logits of all tokens including prompts, runs the
  model with `fused_linear_topk_jsd` of the completion tokens in place of the output layer.

Losses, logged metrics and gradients equal TRL's within rounding for every beta, with PEFT adapters, DDP and
FSDP2. Differences:

- Logits are float32 where TRL's server trainer computes them in the model's dtype.
- With return_outputs=True, `compute_loss` returns None as outputs, in both trainers.
- An LM head sharded by FSDP2 gets the average of the ranks' gradients. With TRL's own loss each shard gets
  only the gradient of its own rank's tokens.
- An LM head that FSDP1 wraps separately raises an error.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..huggingface.forward import run_at_head
from ..huggingface.lm_head import checked_head, output_layer
from ..linear_jsd import fused_linear_jsd
from ..linear_topk_jsd import fused_linear_topk_jsd
from ..parallel.dtensor import gather_dtensor

_SUPPORTED = "1.16"
_replaced: list[tuple[Any, str, Any]] = []  # owner, name, TRL's function


def patch_trl() -> AbstractContextManager[Any]:
    """Patch TRL's `DistillationTrainer` and `ServerDistillationTrainer`. A second call has no effect.

    Returns:
        A context manager that calls `unpatch_trl` on exit if this call patched TRL. Using it is optional.

    Raises:
        ImportError: TRL is not installed, or its version is not 1.16.
        RuntimeError: a function to replace has another signature, e.g. because another library patched it.
    """
    if _replaced:
        return nullcontext()
    install = f"pip install 'trl=={_SUPPORTED}.*'"
    if find_spec("trl") is None:
        raise ImportError(f"fused_distill.compat.trl needs TRL: {install}")
    version = import_module("trl").__version__
    if not f"{version}.".startswith(f"{_SUPPORTED}."):
        raise ImportError(f"fused_distill.compat.trl supports TRL {_SUPPORTED}, found {version}: {install}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the notice of trl.experimental
        server = import_module("trl.experimental.server_distillation.server_distillation_trainer")
    replacements = (
        (import_module("trl.trainer.distillation_trainer"), "_chunked_divergence_loss", _divergence_loss),
        (server.ServerDistillationTrainer, "compute_loss", _server_loss),
    )
    originals = [(owner, name, _original(owner, name, new)) for owner, name, new in replacements]
    _replaced.extend(originals)  # all of them have the expected parameters
    for replacement in replacements:
        setattr(*replacement)
    stack = ExitStack()
    stack.callback(unpatch_trl)
    return stack


def unpatch_trl() -> None:
    """Restore TRL's own functions."""
    while _replaced:
        setattr(*_replaced.pop())


def _original(owner: Any, name: str, replacement: Any) -> Any:
    """Return TRL's function, whose parameters must be those of its replacement."""
    original = owner.__dict__.get(name)
    expected = list(inspect.signature(replacement).parameters)
    parameters = None if original is None else list(inspect.signature(original).parameters)
    if parameters != expected:
        raise RuntimeError(
            f"fused_distill.compat.trl expects {owner.__name__}.{name} to take {expected}, "
            f"found {'no such function' if parameters is None else parameters}"
        )
    return original


def _divergence_loss(
    student_hidden_states: Tensor,  # (B, C, Ds)
    teacher_hidden_states: Tensor,  # (B, C, Dt)
    student_lm_head_weight: Tensor,  # (V, Ds)
    teacher_lm_head_weight: Tensor,  # (V, Dt)
    completion_mask: Tensor,  # (B, C) int
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,  # (V,)
    teacher_lm_head_bias: Tensor | None = None,  # (V,)
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace `_chunked_divergence_loss`: return the loss, the summed student entropy and the token count."""
    mask = completion_mask != 0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(student_hidden_states.device).squeeze()
    with (
        _gathered(student_lm_head_weight, student_lm_head_bias, student_hidden_states) as student,
        _gathered(teacher_lm_head_weight, teacher_lm_head_bias, teacher_hidden_states) as teacher,
    ):
        loss, stats = fused_linear_jsd(
            student_hidden_states,
            student[0],
            teacher_hidden_states,
            teacher[0],
            mask=mask,
            student_bias=student[1],
            teacher_bias=teacher[1],
            beta=beta,
            temperature=temperature,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            normalizer=num_items_in_batch,
            return_stats=True,
        )
    return loss, stats.student_entropy.sum(), mask.sum()


def _server_loss(
    self: Any,
    model: Any,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """Replace `ServerDistillationTrainer.compute_loss`: return the mean over the batch's completion tokens.

    As in TRL, num_items_in_batch is ignored: micro-batches have equal weight, however many tokens they hold.
    """
    prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
    completion_mask = inputs["completion_mask"].bool()
    batch = {
        "input_ids": torch.cat([prompt_ids, completion_ids], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "prompt_attention_mask": inputs["prompt_mask"],
        "labels": torch.cat(
            [torch.full_like(prompt_ids, -100), completion_ids.masked_fill(~completion_mask, -100)], dim=1
        ),
    }
    student = self.accelerator.unwrap_model(model)
    checked_head(student, run=model)  # all processes are here at the same time
    teacher = self._get_teacher_token_logprobs_from_server(batch, prompt_ids.shape[1])
    # Inside the wrapper's forward, whose hooks DDP, FSDP and DeepSpeed rely on.
    loss = self._forward_redirection(
        model, student, _sparse_loss, self, student, batch, completion_ids, completion_mask, teacher
    )
    if self.model.training:
        loss = loss / self.current_gradient_accumulation_steps
    return (loss, None) if return_outputs else loss


def _sparse_loss(
    trainer: Any,
    student: Any,
    batch: dict[str, Tensor],
    completion_ids: Tensor,  # (B, C)
    completion_mask: Tensor,  # (B, C) bool
    teacher: dict[str, Tensor],  # (B, T) and (B, T, K), T <= C
) -> Tensor:
    """Return the loss, computed in place of the output layer: adapters and autocast apply as to logits."""
    n_scored = teacher["actual_logprobs"].shape[1]
    mask = completion_mask[:, :n_scored]
    logprobs, ids = _support(trainer.beta, teacher, completion_ids[:, :n_scored], mask)
    start = batch["input_ids"].shape[1] - completion_ids.shape[1] - 1
    student = trainer.accelerator.unwrap_model(student, keep_torch_compile=False)

    def loss(hidden: Tensor) -> Tensor:
        head, check = checked_head(student)
        n_logits = None if check is None else check.n_logits
        device = head.weight.device
        with _gathered(head.weight, head.bias, hidden) as (weight, bias):
            bias = None if bias is None else bias[:n_logits]
            return fused_linear_topk_jsd(
                hidden[:, start : start + n_scored].to(device),
                weight[:n_logits],
                logprobs.to(device),
                ids.to(device),
                tail="bucket" if trainer.loss_add_tail else "renormalize",
                mask=mask.to(device),
                beta=trainer.beta,
                temperature=trainer.temperature,
                **head._replace(bias=bias).options("student_"),
            )

    inputs = {"attention_mask": batch["attention_mask"], "use_cache": False}
    return run_at_head(student.forward, output_layer(student), loss, input_ids=batch["input_ids"], **inputs)


def _support(beta: float, teacher: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, T, K) log-probabilities and ids at which TRL compares the models.

    These are the teacher's top K for beta 0 and the sampled token for beta 1. Between them they are the
    teacher's top token and the sampled token, which count once if they are equal.
    """
    top, top_ids = teacher["topk_logprobs"], teacher["topk_token_ids"]
    if beta == 0:
        return top, top_ids
    actual, actual_ids = teacher["actual_logprobs"].unsqueeze(-1), tokens.unsqueeze(-1)
    if beta == 1:
        logprobs, ids = actual, actual_ids
    else:
        logprobs, ids = torch.cat([top, actual], -1), torch.cat([top_ids, actual_ids], -1)
    missing = int((mask & ~logprobs.isfinite().all(-1)).sum())
    if missing:
        raise ValueError(
            "the teacher server returned no log-probability of its top token or of the sampled token at "
            f"{missing} of {int(mask.sum())} completion tokens"
        )
    return logprobs, ids


@contextmanager
def _gathered(
    weight: Tensor, bias: Tensor | None, hidden: Tensor
) -> Generator[tuple[Tensor, Tensor | None], None, None]:
    """Yield an LM head's parameters as plain tensors, gathered from DeepSpeed ZeRO-3 or FSDP2.

    Raises:
        RuntimeError: the weight is sharded in a way that only the head's own forward gathers.
    """
    with import_module("trl.trainer.utils").maybe_gather_lm_head_ctx(weight, bias):
        # Shards of FSDP2 are float32; the gathered tensor gets the backbone's dtype.
        parameters: list[Any] = [weight, bias]
        weight, bias = (p if (g := gather_dtensor(p)) is p else g.to(hidden.dtype) for p in parameters)
        if weight.ndim != 2 or weight.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "the output layer's weight is sharded in a way that this loss cannot gather: "
                "use FSDP2 (fsdp_version: 2), or a wrap policy that does not wrap the output layer separately"
            )
        yield weight, bias
