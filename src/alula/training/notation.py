"""YAML as people expect it, and no more of it than a person writes."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from alula.errors import RecipeError
from alula.settings import MOST_BITS

#: Characters of a document; its values, those of anchors counted wherever they are used; how deep they may be nested;
#: bits of a whole number.
MOST_CHARACTERS, MOST_VALUES, MOST_LEVELS = 200_000, 20_000, 50
_TOO_DEEP = f"nested deeper than {MOST_LEVELS} levels"


class Loader(yaml.SafeLoader):
    """`1e-3` is a number; a key given twice, or one that is no plain value, is an error."""

    _levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise ComposerError(None, None, _TOO_DEEP, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node


# PyYAML follows YAML 1.1, in which a float needs a dot; YAML 1.2 and everybody's habit read 1e-3 as a number
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping_without_twins(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConstructorError(None, None, "a list or mapping cannot be a key", key_node.start_mark)
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _whole_number(loader: Loader, node: yaml.ScalarNode) -> int:
    number = loader.construct_yaml_int(node)
    if number.bit_length() > MOST_BITS:
        raise ConstructorError(None, None, f"a number of {number.bit_length()} bits", node.start_mark)
    return number


Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_twins)


def read_yaml(text: str, *, where: str) -> tuple[Any, yaml.Node | None]:
    """The value of a document, and the nodes that know its lines.

    Raises:
        RecipeError: not YAML, a key that is no plain value or appears twice, an anchor that holds itself, or more than
            the bounds above.
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{len(text):,} characters are more than the {MOST_CHARACTERS:,} read", where=where)
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _measure(node, {})
        # to merge keys is to rewrite the nodes, which then know no lines: others are made
        return yaml.load(text, Loader) if "<<" in text else loader.construct_document(node), node
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        # PyYAML lets Python's own errors through where a number, a date or a tag does not fit its text
        raise RecipeError(f"not valid YAML: {_one_line(error)}", where=where) from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values and levels of a node, those of an anchor counted wherever it is used; refused where there are too many.

    Args:
        known: the result by node, None while it is being found.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ConstructorError(None, None, "an anchor that holds itself", node.start_mark)
        return found
    known[id(node)] = None
    values, levels = 1, 0
    inside = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    for child in inside if isinstance(node, yaml.CollectionNode) else ():
        more, deep = _measure(child, known)
        values, levels = values + more, max(levels, deep + 1)
    if values > MOST_VALUES:
        raise ConstructorError(
            None, None, f"more than {MOST_VALUES:,} values, with anchors written out", node.start_mark
        )
    if levels > MOST_LEVELS:
        raise ConstructorError(None, None, _TOO_DEEP, node.start_mark)
    known[id(node)] = values, levels
    return values, levels


def _one_line(error: Exception) -> str:
    """An error's text without its line breaks."""
    return re.sub(r"\s+", " ", str(error)).strip()
