"""The LM head as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fused_distill.huggingface.lm_head import LMHeadParams
from fused_distill.serving.protocol.lm_head import load_head, save_head


def test_a_loaded_head_equals_the_saved_one(tmp_path: Path) -> None:
    head = LMHeadParams(torch.randn(5, 3).bfloat16(), torch.randn(5), 0.25, None)
    save_head(head, tmp_path / "head")
    got = load_head(tmp_path / "head")
    assert got.bias is not None
    assert head.bias is not None
    assert torch.equal(got.weight, head.weight)
    assert torch.equal(got.bias, head.bias)
    assert got[2:] == (0.25, None)


def test_a_file_that_is_no_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="must be a teacher's LM head"):
        load_head(tmp_path / "head")
