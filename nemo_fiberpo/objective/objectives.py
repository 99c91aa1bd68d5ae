"""The objectives that a config names by one word."""

from __future__ import annotations

from .baselines import Cispo, DppoTv, Gmpo, Sapo
from .ratio_gating import Apc, Gspo, PpoClip, TrulyPpo

OBJECTIVES: dict[str, type | None] = {
    "fiberpo": None,
    "ppo": PpoClip,
    "grpo": PpoClip,
    "gspo": Gspo,
    "truly_ppo": TrulyPpo,
    "apc": Apc,
    "cispo": Cispo,
    "sapo": Sapo,
    "dppo_tv": DppoTv,
    "gmpo": Gmpo,
}
"""Objective by name -> its map; None where the hierarchy's own gates act."""
