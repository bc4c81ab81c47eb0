"""The documentation: links that lead somewhere, an index that names every page, errors that are raised as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", _FENCED.sub("", page.read_text()))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_names_every_page() -> None:
    index = DOCS / "index.md"
    named = {(DOCS / link).resolve() for link in links(index)}
    assert set(DOCS.rglob("*.md")) - {index} <= named


def test_pages_named_in_the_source_are_there() -> None:
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").glob("*.yaml"), ROOT / "Makefile"]:
        for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", file.read_text()):
            assert (ROOT / name).is_file(), f"{file}: {name}"


def test_errors_are_raised_as_written() -> None:
    """Every message of the errors page is in the source, but for what it fills in."""
    page = (DOCS / "errors" / "index.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 15
    # strings over several lines are one string
    source = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    for message in messages:
        for part in message.split("..."):
            assert part.strip(" ()") in source, message
