import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import DEVICE, EMULATED_GPU
from device import make_tensors_on_device, why_cpu_only
from hypothesis import HealthCheck, settings
from uninitialized import filled_uninitialized_memory

LOSS_FOLDERS = {"tests", "chunked", "rows", "parallel", "kernels", "helpers"}

# The same examples everywhere, so that a failure in CI can be repeated.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Make the tests' tensors on the device under test, and choose products that are repeatable."""
    make_tensors_on_device()
    # Chosen by a measurement, the library could differ between processes whose results must be equal.
    os.environ.setdefault("FUSED_DISTILL_CPU_PRODUCT", "torch")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: they may hold a time, and parallel processes must collect equal names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on a GPU what concerns the CPU only."""
    for item in items:
        reason = why_cpu_only(item.nodeid) if DEVICE.type != "cpu" else None
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let no test of a loss pass by what uninitialized memory happens to hold."""
    if request.path.parent.name not in LOSS_FOLDERS:
        yield
        return
    with filled_uninitialized_memory():
        yield


@pytest.fixture(autouse=EMULATED_GPU, scope="session")
def emulated_gpu() -> Iterator[None]:
    """Let all losses go the way of a GPU on the CPU."""
    from emulated_gpu import gpu_rules

    with gpu_rules():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Gemma 3 of six layers with a tokenizer of single characters, and return its folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny")
    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=30.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path
