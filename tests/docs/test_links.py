"""Links within the repository lead to files and headings that exist, and names of code lead to code."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "kernels").rglob("*.md")),
]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)?)\)")
HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
NAMED_CODE = re.compile(r"^\|.*\| `(\S+\.py)` \| (`.+?`) \|", re.MULTILINE)
SOURCES = [ROOT / "python/fused_distill", ROOT / "kernels/fused_distill_kernels"]


def links(page: Path) -> list[str]:
    """Return where the links and images of a page within the repository lead to."""
    prose = CODE.sub(lambda m: "\n" if m[0].startswith("```") else "code", page.read_text())
    return [unquote(link) for link in LINK.findall(prose) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and the documentation site give to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in HEADING.findall(text))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


def broken(page: Path) -> list[str]:
    found = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or ROOT not in [target, *target.parents]:
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            found.append(f"{link}: {target.name} has no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert not broken(page)


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n[a](#one-two) [b](#three) [c](absent.md) `[d](code.md)`\n```\n[e](code.md)\n```\n"
    )
    assert [problem.split(":")[0] for problem in broken(page)] == ["#three", "absent.md"]


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f" {page.name}\n" not in navigation] == []


@pytest.mark.parametrize(("file", "names"), NAMED_CODE.findall((ROOT / "docs/how-it-works.md").read_text()))
def test_code_that_a_page_follows_exists(file: str, names: str) -> None:
    texts = [(folder / file).read_text() for folder in SOURCES if (folder / file).exists()]
    for name in re.findall(r"`(\w+)`", names):
        assert any(re.search(rf"^(def|class) {name}\b", text, re.MULTILINE) for text in texts)
