"""Weight synchronisation over NCCL to a vLLM server on other GPUs, by vLLM's own weight transfer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ..huggingface.adapters import adapted_tied_weights, base_weights, check_mergeable, merged_weights
from ..serving.client.retry import RetryingClient, RetryPolicy
from .vllm import check_reset

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class NcclWeightSync:
    """Send a model's weights to a vLLM server without going through a disk.

    The server must run with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "nccl"}', and
    vLLM must be installed in the trainer's environment. With several trainer processes, each constructs this
    object and calls `sync`; the first process sends. Sharded parameters (FSDP2) are gathered one by one.

    Args:
        url: the server.
        model: a model whose parameters have the names of the server's checkpoint. Of a PEFT model the server
            gets the weights with the LoRA adapters merged into them, which must be plain ones and not of a
            layer that shares its weight, e.g. a tied LM head.
        address: address of this machine as seen from the server's GPUs.
        port: a free port of this machine.
        token: bearer token.
        rank: rank of this trainer process.
        timeout_seconds: limit between two bytes of a response.
        transport: httpx transport.

    Raises:
        ImportError: vLLM is missing.
        ValueError: the model's adapters cannot be merged (the message names the layer).
        ServerError: the server refused, e.g. because it runs without VLLM_SERVER_DEV_MODE=1.
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
            from vllm.distributed import weight_transfer  # pyright: ignore[reportMissingImports]
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo  # pyright: ignore
        except ImportError as error:
            raise ImportError("NcclWeightSync needs vLLM in this environment: pip install vllm") from error
        _check_adapters(model)
        self._model = model
        once = RetryPolicy(attempts=1)
        self._control = _Control(
            url, token=token, timeout_seconds=timeout_seconds, retries=once, transport=transport
        )
        self._is_first = rank == 0
        workers = self._control.world_size() if self._is_first else 0
        self._engine: Any = weight_transfer.WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=workers + 1),
            client=self._control,
            source=_weight_source(weight_transfer, model),
        )

    def sync(self) -> None:
        """Send the current weights and reset the server's prefix cache.

        Raises:
            ValueError: the model has got adapters that cannot be merged. Nothing was sent.
        """
        _check_adapters(self._model)
        self._engine.send_weights()
        if self._is_first:
            self._control.call("POST", "/reset_prefix_cache", check_reset)

    def close(self) -> None:
        """Leave the NCCL group and close the connection."""
        self._engine.shutdown()
        self._control.close()


def _check_adapters(model: Any) -> None:
    if not hasattr(model, "get_base_model"):
        return
    check_mergeable(model)
    if tied := adapted_tied_weights(model):
        raise ValueError(
            f"model must not have adapters of layers that share their weight, got one of {tied[0]}: vLLM has "
            "no second version of the weight"
        )


def _weight_source(weight_transfer: Any, model: nn.Module) -> Any:
    """Return the weights of a model as vLLM's sender reads them."""
    if not hasattr(model, "get_base_model"):
        return weight_transfer.ModuleSource(model)

    class MergedWeights(weight_transfer.WeightSource):
        """The weights of a PEFT model, each merged when it is sent."""

        def metadata(self) -> list[Any]:
            weights = base_weights(model, dict(model.named_parameters()))
            return [weight_transfer.ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in weights]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return merged_weights(model, dict(model.named_parameters()))

    return MergedWeights()


class _Control(RetryingClient):
    """HTTP calls that vLLM's sender makes. None is retried, because the server waits for NCCL inside them."""

    def call(self, method: str, path: str, decode: Callable[[httpx.Response], T], body: object = None) -> T:
        return self.send(method, path, time.monotonic() + self.timeout_seconds, decode, body)

    def world_size(self) -> int:
        return self.call("GET", "/get_world_size", lambda r: int(r.json()["world_size"]))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", init_info=init_info)

    def shutdown_weight_transfer_engine(self) -> None:
        self._post("/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", weight_version=weight_version)

    def _post(self, path: str, **body: Any) -> None:
        self.call("POST", path, lambda _: None, body)
