"""The student's weights to a vLLM server on other GPUs over NCCL, by vLLM's own weight transfer."""

from __future__ import annotations

import time
from typing import Any

import httpx
from torch import nn

from ..serving.client.retry import RetryingClient, RetryPolicy
from .vllm import check_emptied


class NcclWeightSync:
    """Sends a model's weights, after every optimizer step or every few, without a disk between.

    The server must run with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "nccl"}', and
    vLLM must be installed beside the trainer. With several trainer processes every one makes this object and
    calls `sync`; the first sends. Sharded parameters (FSDP2) are gathered one by one.

    Args:
        url: the server.
        model: whose parameters have the names of the server's checkpoint.
        address: of this machine, as the server's GPUs reach it.
        port: free on this machine.
        token: bearer token.
        rank: of this trainer process.
        timeout_seconds: between two bytes of an answer.
        transport: of httpx.

    Raises:
        ImportError: without vLLM.
        ServerError: the server refused, say for want of VLLM_SERVER_DEV_MODE=1.
    """

    def __init__(
        self,
        url: str,
        model: nn.Module,
        *,
        address: str,
        port: int,
        token: str | None = None,
        rank: int = 0,
        timeout_seconds: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ):
        try:
            from vllm.distributed.weight_transfer import (  # pyright: ignore[reportMissingImports]
                ModuleSource,
                WeightTransferTrainerFactory,
            )
            from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
                NCCLTrainerInitInfo,
            )
        except ImportError as error:
            raise ImportError("NcclWeightSync needs vLLM beside the trainer: pip install vllm") from error
        self._control = _Control(url, token, timeout_seconds, transport)
        self._is_first = rank == 0
        workers = self._control.world_size() if self._is_first else 0
        self._engine: Any = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=workers + 1),
            client=self._control,
            source=ModuleSource(model),
        )

    def sync(self) -> None:
        """Send the weights as they are now; the server's prefix cache is emptied."""
        self._engine.send_weights()
        if self._is_first:
            self._control.reset_prefix_cache()

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()
        self._control.close()


class _Control:
    """The calls that vLLM's sender makes. None is repeated: the server waits for NCCL inside them."""

    def __init__(
        self, url: str, token: str | None, timeout_seconds: float, transport: httpx.BaseTransport | None
    ):
        self.timeout_seconds = timeout_seconds
        self._http = RetryingClient(
            url,
            token=token,
            timeout_seconds=timeout_seconds,
            retries=RetryPolicy(attempts=1),
            transport=transport,
        )
        self.close = self._http.close

    def world_size(self) -> int:
        deadline = time.monotonic() + self.timeout_seconds
        return self._http.send("GET", "/get_world_size", deadline, lambda r: int(r.json()["world_size"]))

    def post(self, path: str, **body: Any) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        self._http.send("POST", path, deadline, lambda _: None, body)

    def reset_prefix_cache(self) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        self._http.send("POST", "/reset_prefix_cache", deadline, check_emptied)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("/init_weight_transfer_engine", init_info=init_info)

    def shutdown_weight_transfer_engine(self) -> None:
        self.post("/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("/update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", weight_version=weight_version)
