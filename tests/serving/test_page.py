"""The page of `alula serve`: its files."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from alula.serving.page import FOLDER

MODULES = sorted((FOLDER / "js").glob("*.js"))
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function")
"""what would make elements, or code, of text"""


class Markup(HTMLParser):
    """Every element of a page, with its attributes, and the text inside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture(scope="module")
def markup() -> Markup:
    parsed = Markup()
    parsed.feed((FOLDER / "index.html").read_text())
    return parsed


def test_the_page_needs_nothing_that_a_strict_policy_refuses(markup: Markup) -> None:
    """No script or style in the markup, nothing from elsewhere, and every file that is named is there."""
    assert markup.inline == ""
    for tag, attributes in markup.elements:
        assert not {name for name in attributes if name == "style" or name.startswith("on")}, (tag, attributes)
        for name in ("src", "href"):
            address = attributes.get(name)
            if address and not address.startswith("#"):
                assert (FOLDER / address).is_file(), address
    for module in MODULES:
        source = module.read_text()
        assert not MARKUP.search(source), module
        for imported in re.findall(r'from "(.*?)"', source):
            assert (module.parent / imported).is_file(), (module, imported)


def test_what_the_scripts_look_for_is_in_the_page_once(markup: Markup) -> None:
    ids = [attributes["id"] for _, attributes in markup.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    looked_for = {name for module in MODULES for name in re.findall(r'byId\("([\w-]+)"\)', module.read_text())}
    assert looked_for
    assert looked_for <= set(ids)
    symbols = {name for module in MODULES for name in re.findall(r'(?:symbol: |icon\()"(\w+)"', module.read_text())}
    assert {f"i-{name}" for name in symbols} <= set(ids)
