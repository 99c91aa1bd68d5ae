"""The precisions that a policy can be trained in."""

from __future__ import annotations

from typing import Any

from nemo_fiberpo.values import nearest

PRECISIONS = ("bf16", "bf16-mixed", 32, "32", "32-true")


def check_precision(precision: Any, field: str = "trainer.precision") -> None:
    """ValueError naming `field` unless a policy can be trained in this precision."""
    if str(precision).split("-")[0] in ("16", "fp16"):
        raise ValueError(
            f"{field}: {precision!r}: float16 needs a loss scale, which the exact step does not have; use bf16, or 32"
        )
    if isinstance(precision, bool) or precision not in PRECISIONS:
        raise ValueError(f"{field}: {precision!r} is unknown{nearest(precision, dict.fromkeys(map(str, PRECISIONS)))}")
