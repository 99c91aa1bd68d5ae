"""What a YAML file of ours must not have: values that YAML 1.1 reads otherwise than they look, and references that grow
without end.

`1:30` is 90 to YAML 1.1, in which it is a time, and `010` is 8. Nine lines of aliases can stand for a billion values.
"""

from __future__ import annotations

import re

import yaml

_SIXTIES = re.compile(r"[-+]?[1-9][\d_]*(:[0-5]?\d)+|[-+]?\d[\d_]*(:[0-5]?\d)+\.[\d_]*")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
MOST_ALIASED = 1000
DEEPEST = 100


def check_yaml(text: str) -> None:
    """ValueError that begins with the line, for a number that is read otherwise than it looks, for nesting deeper than
    DEEPEST, for an alias inside what it stands for, and for aliases that stand for more than MOST_ALIASED values.
    Errors of the syntax are yaml.YAMLError."""
    sizes: dict[str, int] = {}  # values that an anchor stands for
    total = aliased = 0
    open_: list[tuple[str | None, int]] = []  # collections around the place: anchor, values before it
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
                raise ValueError(f"{line}: *{event.anchor} stands inside what it stands for")
            size = sizes.get(event.anchor or "", 1)
            total, aliased = total + size, aliased + size
            if aliased > MOST_ALIASED:
                raise ValueError(f"{line}: aliases stand for more than {MOST_ALIASED} values; write them out")
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if event.implicit[0] and (_SIXTIES.fullmatch(event.value) or _OCTAL.fullmatch(event.value)):
                raise ValueError(f"{line}: {event.value} is {_read(event.value)} to YAML; write that, or quote a text")


def _read(value: str) -> object:
    return yaml.safe_load(value)
