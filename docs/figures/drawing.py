"""What the figures share: colours, the frame of a panel, names of regimes, and how a picture is written."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
# Okabe and Ito's palette, told apart under every common colour blindness
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
# Tints for areas, in the order of named_regimes.GLOBAL_REGIMES: the five named ones, then the four others
TINTS = ("#CFE6F5", "#FBE3A8", "#C5E8DA", "#F6C9A5", "#D9D9D9", "#F2F2F2", "#F2F2F2", "#F2F2F2", "#F2F2F2")
PASS, ROLLBACK, ZEROED = TINTS[0], TINTS[1], TINTS[4]
MINUS = "\N{MINUS SIGN}"


def new_figure(width: float, height: float) -> Figure:
    """A figure that draws without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def frame(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels and the lines around a panel."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def signed(value: float, digits: int = 2) -> str:
    """A number as it is printed in the pictures, with a true minus sign and no minus zero."""
    text = f"{abs(value):.{digits}f}"
    return text if value > -0.5 * 10**-digits else MINUS + text


def save(figure: Figure, name: str) -> Path:
    """Write `name` to the folder given on the command line, else beside the scripts; 256 colours keep it small."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
    print(path)
    return path
