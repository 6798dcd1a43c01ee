"""This library's losses under TRL's distillation trainers.

    from fused_distill.compat.trl import patch_trl

    patch_trl()  # or: with patch_trl(): ...
    DistillationTrainer(...).train()

Two places of TRL 1.16 (https://github.com/huggingface/trl) are replaced, for trainers that exist already too:

- `DistillationTrainer`'s function from the completions' hidden states to the loss becomes `fused_linear_jsd`.
- `ServerDistillationTrainer.compute_loss`, which has the model make logits of all tokens, prompts included,
  runs the model with `fused_linear_topk_jsd` of its completion tokens in the output layer's place.

The losses are TRL's own within rounding, for every beta, with what TRL logs; so are the gradients with PEFT
adapters, DDP and FSDP2. Where TRL's server trainer computes in the model's dtype, logits are float32 here;
asked for its outputs it gives None, as `DistillationTrainer` does. A head that FSDP2 keeps in shards gets the
average of the ranks' gradients; TRL's own loss leaves each shard the gradient of its own rank's tokens alone.
A head that FSDP1 wraps by itself is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..huggingface.lm_head import lm_head_of
from ..linear_jsd import fused_linear_jsd
from ..linear_topk_jsd import fused_linear_topk_jsd
from ..parallel.dtensor import gather_dtensor

_KNOWN = "1.16"
_replaced: list[tuple[Any, str, Any]] = []  # owner, name, TRL's own


def patch_trl() -> AbstractContextManager[Any]:
    """Put the losses under TRL's `DistillationTrainer` and `ServerDistillationTrainer`; twice is once.

    Returns:
        A context manager whose end calls `unpatch_trl`, if this call patched. It need not be used.

    Raises:
        ImportError: TRL is missing, or of another version than 1.16.
        RuntimeError: TRL is not built as that version is, for instance changed by another library.
    """
    if _replaced:
        return nullcontext()
    _check_version()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of trl.experimental, for those who asked for it
        server = import_module("trl.experimental.server_distillation.server_distillation_trainer")
    replacements = (
        (import_module("trl.trainer.distillation_trainer"), "_chunked_divergence_loss", _divergence_loss),
        (server.ServerDistillationTrainer, "compute_loss", _server_loss),
    )
    found = [(owner, name, _known(owner, name, ours), ours) for owner, name, ours in replacements]
    for owner, name, theirs, ours in found:
        _replaced.append((owner, name, theirs))
        setattr(owner, name, ours)
    stack = ExitStack()
    stack.callback(unpatch_trl)
    return stack


def unpatch_trl() -> None:
    """Give TRL its own functions back."""
    while _replaced:
        setattr(*_replaced.pop())


def _check_version() -> None:
    install = f"pip install 'trl=={_KNOWN}.*'"
    if find_spec("trl") is None:
        raise ImportError(f"fused_distill.compat.trl needs TRL: {install}")
    version = import_module("trl").__version__
    if not f"{version}.".startswith(f"{_KNOWN}."):
        raise ImportError(f"fused_distill.compat.trl knows TRL {_KNOWN}, found {version}: {install}")


def _known(owner: Any, name: str, ours: Any) -> Any:
    """TRL's own `name`, which takes what `ours` takes."""
    theirs = vars(owner).get(name)
    expected = list(inspect.signature(ours).parameters)
    found = None if theirs is None else list(inspect.signature(theirs).parameters)
    if found != expected:
        raise RuntimeError(
            f"fused_distill.compat.trl expects {owner.__name__}.{name} to take {expected}, "
            f"found {'no such function' if found is None else found}"
        )
    return theirs


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
    """TRL's `_chunked_divergence_loss`: the loss, the sum of student entropies, the number of tokens."""
    mask = completion_mask != 0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(student_hidden_states.device)
    with (
        _whole(student_lm_head_weight, student_lm_head_bias, student_hidden_states) as (weight, bias),
        _whole(teacher_lm_head_weight, teacher_lm_head_bias, teacher_hidden_states) as teachers,
    ):
        loss, stats = fused_linear_jsd(
            student_hidden_states,
            weight,
            teacher_hidden_states,
            teachers[0],
            mask=mask,
            student_bias=bias,
            teacher_bias=teachers[1],
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
    """TRL's `ServerDistillationTrainer.compute_loss`: the mean over the batch's completion tokens.

    As there, num_items_in_batch is left alone and a step of gradient accumulation counts as much as another,
    whatever its number of tokens.
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
    teacher = self._get_teacher_token_logprobs_from_server(batch, prompt_ids.shape[1])
    student = self.accelerator.unwrap_model(model)
    # In the wrapper's forward, so that DDP, FSDP and DeepSpeed see it.
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
    n_scored = teacher["actual_logprobs"].shape[1]
    mask = completion_mask[:, :n_scored]
    logprobs, ids = _support(trainer.beta, teacher, completion_ids[:, :n_scored], mask)
    start = batch["input_ids"].shape[1] - completion_ids.shape[1] - 1
    student = trainer.accelerator.unwrap_model(student, keep_torch_compile=False)

    def loss(hidden: Tensor) -> Tensor:
        head = lm_head_of(student)
        device = head.weight.device
        with _whole(head.weight, head.bias, hidden) as (weight, bias):
            return fused_linear_topk_jsd(
                hidden[:, start : start + n_scored].to(device),
                weight,
                logprobs.to(device),
                ids.to(device),
                tail="bucket" if trainer.loss_add_tail else "renormalize",
                mask=mask.to(device),
                beta=trainer.beta,
                temperature=trainer.temperature,
                **head._replace(bias=bias).options("student_"),
            )

    return _for_logits(student, loss, batch["input_ids"], batch["attention_mask"])


def _for_logits(
    student: Any, function: Callable[[Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """`function` of the hidden states (B, T, D) that the student's forward gives its output layer.

    It is called in that layer's place, a number where the logits were, so that adapters, autocast and
    whatever else is around the student's parts do what they do for logits.
    """
    layer = student.get_output_embeddings()
    own, results = layer.forward, []
    hook = layer.register_forward_hook(lambda _module, _inputs, result: results.append(result))
    layer.forward = function
    try:
        student.forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        layer.forward = own
        hook.remove()
    return results[0]


def _support(beta: float, teacher: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, K) log-probabilities and ids at which TRL compares.

    The teacher's top K for beta 0, the sampled token for beta 1, else the teacher's likeliest and the sampled
    token, which count once where they are the same.
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
            "the teacher server gave no log-probability of its likeliest or of the sampled token at "
            f"{missing} of {int(mask.sum())} completion tokens"
        )
    return logprobs, ids


@contextmanager
def _whole(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A head's parameters as ordinary tensors: DeepSpeed ZeRO-3's whole meanwhile, FSDP2's gathered.

    Raises:
        RuntimeError: the weight is in shards that only the head's own forward gathers.
    """
    with import_module("trl.trainer.utils").maybe_gather_lm_head_ctx(weight, bias):
        weight, bias = _plain(weight, hidden), _plain(bias, hidden)
        if weight.ndim != 2 or weight.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "the output layer's weight is in shards that this loss cannot gather: "
                "use FSDP2 (fsdp_version: 2), or a wrap policy that does not wrap the output layer by itself"
            )
        yield weight, bias


def _plain(parameter: Any, hidden: Tensor) -> Any:
    """FSDP2's DTensor, float32 shards, as an ordinary tensor of the backbone's dtype."""
    gathered = gather_dtensor(parameter)
    return parameter if gathered is parameter else gathered.to(hidden.dtype)
