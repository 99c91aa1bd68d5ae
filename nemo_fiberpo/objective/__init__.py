"""The objective, in pure torch: strata and cells, gates, the gating operator and its adjoint, weights, reports."""

from .cells import Cells, build_cells
from .expert_partitions import ExpertPartitions
from .fibration import gated_log_ratio, token_coefficients
from .hierarchy import Budget, Hierarchy, SlopeCap, Stratum
from .levels import Level
from .named_cells import NamedReport
from .ratio_gating import (
    OBJECTIVES,
    Apc,
    Gspo,
    PpoClip,
    RatioGating,
    TrulyPpo,
    check_gating,
)
from .ratio_objective import gated_ratio
from .regimes import ChannelReport, Report, StratumReport
from .sharing import Reduce
from .states import prefix_state_labels
from .surrogate import Surrogate, on_policy_coefficients, surrogate, token_weights

__all__ = [
    "OBJECTIVES",
    "Apc",
    "Budget",
    "Cells",
    "ChannelReport",
    "ExpertPartitions",
    "Gspo",
    "Hierarchy",
    "Level",
    "NamedReport",
    "PpoClip",
    "RatioGating",
    "Reduce",
    "Report",
    "SlopeCap",
    "Stratum",
    "StratumReport",
    "Surrogate",
    "TrulyPpo",
    "build_cells",
    "check_gating",
    "gated_log_ratio",
    "gated_ratio",
    "on_policy_coefficients",
    "prefix_state_labels",
    "surrogate",
    "token_coefficients",
    "token_weights",
]
