"""Tests of report.html: its parts, its curves, and its layout in a browser."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, lay_out
from fused_distill.trainer.charts import MAX_POINTS, Series, binned, line_chart, smoothed, stacked_chart
from fused_distill.trainer.config import TrainConfig
from fused_distill.trainer.loop import train
from fused_distill.trainer.report import before_and_after, render, write_report
from trainer_cases import NOT_INTERPRETED, Lab
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED

LONG = "/a/very/long/path" * 30


def config(**changes: Any) -> TrainConfig:
    settings = {"student": f"{LONG}/student", "teacher": {"model": f"{LONG}/teacher"}, "data": {"path": LONG}}
    return TrainConfig.model_validate(settings | {"output": "out", "steps": 3000} | changes)


def rows(steps: int = 60) -> list[dict[str, Any]]:
    """Return a run of alternating on-policy and off-policy steps with an evaluation every 20 steps."""
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        losses = {"loss": 3 / (1 + step / 20), "topk_forward_kl": 2.0, "top1_agreement": step / steps}
        if step:
            policy = "on_policy" if step % 2 else "off_policy"
            times = {"rollout_seconds": 1.0, "teacher_seconds": 0.5, "update_seconds": 2.0}
            policies = {f"{policy}/{name}": value for name, value in losses.items()}
            row = {"step": step, "kind": "train", **losses, **policies, **times, "learning_rate": 1e-5}
            found.append(row | {"math/loss": losses["loss"], "grad_norm": float("inf") if step == 7 else 1.0})
        if step % 20 == 0:
            samples = [
                {"prompt": "<b>2 + 2 = " + "x" * 500, "completion": f" {step}</pre>" + "word " * 90}
            ] * 3
            found.append({"step": step, "kind": "evaluation", **losses, "samples": samples})
    return found


class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects attributes and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "link", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_takes_nothing_from_elsewhere() -> None:
    page = render(config(), rows(), ["steps were <empty>"])
    tags = Tags(page)
    assert tags.open == []
    assert not {tag for tag, _, _ in tags.attributes} & {"script", "img", "iframe"}
    assert {value for _, name, value in tags.attributes if name in ("src", "href")} == {"data:,"}
    assert "url(" not in page
    assert "@import" not in page
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


def test_every_picture_is_as_wide_as_its_place() -> None:
    tags = Tags(render(config(), rows()))
    sizes = {(name, value) for tag, name, value in tags.attributes if tag == "svg"}
    assert {("width", "100%"), ("viewbox", "0 0 400 210")} <= sizes
    assert not {value for name, value in sizes if name == "height"}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_in_a_browser_nothing_is_wider_than_the_window_and_the_console_is_empty(tmp_path: Path) -> None:
    layouts, console = lay_out(render(config(), rows(), ["warning " * 30]), (360, 800, 1600), tmp_path)
    assert console == []
    for layout in layouts:
        assert layout.elements > 300
        assert layout.scroll_width <= layout.width
        assert layout.too_wide == []


def test_the_summary_names_student_teacher_changed_settings_and_progress() -> None:
    text = Tags(render(config(beta=0.125, lmbda=0.5), rows())).text
    summary = text[: text.index("All settings")]
    assert f"student{LONG}/student" in summary
    assert f"teacher.model{LONG}/teacher" in summary
    assert "60 of 3000 steps" in summary
    assert "beta0.125" in summary
    assert "lmbda0.5" in summary
    assert "keep_checkpoints" not in summary  # has its default
    assert "None" not in summary
    assert "keep_checkpoints2" in text


def test_passwords_in_addresses_are_not_in_the_report() -> None:
    page = render(config(teacher={"url": "http://user:secret@host:8000"}), rows())
    assert "secret" not in page
    assert "host:8000" in page


def test_before_and_after_are_the_first_and_the_last_evaluation() -> None:
    values = {name: (before, after) for name, before, after in before_and_after(rows())}
    assert values["loss"] == (3.0, 0.75)
    assert values["top1_agreement"] == (0.0, 1.0)
    assert before_and_after([]) == []
    text = Tags(render(config(), rows())).text
    assert "Loss (nats per token)30.75" in text
    assert "held-out promptsstep 0step 60" in text


def test_policies_and_teachers_have_curves_of_their_own() -> None:
    page = render(config(), rows())
    loss = next(f for f in page.split("<figure>") if f.startswith("<figcaption>Loss"))
    for label in ("on-policy", "off-policy", "held-out prompts", "math"):
        assert f"</i>{label}</span>" in loss
    assert "</i>training</span>" not in loss  # would hide the difference
    rate = next(f for f in page.split("<figure>") if f.startswith("<figcaption>Learning rate"))
    assert "</i>training</span>" in rate


def test_metrics_of_top_k_targets_are_named_so() -> None:
    page = render(config(), [*rows(), {"step": 60, "kind": "evaluation", "sampled_reverse_kl": 1.0}])
    assert "(nats per token) over the top-k outcomes" in page
    assert "(nats per token), estimated from the sampled tokens" in page


def test_samples_of_the_first_and_the_last_evaluation_are_side_by_side() -> None:
    text = Tags(render(config(), rows())).text
    samples = text[text.index("Completions of held-out prompts") : text.index("All settings")]
    assert re.findall(r"step (\d+)", samples) == ["0", "60"] * 3
    assert samples.count("<b>2 + 2 = x") == 3
    assert "60</pre>word" in samples


def test_a_run_that_has_just_begun_has_a_report() -> None:
    assert "There was no evaluation" in render(config(), [])
    [evaluation] = [row for row in rows() if row["kind"] == "evaluation"][:1]
    for some in ([evaluation], rows(1), [row | {"samples": []} for row in rows(1)]):
        assert Tags(render(config(), some)).open == []


def test_a_warning_is_at_the_top() -> None:
    text = Tags(render(config(), rows(), ["all completions were empty"])).text
    assert text.index("all completions were empty") < text.index("Before and after")


def test_the_report_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(output=str(tmp_path))
    write_report(settings, rows(1))
    before = (tmp_path / "report.html").read_text()

    def full_disk(self: Path, *_: object, **__: object) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(settings, rows())
    assert (tmp_path / "report.html").read_text() == before


@pytest.mark.parametrize("place", ["update", "save"])
def test_a_run_that_crashes_leaves_a_report(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from fused_distill.trainer.loop import Trainer

    method, calls = getattr(Trainer, place), []

    def fail_at_step_3(self: Trainer, *arguments: Any) -> Any:
        calls.append(1)
        if place == "save" or len(calls) == 3:
            raise RuntimeError("crashed")
        return method(self, *arguments)

    monkeypatch.setattr(Trainer, place, fail_at_step_3)
    overrides = ("save_every=2", "data.evaluation_prompts=0") if place == "update" else ("steps=2",)
    with pytest.raises(RuntimeError, match="crashed"):
        train(lab.config(tmp_path, *overrides))
    assert "2 of " in Tags((tmp_path / "report.html").read_text()).text


def test_values_that_are_not_finite_are_left_out_of_curves() -> None:
    chart = line_chart("norm", [Series("a", [(1, 1.0), (2, float("nan")), (3, 2.0), (4, float("inf"))])])
    assert "nan" not in chart
    assert "inf" not in chart
    assert line_chart("norm", [Series("a", [(1, float("nan"))])]) == ""


@pytest.mark.parametrize("value", [0.0, -1.5, 1e-9, 3.0, 1e12])
def test_a_constant_curve_and_a_single_point_are_drawn(value: float) -> None:
    for points in ([(5.0, value)], [(5.0, value), (6.0, value)]):
        for chart in (line_chart("a", [Series("b", points)]), line_chart("a", [Series("b", points, True)])):
            assert 'class="line c1"' in chart
    assert stacked_chart("a", [Series("b", [(5.0, abs(value))])]).count("<path") == 1


def test_curves_stay_inside_the_picture() -> None:
    values = [(float(i), (-1) ** i * 10.0**i) for i in range(8)]
    for chart in (
        line_chart("a", [Series("b", values)]),
        stacked_chart("a", [Series("b", [(1, 2.0), (9, 4.0)])]),
    ):
        for x, y in re.findall(r"([\d.-]+) ([\d.-]+)(?=[LZ\"])", " ".join(re.findall(r'd="M(.*?")', chart))):
            assert 58 <= float(x) <= 390
            assert 10 <= float(y) <= 184


def test_stacked_areas_lie_on_top_of_each_other() -> None:
    chart = stacked_chart("a", [Series("b", [(0, 1.0), (1, 1.0)]), Series("c", [(0, 2.0), (1, 2.0)])])
    lower, upper = re.findall(r'class="area c\d" d="M(.*?)Z"', chart)
    top_of_lower = lower.split("L")[0].split()[1]
    bottom_of_upper = upper.split("L")[-1].split()[1]
    assert top_of_lower == bottom_of_upper


def test_a_long_run_is_drawn_by_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(100_000)]
    short = binned(points)
    assert len(short) <= MAX_POINTS
    assert short[-1][0] == 99_999
    assert all(value == pytest.approx(0.5, abs=0.01) for _, value in short)


def test_smoothing_keeps_a_constant_and_halves_noise() -> None:
    assert [value for _, value in smoothed([(i, 2.0) for i in range(50)])] == pytest.approx([2.0] * 50)
    noise = [value for _, value in smoothed([(i, (-1.0) ** i) for i in range(200)])][20:]
    assert max(map(abs, noise)) < 0.1
