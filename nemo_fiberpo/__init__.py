"""FiberPO: policy optimisation with drift budgets on every level of a hierarchy, from domains down to tokens."""

from .config import load_hierarchy
from .objective import (
    Budget,
    Cells,
    Hierarchy,
    Report,
    SlopeCap,
    Stratum,
    Surrogate,
    gated_log_ratio,
    on_policy_coefficients,
    surrogate,
    token_coefficients,
    token_weights,
)

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Cells",
    "Hierarchy",
    "Report",
    "SlopeCap",
    "Stratum",
    "Surrogate",
    "__version__",
    "gated_log_ratio",
    "load_hierarchy",
    "on_policy_coefficients",
    "surrogate",
    "token_coefficients",
    "token_weights",
]
