"""FiberPO: policy optimisation with drift budgets on every level of a hierarchy, from domains down to tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import config as config
    from . import objective as objective
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


if not TYPE_CHECKING:  # else a type checker would accept every name

    def __getattr__(name: str) -> Any:
        """Imported on first use, so that the command line can print its help without torch."""
        if name in ("config", "objective"):
            return import_module(f".{name}", __name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".config" if name == "load_hierarchy" else ".objective", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
