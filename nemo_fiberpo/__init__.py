"""FiberPO: policy optimisation with drift budgets on every level of a hierarchy, from domains down to tokens."""

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
