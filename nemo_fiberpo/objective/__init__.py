"""The objective, in pure torch: strata and cells, gates, the gating operator and its adjoint, weights, reports."""

from .cells import Cells, build_cells
from .fibration import gated_log_ratio, token_coefficients
from .hierarchy import Budget, Hierarchy, SlopeCap, Stratum
from .levels import Level
from .regimes import ChannelReport, Report, StratumReport
from .sharing import Reduce
from .surrogate import Surrogate, on_policy_coefficients, surrogate, token_weights

__all__ = [
    "Budget",
    "Cells",
    "ChannelReport",
    "Hierarchy",
    "Level",
    "Reduce",
    "Report",
    "SlopeCap",
    "Stratum",
    "StratumReport",
    "Surrogate",
    "build_cells",
    "gated_log_ratio",
    "on_policy_coefficients",
    "surrogate",
    "token_coefficients",
    "token_weights",
]
