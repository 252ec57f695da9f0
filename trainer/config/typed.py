"""YAML as its authors typed it: texts that look like numbers, no duplicate keys, decimals only."""

from __future__ import annotations

import re
from typing import Any, Dict, NamedTuple, Union

import yaml

from ..errors import ConfigError

_MOST_VALUES = 100_000  # a page of aliases of aliases can stand for billions
_WHOLE = re.compile(r"[-+]?(0|[1-9][\d_]*)")


class Typed(NamedTuple):
    """What YAML 1.1 takes for a number or a flag, and what was typed: 0.1 and ``0.10``."""

    value: Any
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def clear(self) -> bool:
        """Whether it is no number of another base, as 010, 0o10 or 1:30, and no flag as ``on``."""
        if isinstance(self.value, bool):
            return self.text.lower() in ("true", "false")
        whole = isinstance(self.value, float) or bool(_WHOLE.fullmatch(self.text))
        return whole and ":" not in self.text


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML silently keeps the last; keeps what was typed."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        bare = isinstance(node, yaml.ScalarNode) and node.style is None
        return Typed(value, node.value) if bare and isinstance(value, (int, float)) else value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # later, merged keys are among its own
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for index, name in enumerate(names) if name in names[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"it has {twice[0]} twice", node.start_mark
            )
        return node


class Dumper(yaml.SafeDumper):
    """Puts texts in quotes that this loader would take for something else."""


# Numbers that PyYAML takes for texts.
_SINCE_1_2 = {"float": r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$", "int": "0o[0-7]+$"}
for _tag, _form in _SINCE_1_2.items():
    for _kind in (_Loader, Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_form), list("-+.0123456789")
        )
# A date is the text that was typed: no setting takes another.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for letter, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse(text: Union[str, bytes], what: str) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _values(node, {}) > _MOST_VALUES:
            raise ConfigError(f"{what} stands for more than {_MOST_VALUES:,} values")
        return None if node is None else loader.construct_document(node)
    # PyYAML leaks other errors where a value does not fit its tag, or is nested too deeply.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        hint = "; save it as UTF-8" * isinstance(error, yaml.reader.ReaderError)
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())}{hint}") from None


def _values(node: yaml.Node, known: Dict[int, int]) -> int:
    """How many values a node stands for, each alias as what it repeats."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1  # of one that holds itself, which plain() refuses
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] += sum(_values(part, known) for part in inner)
    return known[id(node)]


def plain(value: Any, name: str) -> Any:
    """``value`` without :class:`Typed`. Raises ConfigError: something in it is not
    :attr:`Typed.clear`.
    """
    if isinstance(value, Typed):
        if not value.clear:
            decimal = "numbers in decimal, without leading zeros"
            how = "true or false" if isinstance(value.value, bool) else decimal
            raise ConfigError(
                f"{name} is {value.text}, which YAML reads as {value.value}; write {how}, and "
                "texts in quotes"
            )
        return value.value
    try:
        if isinstance(value, dict):
            return {plain(key, name): plain(item, name) for key, item in value.items()}
        return [plain(item, name) for item in value] if isinstance(value, list) else value
    except RecursionError:
        raise ConfigError(f"{name} holds itself") from None
