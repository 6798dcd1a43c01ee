"""A local teacher that is sharded between the processes of a run, as the student is."""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .long_sequences import checkpointed_layers


def resident_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters in this process.

    Of the layers that `shard_teacher` shards only this process's part counts; what is outside them is whole
    after the first forward pass.
    """
    in_layers = {id(p) for layer in checkpointed_layers(model) for p in layer.parameters()}
    parameters = [
        p.to_local() if isinstance(p, DTensor) and id(p) in in_layers else p for p in model.parameters()
    ]
    return sum(p.numel() * p.element_size() for p in parameters)


def shard_teacher(model: PreTrainedModel, device: torch.device) -> None:
    """Shard a model's layers by FSDP2 and move each process's part to its device.

    All processes must run the model together. What is outside the layers, e.g. embedding and LM head, is
    whole in every process after the first forward pass, because the loss needs the whole LM head.

    Args:
        model: on the CPU, where it may be larger than the memory of a device.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in checkpointed_layers(model):  # each is moved when it is sharded
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
