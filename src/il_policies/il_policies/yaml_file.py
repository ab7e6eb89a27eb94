"""YAML that strangers may have written: plain data, of a size that the text itself has."""
from __future__ import annotations

from collections.abc import Hashable

import yaml

LARGEST = 1_000_000
"""Values in a document, aliases written out."""


class _Loader(yaml.SafeLoader):
    """Refuses what SafeLoader takes: keys given twice, of which the last would win, and aliases that grow exponentially."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        self._sizes: dict[int, int | None] = {}  # None: being counted
        if root is not None and self._size(root) > LARGEST:
            raise yaml.constructor.ConstructorError(None, None, f'aliases make more than {LARGEST} values of it', root.start_mark)
        return root

    def _size(self, node: yaml.Node) -> int:
        if id(node) not in self._sizes:
            self._sizes[id(node)] = None
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))
                     ] if isinstance(node, yaml.CollectionNode) else []
            self._sizes[id(node)] = 1 + sum(map(self._size, parts))
        if (size := self._sizes[id(node)]) is None:
            raise yaml.constructor.ConstructorError(None, None, 'a value holds itself', node.start_mark)
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key_node, _ in node.value:
                key = None if key_node.tag == 'tag:yaml.org,2002:merge' else self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen and key is not None:
                    raise yaml.constructor.ConstructorError('in a mapping', node.start_mark, f'{key!r} is given twice',
                                                            key_node.start_mark)
                seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


def parse(text: str) -> object:
    """The data of a YAML document. Raises yaml.YAMLError for whatever is more than that, too, and keys given twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError('nested too deeply') from None
    except ValueError as error:  # dates and numbers that there are not
        raise yaml.YAMLError(str(error)) from None
