"""The demo, run as a user runs it, on a model small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 of three layers with a tokenizer of single characters."""
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


def run_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, DEMO, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def output(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("output")
    done = run_demo("--teacher", tiny_model, "--steps", "2", "--output", path)
    assert done.returncode == 0, done.stderr
    return path


def test_it_leaves_a_plot_and_metrics(output: Path) -> None:
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["held_out_reverse_kl"]) == {"0", "2"}
    assert len(metrics["training_reverse_kl"]) == 2
    assert (output / "reverse_kl.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_student_loads_with_a_third_of_the_layers(output: Path) -> None:
    student = transformers.AutoModelForCausalLM.from_pretrained(output / "student")
    assert student.config.num_hidden_layers == 2
    assert len(student.get_decoder().layers) == 2


@pytest.mark.parametrize("option", [("--steps", "0"), ("--beta", "1.5"), ("--device", "nowhere")])
def test_a_bad_option_is_named_in_one_line(option: tuple[str, str]) -> None:
    done = run_demo(*option)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"demo.py: error: {option[0]}")
