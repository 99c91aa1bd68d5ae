"""A self-contained HTML page with an embedded picture."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from nemo_fiberpo.analysis.tables import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p { margin: .2rem 0 .6rem; color: #555; } img { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; } .number { text-align: right; } tbody tr:hover { background: #f3f6fa; }
.notes { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: #fdf3ec; }
"""


def write_page(path: Path, title: str, tables: Sequence[Table], picture: Path, notes: Sequence[str]) -> None:
    """Write the page: notes on what was left out, the picture, and the tables."""
    noted = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{html.escape(title)}</h1>",
        f'<div class="notes">{noted}</div>' if noted else "",
        f'<img alt="Reward per domain, entropy and drift of the runs" src="data:image/png;base64,{image}">',
        *(table.as_html() for table in tables),
        "</body></html>\n",
    ]
    path.write_text("\n".join(parts), "utf-8")
