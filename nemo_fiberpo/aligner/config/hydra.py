"""How Hydra composes a run's config, for the scripts and for `fiberpo` alike."""

from __future__ import annotations

import re
from collections.abc import Iterable

from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config import named_strata

_NEMO = ("model", "trainer", "exp_manager", "hydra")  # sections whose unknown keys Hydra refuses


def prepare_hydra() -> None:
    """Install the resolvers of conf/, and strata by name wherever a file has them in a list."""
    register_resolvers()
    named_strata.install()


def register_resolvers() -> None:
    """The arithmetic that conf/ uses, by the names NeMo-Aligner's scripts give it."""
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    OmegaConf.register_new_resolver("plus", lambda x, y: x + y, replace=True)
    OmegaConf.register_new_resolver("int_div", lambda x, y: x // y, replace=True)


def overrides(arguments: Iterable[str]) -> list[str]:
    """The command line's overrides as Hydra takes them, so that anything can be overridden and a typo is explained.

    Keys of the sections that are checked key by key are passed even if they are unknown: the check names the nearest
    valid one, Hydra would not.
    """
    checked = rf"(?!({'|'.join(_NEMO)})\.)\w+\.[^=]+="
    return [f"++{argument}" if re.match(checked, argument) else argument for argument in arguments]
