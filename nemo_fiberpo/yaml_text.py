"""Checks of the text of a YAML file: values that YAML 1.1 reads differently than they look, and exploding aliases.

In YAML 1.1 `1:30` is 90, a time, and `010` is 8. Nine lines of aliases can expand to a billion values.
"""

from __future__ import annotations

import re

import yaml

_SIXTIES = re.compile(r"[-+]?[1-9][\d_]*(:[0-5]?\d)+|[-+]?\d[\d_]*(:[0-5]?\d)+\.[\d_]*")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
MOST_ALIASED = 1000
DEEPEST = 100


def check_yaml(text: str) -> None:
    """ValueError, beginning with the line, for a number that is read differently than it looks, nesting deeper than
    DEEPEST, an alias inside its own anchor, and aliases that expand to more than MOST_ALIASED values. Syntax errors are
    yaml.YAMLError."""
    sizes: dict[str, int] = {}  # values that an anchor expands to
    total = aliased = 0
    open_: list[tuple[str | None, int]] = []  # enclosing collections: anchor, values before it
    for event in yaml.parse(text, yaml.SafeLoader):
        assert event.start_mark is not None
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            if len(open_) > DEEPEST:
                raise ValueError(f"{line}: nested more than {DEEPEST} deep")
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_):
                raise ValueError(f"{line}: *{event.anchor} is inside its own anchor")
            size = sizes.get(event.anchor or "", 1)
            total, aliased = total + size, aliased + size
            if aliased > MOST_ALIASED:
                raise ValueError(f"{line}: aliases expand to more than {MOST_ALIASED} values; write them out")
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if event.implicit[0] and (_SIXTIES.fullmatch(event.value) or _OCTAL.fullmatch(event.value)):
                raise ValueError(f"{line}: {event.value} is {_read(event.value)} to YAML; write that, or quote a text")


def _read(value: str) -> object:
    return yaml.safe_load(value)
