"""Probability outside a teacher's top K tokens, and the loss of each tail mode against K, on real models.

    make demo && python bench/tails.py [--teacher PATH] [--student outputs/demo/student] [--output FILE]

The student generates completions of the demo's prompts; both models are compared at every completion token,
as in on-policy distillation. JSON and a plot go to bench/results/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from fused_distill import fused_linear_jsd, fused_linear_topk_jsd, topk_logprobs
from fused_distill.huggingface.lm_head import lm_head_of
from fused_distill.rollouts.base import Sampling
from fused_distill.rollouts.transformers import TransformersRollouts
from fused_distill.trainer.data import Batch, Sample
from suite import ROOT, header, results_folder, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SUPPORTS = (1, 4, 16, 64, 256, 1024)
BETAS = (0.0, 0.5, 1.0)
BATCH_SIZE = 8
TAILS = ("bucket", "renormalize", "truncate")


@torch.no_grad()
def states_and_head(model: Any, batches: list[Batch]) -> tuple[Tensor, Tensor, float | None]:
    """Return the states (n, D) that predict completion tokens, the LM head's weight and its softcap."""
    decoder = model.get_decoder()
    outputs = [(b, decoder(input_ids=b.tokens, attention_mask=b.attention)) for b in batches]
    states = torch.cat([b.pack(output.last_hidden_state) for b, output in outputs])
    head = lm_head_of(model)
    return states, head.weight.detach(), head.softcap


def rows(teacher: Any, student: Any, batches: list[Batch]) -> list[dict[str, Any]]:
    (hs, ws, softcap_s), (ht, wt, softcap_t) = (states_and_head(m, batches) for m in (student, teacher))
    results: list[dict[str, Any]] = []
    for beta in BETAS:
        full = fused_linear_jsd(
            hs, ws, ht, wt, beta=beta, student_softcap=softcap_s, teacher_softcap=softcap_t
        )
        results.append({"beta": beta, "tail": "full", "loss": full.item(), "tokens": len(hs)})
    for k in SUPPORTS:
        top = topk_logprobs(ht, wt, k, softcap=softcap_t)
        student_ids = topk_logprobs(hs, ws, k, softcap=softcap_s).ids
        at_student_ids = topk_logprobs(ht, wt, 0, student_ids, softcap=softcap_t).actual_logprobs
        assert at_student_ids is not None
        supports = (("teacher", top.logprobs, top.ids), ("student", at_student_ids, student_ids))
        for support, logprobs, ids in supports:
            for tail in TAILS:
                for beta in BETAS:
                    loss, stats = fused_linear_topk_jsd(
                        hs,
                        ws,
                        logprobs,
                        ids,
                        tail=tail,
                        beta=beta,
                        student_softcap=softcap_s,
                        return_stats=True,
                    )
                    row = {"k": k, "support": support, "tail": tail, "beta": beta, "loss": loss.item()}
                    if stats.student_mass is not None and stats.teacher_mass is not None:
                        row["student_rest"] = (1 - stats.student_mass).mean().item()
                        row["teacher_rest"] = (1 - stats.teacher_mass).mean().item()
                    results.append(row)
    return results


def plot(content: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = content["rows"]
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    mass, *losses = figure.subplots(1, 1 + len(BETAS))
    for support, style in (("teacher", "-"), ("student", "--")):
        selected = [r for r in rows if r["tail"] == "bucket" and r["beta"] == 0 and r["support"] == support]
        for model, color in (("teacher", "C0"), ("student", "C1")):
            values = [r[f"{model}_rest"] for r in selected]
            mass.plot(SUPPORTS, values, style, color=color, label=f"{model}'s, outside the {support}'s top K")
    mass.set_title("mean mass outside the K tokens", fontsize=9, loc="left")
    mass.set_yscale("log")
    mass.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"], minor=False)
    mass.minorticks_off()
    for axes, beta in zip(losses, BETAS, strict=True):
        full = next(r["loss"] for r in rows if r["tail"] == "full" and r["beta"] == beta)
        axes.axhline(full, color="k", linewidth=0.8, label="full vocabulary")
        for tail, color in zip(TAILS, ("C2", "C3", "C4"), strict=True):
            for support, style in (("teacher", "-"), ("student", "--")):
                selected = [
                    r for r in rows if (r["tail"], r["beta"]) == (tail, beta) and r["support"] == support
                ]
                label = f"{tail}, {support}'s top K"
                axes.plot(SUPPORTS, [r["loss"] for r in selected], style, color=color, label=label)
        axes.set_title(f"loss, beta {beta:g}", fontsize=9, loc="left")
    for axes in (mass, *losses):
        axes.set_xscale("log", base=4)
        axes.set_xticks(SUPPORTS, [str(k) for k in SUPPORTS])
        axes.set_xlabel("K", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    mass.legend(fontsize=6, frameon=False)
    figure.legend(
        *losses[-1].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside right center"
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="outputs/demo/teacher", help="local path or hub name")
    parser.add_argument("--student", default="outputs/demo/student", help="local path or hub name")
    parser.add_argument("--output", type=Path, default=results_folder(False) / "tails.json")
    parser.add_argument("--prompts", type=int, default=80)
    arguments = parser.parse_args()
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        for name in (arguments.teacher, arguments.student)
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.teacher)
    lines = (ROOT / "examples" / "prompts.txt").read_text().splitlines()[: arguments.prompts]
    prompts = [tokenizer(line)["input_ids"] for line in lines]
    completions = TransformersRollouts(student, BATCH_SIZE).generate(prompts, Sampling(max_tokens=32, seed=0))
    samples = [Sample(c.group, c.prompt, c.tokens) for c in completions]
    batches = [
        Batch.collate(samples[i : i + BATCH_SIZE], torch.device("cpu"))
        for i in range(0, len(samples), BATCH_SIZE)
    ]
    content = {**header(), "rows": rows(teacher, student, batches)}
    write_json(arguments.output, content)
    plot(content, arguments.output.with_suffix(".png"))
    print(arguments.output)


if __name__ == "__main__":
    main()
