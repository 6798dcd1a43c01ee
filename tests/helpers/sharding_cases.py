"""What two processes compute with a teacher that FSDP2 shards between them."""

from __future__ import annotations

from typing import Any

import torch
from fused_distill.trainer.config import TrainConfig
from fused_distill.trainer.data import Batch, Sample
from fused_distill.trainer.sharding import resident_bytes
from fused_distill.trainer.student import load_pretrained
from fused_distill.trainer.teachers import load_teachers
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

BATCHES = ([Sample(0, [5, 6, 7], [8, 9]), Sample(1, [11], [12])], [Sample(2, [9, 5], [30, 31, 32])])


def teacher_targets(rank: int, config: TrainConfig, shard: bool) -> tuple[list[Any], set[str], int]:
    """Return a rank's numbers of the teacher for a batch of its own, what is sharded, and its bytes."""
    device = torch.device("cpu")
    tokenizer = load_pretrained(AutoTokenizer, "student", config.student)
    teacher: Any = load_teachers(config, tokenizer, device, shard=shard)[""]
    batch = Batch.collate(BATCHES[rank], device)
    ids = torch.tensor([[3, 4]]).expand(len(batch.valid), 2) if teacher.settings.targets != "full" else None
    numbers = []
    for _ in range(2):  # the second time its LM head is whole already
        targets = teacher.targets(batch, ids)
        pair = (targets.head.logits(targets.hidden),) if ids is None else (targets.logprobs, targets.ids)
        numbers += [tensor.numpy() for tensor in pair]
    sharded = {name for name, p in teacher.model.named_parameters() if isinstance(p, DTensor)}
    return numbers, sharded, resident_bytes(teacher.model)
