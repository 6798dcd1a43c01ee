"""Plot a token's term of each divergence against log p_t - log p_s, computed by the library's own functions.

    python bench/divergence_terms.py [--output FILE]

A term is proportional to the probabilities at a fixed ratio, so it is divided by their mean. The background
is transparent and text is gray, so that the plot can be read on light and dark pages.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from fused_distill.config import LossConfig, Scalars
from fused_distill.rows.divergences import Numbers, Outcomes, divergence_terms
from fused_distill.rows.elementwise import stable_prob_diff
from torch import Tensor

CURVES: dict[str, tuple[dict[str, Any], float | None]] = {
    "forward KL": ({"beta": 0.0}, None),
    "JSD, beta 0.5": ({"beta": 0.5}, None),
    "reverse KL": ({"beta": 1.0}, None),
    "skew_forward_kl, alpha 0.1": ({"divergence": "skew_forward_kl", "alpha": 0.1}, None),
    "skew_reverse_kl, alpha 0.1": ({"divergence": "skew_reverse_kl", "alpha": 0.1}, None),
    "mixed_kl, reverse_weight 0.5": ({"divergence": "mixed_kl"}, 0.5),
    "total_variation": ({"divergence": "total_variation"}, None),
}


def terms(d: Tensor, options: dict[str, Any], reverse_weight: float | None) -> Tensor:
    """Return the terms of tokens (n,) with log p_t - log p_s = d and p_t + p_s = 2."""
    config = LossConfig(**options)
    p_t, p_s = 2 * d.sigmoid(), 2 * (-d).sigmoid()
    outcomes = Outcomes(p_s, p_t, d, stable_prob_diff(p_s, p_t, d))
    weight = None if reverse_weight is None else torch.tensor([reverse_weight], dtype=d.dtype)
    numbers = Numbers.of(Scalars(*config.scalars(d.dtype).unbind()), weight)
    result = divergence_terms(outcomes, numbers, config.form) + numbers.imbalance * outcomes.difference
    return result.reshape(-1)


def main() -> None:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).parents[1] / "docs" / "divergence-terms.svg"
    parser.add_argument("--output", type=Path, default=default, help="SVG file")
    output = parser.parse_args().output
    rcParams.update({"svg.hashsalt": "fused-distill", "svg.fonttype": "none", "font.family": "sans-serif"})
    d = torch.linspace(-6, 6, 241, dtype=torch.float64)
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, (options, weight) in CURVES.items():
        axes.plot(d.tolist(), terms(d, options, weight).tolist(), label=name)
    gray = "#808080"
    axes.set_ylim(-2, 6)
    axes.set_xlabel("log p_t - log p_s", color=gray)
    axes.set_ylabel("term / mean of p_t and p_s", color=gray)
    axes.tick_params(colors=gray)
    axes.grid(color=gray, alpha=0.3)
    for side in axes.spines.values():
        side.set_color(gray)
    figure.legend(labelcolor=gray, framealpha=0, loc="outside right center", fontsize=9)
    figure.savefig(output, transparent=True, metadata={"Date": None})
    print(output)


if __name__ == "__main__":
    main()
