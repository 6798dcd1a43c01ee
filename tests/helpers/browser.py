"""Headless Chromium: what a page looks like at several widths, and what its console says."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The page in frames of the given widths, and what sticks out of each. Hidden parts are opened before.
HARNESS = """<!doctype html><meta charset="utf-8"><body><pre id="result"></pre><script>
const widths = WIDTHS;
onload = () => {
  const found = widths.map((width, i) => {
    const frame = document.getElementsByTagName("iframe")[i], inner = frame.contentDocument;
    for (const details of inner.getElementsByTagName("details")) details.open = true;
    const elements = [...inner.body.getElementsByTagName("*")];
    const wide = elements.filter(element => element.getBoundingClientRect().right > width + 0.5);
    return {width, scroll: inner.documentElement.scrollWidth, elements: elements.length,
            wide: wide.map(element => element.tagName)};
  });
  document.getElementById("result").textContent = JSON.stringify(found);
};
</script>FRAMES"""


class Layout(NamedTuple):
    """A page in a window of some width."""

    width: int
    scroll_width: int
    elements: int  # number of them
    too_wide: list[str]  # tags that end right of the window


def lay_out(page: str, widths: Sequence[int], scratch: Path) -> tuple[list[Layout], list[str]]:
    """Return the layouts of a page, and what the browser's console says."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}"></iframe>'
        for width in widths
    )
    harness = scratch / "harness.html"
    harness.write_text(HARNESS.replace("WIDTHS", json.dumps([*widths])).replace("FRAMES", frames))
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={scratch / 'profile'}", "--virtual-time-budget=10000", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    layouts = [
        Layout(f["width"], f["scroll"], f["elements"], f["wide"]) for f in json.loads(html.unescape(found[1]))
    ]
    return layouts, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
