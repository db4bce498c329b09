"""YAML from a file or the command line: plain values only, and no more of them than are written there.

No tag makes an object (safe loading). An alias stands for what it repeats; ten lines of them can stand
for 10^9 values, which a validator would all look at, so what they come to is counted and bounded.
"""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 1 << 20
"""Characters of a configuration."""
_MOST_VALUES = 100_000
"""Values of a configuration, those that aliases repeat counted each time."""
_LONGEST_NUMBER = 1000
"""Characters of an integer: YAML has base 60 as well, which takes quadratic time to make out."""


class _Loader(yaml.SafeLoader):
    """A safe loader that counts what aliases come to."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values: dict[int, int] = {}  # of each finished node, those below it and itself

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if alias:
            if id(node) not in self._values:
                raise _problem("a value that holds itself", node)
            return node
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        below = [x for pair in pairs for x in (pair if isinstance(pair, tuple) else (pair,))]
        self._values[id(node)] = 1 + sum(self._values[id(x)] for x in below)
        if self._values[id(node)] > _MOST_VALUES:
            raise _problem(f"more than {_MOST_VALUES:,} values", node)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _LONGEST_NUMBER:
            raise _problem(f"a number of more than {_LONGEST_NUMBER:,} digits", node)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _problem(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, what, node.start_mark)


def load_yaml(text: str) -> Any:
    """Returns the plain values that a YAML text stands for.

    Raises:
        ValueError: it is no YAML, has a tag that makes an object, or stands for too much. Says where.
    """
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} characters")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # a tag's text may be none of its kind: KeyError, AttributeError, …
        raise ValueError(" ".join(str(error).split())) from error
