"""Hydra's composition of a run's config, for the scripts and `fiberpo`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from omegaconf import OmegaConf

from nemo_fiberpo.hydra_support import named_strata

_NEMO = ("model", "trainer", "exp_manager", "hydra")  # sections whose unknown keys Hydra refuses


def prepare_hydra() -> None:
    """Install the resolvers of conf/, and strata by name also in files that list them."""
    register_resolvers()
    named_strata.install()


def register_resolvers() -> None:
    """The resolvers of conf/: arithmetic, named as in NeMo-Aligner's scripts, and whether a precision is bf16."""
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    OmegaConf.register_new_resolver("plus", lambda x, y: x + y, replace=True)
    OmegaConf.register_new_resolver("int_div", lambda x, y: x // y, replace=True)
    OmegaConf.register_new_resolver("in_half", lambda precision: str(precision).startswith("bf16"), replace=True)


def overrides(arguments: Iterable[str]) -> list[str]:
    """The command line's overrides for Hydra.

    Unknown keys of the sections that this package checks are passed on: the check suggests the nearest key, Hydra does
    not.
    """
    checked = rf"(?!({'|'.join(_NEMO)})\.)\w+\.[^=]+="
    return [f"++{argument}" if re.match(checked, argument) else argument for argument in arguments]


_GROUPS = ("hierarchy", "algorithm", "model", "cluster")  # folders of conf/, of which an override names a file
_WITH_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--cfg", "-c")


def command_line(arguments: Iterable[str]) -> list[str]:
    """A script's arguments for Hydra: options first, since Hydra accepts none after an override, then `overrides`.
    Exits with one line if a config group is overridden by nothing or with `++`."""
    options: list[str] = []
    given: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            given.append(argument)
            continue
        options.append(argument)
        if argument in _WITH_VALUE and left:
            options.append(left.pop(0))
    for argument in given:
        key, _, value = argument.partition("=")
        name = key.lstrip("+~")
        if name in _GROUPS and (key.startswith("++") or ("=" in argument and value in ("", "null", "~"))):
            sys.exit(f"error: {name}: {argument!r}; name a file of conf/{name}, such as {name}=...")
    return [*options, *overrides(given)]


def find_modules_in(folders: Iterable[str]) -> None:
    """Let Python find the user's modules (graders, gates, token labels) in the folders of the run's config."""
    sys.path += [folder for folder in folders if folder not in sys.path]


def folders_of_config() -> list[str]:
    """The folders in which Hydra's command line found the config."""
    from hydra.core.hydra_config import HydraConfig

    return [source.path for source in HydraConfig.get().runtime.config_sources if source.schema == "file"]
