"""FiberPO: policy optimisation with drift budgets on every level of a hierarchy, from domains down to tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import load_hierarchy
    from .objective import (
        Apc,
        Budget,
        Cells,
        Cispo,
        DppoTv,
        Gmpo,
        Gspo,
        Hierarchy,
        PpoClip,
        Report,
        Sapo,
        SlopeCap,
        Stratum,
        Surrogate,
        TrulyPpo,
        gated_log_ratio,
        gated_ratio,
        on_policy_coefficients,
        surrogate,
        token_coefficients,
        token_weights,
    )

__version__ = "0.1.0"

__all__ = [
    "Apc",
    "Budget",
    "Cells",
    "Cispo",
    "DppoTv",
    "Gmpo",
    "Gspo",
    "Hierarchy",
    "PpoClip",
    "Report",
    "Sapo",
    "SlopeCap",
    "Stratum",
    "Surrogate",
    "TrulyPpo",
    "__version__",
    "gated_log_ratio",
    "gated_ratio",
    "load_hierarchy",
    "on_policy_coefficients",
    "surrogate",
    "token_coefficients",
    "token_weights",
]


def __getattr__(name: str) -> Any:
    """What is in `__all__`, imported where it is first used: the command line needs no torch to print its help."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".config" if name == "load_hierarchy" else ".objective", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
