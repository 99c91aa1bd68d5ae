"""`fiberpo config`: the reference of the config's keys, for the terminal and docs/config.md."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

from nemo_fiberpo.cli.compose import SHIPPED
from nemo_fiberpo.fields import Key

if TYPE_CHECKING:
    from nemo_fiberpo.cli.config_keys import Section

MAY_CHANGE = "A resumed run may change it."
WIDEST = 120
INTRODUCTION = """# Configuration

Every key of a run's config, with its default, what it may hold and what it means. `fiberpo config` prints the same:

```bash
fiberpo config                                # all sections
fiberpo config algorithm                      # a section
fiberpo config algorithm.samples_per_prompt   # a key
```

Defaults are those of a run that inherits `base`; `???` marks what must be given. A config file or a command line holds
only what differs, such as `algorithm.epochs=2`. When a run is resumed, every key must have its former value, with three
exceptions: keys that are marked here, the layout, and what `resume.allow` names; see
[checkpoints.md](checkpoints.md#what-may-change-on-a-resume).

This file is written by `python -m nemo_fiberpo.cli config --markdown > docs/config.md`.
"""


def config(path: str | None, markdown: bool) -> str:
    """The output of `fiberpo config [SECTION]`. ValueError for an unknown name."""
    from nemo_fiberpo.cli.config_keys import find, sections

    every = sections(SHIPPED)
    if markdown:
        return as_markdown(every)
    width = min(shutil.get_terminal_size().columns, WIDEST)
    return overview(every, width) if path is None else as_text(find(path, every), width)


def overview(every: Mapping[str, Section], width: int) -> str:
    """A line for every section and top-level key."""
    from nemo_fiberpo.cli.config_keys import TOP_LEVEL

    groups = {
        "Keys at the top level": [(key.name, key.meaning) for key in every[TOP_LEVEL].blocks[0].keys],
        "Sections": [(section.name, section.summary) for section in every.values() if section.name],
    }
    column = 2 + max(len(name) for rows in groups.values() for name, _ in rows)
    lines = []
    for title, rows in groups.items():
        lines.append(f"{title}:")
        for name, text in rows:
            first = re.split(r"(?<=\.)\s", text)[0]
            lines += _wrapped(first, width, f"  {name:<{column}}", " " * (column + 2))
        lines.append("")
    lines += _wrapped(
        "`fiberpo config SECTION` lists the keys of a section, `fiberpo config KEY` explains a key.", width
    )
    return "\n".join(lines)


def as_text(section: Section, width: int) -> str:
    """A section for a terminal: each key with default, values and meaning."""
    lines = _wrapped(f"{section.name}: {section.summary}" if section.name else section.summary, width)
    for block in section.blocks:
        if block.title:
            lines += ["", *_wrapped(f"{block.title}: {block.text}", width)]
        for key in block.keys:
            form = f"  ({key.form})" if key.form else ""
            head = f"{key.name}: {default}" if (default := _default(key)) else key.name
            lines += ["", *_wrapped(f"{head}{form}", width, "  ", "      ")]
            lines += _wrapped(_meaning(key), width, "      ", "      ")
    return "\n".join(lines)


def as_markdown(every: Mapping[str, Section]) -> str:
    """All sections as tables."""
    parts = [INTRODUCTION]
    for section in every.values():
        parts.append(f"## {section.name or 'Top level'}\n\n{section.summary}\n")
        for block in section.blocks:
            parts += [f"### {block.title}\n\n{block.text}\n"] if block.title else []
            rows = ["| key | default | values | meaning |", "|---|---|---|---|", *map(_row, block.keys)]
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts).rstrip("\n")


def _row(key: Key) -> str:
    default = _default(key)
    cells = (f"`{key.name}`", f"`{default}`" if default else "", key.form, " ".join(_meaning(key).split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meaning(key: Key) -> str:
    return f"{key.meaning} {MAY_CHANGE}" if key.may_change else key.meaning


def _default(key: Key) -> str:
    """In YAML."""
    if key.default is MISSING:
        return "???"
    if isinstance(key.default, str):
        return key.default
    if dataclasses.is_dataclass(key.default):
        return "{}"
    return json.dumps(list(key.default) if isinstance(key.default, tuple) else key.default)


def _wrapped(text: str, width: int, first: str = "", indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def add_command(commands: Any, formatter: Any) -> None:
    """`config`, to the subparsers of `fiberpo`."""
    parser = commands.add_parser(
        "config",
        help="what the keys of a config mean",
        description="The sections of a run's config, or the keys of one with defaults, bounds and meanings.",
        epilog="examples:\n  fiberpo config\n  fiberpo config algorithm\n  fiberpo config algorithm.gating\n"
        "  fiberpo config hierarchy.strata.min_tokens\n",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("section", nargs="?", metavar="SECTION", help="a section, or a key by its dotted name")
    parser.add_argument("--markdown", action="store_true", help="everything, as docs/config.md has it")
