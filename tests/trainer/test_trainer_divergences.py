"""The settings of the divergence and of token weights reach the losses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_distill.huggingface.lm_head import LMHeadParams
from fused_distill.reference import linear_jsd, linear_topk_jsd
from fused_distill.trainer.config import ConfigError, TrainConfig
from fused_distill.trainer.targets import FullTargets, TopKTargets, distillation_loss
from torch import Tensor
from trainer_cases import NOT_INTERPRETED, Lab
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED

N, V, D, K = 20, 30, 8, 4


def teacher_of(config: TrainConfig) -> Any:
    return SimpleNamespace(settings=config.teacher, vocab_size=V)


def make_targets(topk: bool) -> tuple[Tensor, Tensor, FullTargets | TopKTargets]:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    head, teacher_head = (torch.randn(V, D, generator=generator, dtype=torch.float64) for _ in range(2))
    if not topk:
        return hidden, head, FullTargets(teacher, LMHeadParams(teacher_head, None, 1.0, None))
    top = (teacher @ teacher_head.T).log_softmax(-1).topk(K)
    return hidden, head, TopKTargets(top.values, top.indices)


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "skew_forward_kl", "alpha": 0.3},
        {"divergence": "skew_reverse_kl"},
        {"divergence": "mixed_kl", "reverse_weight": 0.2},
        {"divergence": "total_variation"},
        {"beta": 0.0, "entry_clip": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("topk", [False, True])
def test_the_divergence_of_the_settings_is_the_loss(
    lab: Lab, tmp_path: Path, settings: dict[str, Any], topk: bool
) -> None:
    overrides = [f"{name}={value}" for name, value in settings.items()]
    config = lab.config(tmp_path, *overrides, f"teacher.targets={'topk' if topk else 'full'}")
    hidden, head, targets = make_targets(topk)
    student = LMHeadParams(head, None, 1.0, None)
    loss, _ = distillation_loss(hidden, student, targets, 5.0, config, teacher_of(config))
    if isinstance(targets, TopKTargets):
        expected = linear_topk_jsd(hidden, head, *targets, normalizer=5.0, **settings)
    else:
        expected = linear_jsd(hidden, head, targets.hidden, targets.head.weight, normalizer=5.0, **settings)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("rule", ["entropy_below: 1.4", "top_fraction: 0.21"])
def test_a_token_weight_rule_keeps_the_tokens_that_it_names(
    lab: Lab, tmp_path: Path, rule: str, topk: bool
) -> None:
    hidden, head, targets = make_targets(topk)
    arguments = hidden, LMHeadParams(head, None, 1.0, None), targets, 1.0
    overrides = f"teacher.targets={'topk' if topk else 'full'}", "beta=0.0"
    config = lab.config(tmp_path, *overrides)
    _, stats = distillation_loss(*arguments, config, teacher_of(config))
    if "below" in rule:
        chosen = stats.teacher_entropy < 1.4
    else:  # the five most uncertain of 20 tokens
        chosen = torch.zeros(N, dtype=torch.bool)
        chosen[stats.student_entropy.argsort(descending=True)[:5]] = True
    assert 0 < int(chosen.sum()) < N
    config = lab.config(tmp_path, *overrides, f"token_weight={{{rule}}}")
    loss, _ = distillation_loss(*arguments, config, teacher_of(config))
    torch.testing.assert_close(loss, stats.forward_kl[chosen].sum())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("divergence=kl", "divergence: .*'jsd'.*'mixed_kl'"),
        ("alpha=1", "alpha: .*less than 1"),
        ("alpha=0.2", "alpha is an option of a skewed KL, got 0.2 with .jsd."),
        ("reverse_weight=0.2", "reverse_weight is a setting of divergence mixed_kl, got jsd"),
        ("entry_clip=0", "entry_clip: .*greater than 0"),
        ("token_weight={entropy_below: 1, top_fraction: 0.5}", "token_weight: must have one of"),
        ("token_weight={}", "token_weight: must have one of entropy_below and top_fraction"),
        ("token_weight={top_fraction: 2}", "token_weight.top_fraction: .*less than or equal to 1"),
    ],
)
def test_settings_that_no_loss_takes_are_named(lab: Lab, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lab.config(tmp_path, override)
