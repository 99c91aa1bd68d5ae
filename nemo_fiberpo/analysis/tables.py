"""Tables, written as text, HTML and CSV."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

LEFT = ("run", "group", "domain", "decoding", "setting", "stratum", "cell", "channel")  # left-aligned


@dataclass(frozen=True)
class Table:
    """A table of text cells; `note` explains its columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def as_text(self) -> str:
        widths = [max(len(row[at]) for row in (self.columns, *self.rows)) for at in range(len(self.columns))]
        aligned = [str.ljust if column in LEFT else str.rjust for column in self.columns]

        def line(row: Sequence[str]) -> str:
            cells = zip(aligned, row, widths, strict=True)
            return ("  " + "  ".join(align(cell, width) for align, cell, width in cells)).rstrip()

        return "\n".join([self.title, line(self.columns), *map(line, self.rows)])

    def as_html(self) -> str:
        def line(tag: str, row: Sequence[str]) -> str:
            kinds = ("" if column in LEFT else ' class="number"' for column in self.columns)
            cells = zip(kinds, row, strict=True)
            return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in cells) + "</tr>"

        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        body = "".join(line("td", row) for row in self.rows)
        head = line("th", self.columns)
        return (
            f"<h2>{html.escape(self.title)}</h2>{note}"
            f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
        )


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """CSV text: numbers with all digits, missing values as empty fields."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if _is_missing(cell) else cell for cell in row] for row in rows])
    return out.getvalue()


def _is_missing(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) or math.isnan(high) else f"[{low:+.3f}, {high:+.3f}]"
