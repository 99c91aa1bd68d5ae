"""The objective, in pure torch: strata and cells, gates, the gating operator and its adjoint, weights, reports."""

from ..labelling.expert_partitions import ExpertPartitions
from ..labelling.prefix_states import prefix_state_labels
from .baselines import Cispo, DppoTv, Gmpo, Sapo
from .fibration import gated_log_ratio, token_coefficients
from .gates import Gate
from .hierarchy import Hierarchy, build_cells
from .objectives import OBJECTIVES
from .ratio_gating import Apc, Gspo, PpoClip, RatioGating, TrulyPpo, check_gating
from .report import ChannelReport, NamedReport, Report, StratumReport
from .rollout_correction import Corrected, RolloutCorrection, correction_metrics, correction_weights
from .sharing import Cells, Level, Reduce, Riders, SharedCells
from .stratum import Budget, SlopeCap, Stratum
from .surrogate import Surrogate, gated_ratio, on_policy_coefficients, surrogate, token_weights

__all__ = [
    "OBJECTIVES", "Apc", "Budget", "Cells", "ChannelReport", "Cispo", "Corrected", "DppoTv", "ExpertPartitions", "Gate",
    "Gmpo", "Gspo", "Hierarchy", "Level", "NamedReport", "PpoClip", "RatioGating", "Reduce", "Report", "Riders",
    "RolloutCorrection", "Sapo", "SharedCells", "SlopeCap", "Stratum", "StratumReport", "Surrogate", "TrulyPpo",
    "build_cells", "check_gating", "correction_metrics", "correction_weights", "gated_log_ratio", "gated_ratio",
    "on_policy_coefficients", "prefix_state_labels", "surrogate", "token_coefficients", "token_weights",
]  # fmt: skip
