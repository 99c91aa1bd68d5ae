"""Patches of Hydra: strata by name whichever form a file has, and files checked by `yaml_text`.

A hierarchy's `strata` and `branches` are mappings, which Hydra merges, or lists, whose entries Hydra cannot override by
name. Here a list becomes a mapping that replaces what came before it, as a list does in Hydra: in files and in
overrides on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override

from nemo_fiberpo.megatron.patching import Patch, Patches
from nemo_fiberpo.plain import NAMED, strata_by_name
from nemo_fiberpo.yaml_text import check_yaml

_LOADER = "hydra._internal.config_loader_impl:ConfigLoaderImpl"
_FILES = "hydra._internal.core_plugins.file_config_source:FileConfigSource"
_installed = False


def install() -> None:
    """Patch Hydra in this process. Raises ImportError naming a symbol that this version of Hydra lacks."""
    global _installed
    if not _installed:
        reason = "strata that a file lists are overridden by name"
        Patches(
            [
                Patch(_LOADER, "_compose_config_from_defaults_list", reason, wrap=_compose),
                Patch(_LOADER, "_apply_overrides_to_config", reason, wrap=_override),
                Patch(_FILES, "load_config", "files whose values are not what they look like", wrap=_load),
            ]
        ).apply()
        _installed = True


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Loading a file: check it first, with Hydra's exception for a file that it cannot load."""
    from hydra.errors import ConfigCompositionException

    def load(self: Any, config_path: str) -> Any:
        path = Path(self.path) / self._normalize_file_name(config_path)
        if path.is_file():
            try:
                check_yaml(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigCompositionException(f"{path}: {error}") from error
        return original(self, config_path)

    return load


def _compose(original: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Composing files: Hydra merges them in the order of the defaults lists."""

    def compose(self: Any, defaults: Any, repo: Any) -> DictConfig:
        loaded = [self._load_single_config(default=default, repo=repo) for default in defaults]
        lists_replace([result.config for result in loaded])
        following = iter(loaded)
        self._load_single_config = lambda **_: next(following)
        try:
            return original(self, defaults, repo)
        finally:
            del self._load_single_config

    return compose


def _override(original: Callable[..., None]) -> Any:
    """Applying overrides: Hydra does so in the order of the command line."""

    def override(overrides: Any, cfg: DictConfig) -> None:
        for given in overrides:
            key = given.key_or_group
            if key in {f"hierarchy.{kind}" for kind in NAMED} and isinstance(given.value(), list):
                OmegaConf.update(cfg, key, None, force_add=True)
            original([given], cfg)
            lists_replace([cfg])

    return staticmethod(override)


def lists_replace(configs: list[Any]) -> None:
    """In `configs`, which are merged in this order, turn lists of strata into mappings, and remove what the last list
    replaces."""
    for key in NAMED:
        holders = [held for config in configs if (held := _held(config, "hierarchy", DictConfig)) is not None]
        lists = [place for place, holder in enumerate(holders) if _held(holder, key, ListConfig) is not None]
        if not lists:
            continue
        for holder in holders[: lists[-1]]:
            with flag_override(holder, ["struct", "readonly"], False):
                holder.pop(key, None)
        last = holders[lists[-1]]
        with flag_override(last, ["struct", "readonly"], False):
            last[key] = strata_by_name(OmegaConf.to_container(last[key], resolve=False))


def _held(config: Any, key: str, kind: type) -> Any:
    """The value at `key` if it is of this kind, else None. References are not followed."""
    if not isinstance(config, DictConfig) or key not in config or OmegaConf.is_interpolation(config, key):
        return None
    value = config.get(key)
    return value if isinstance(value, kind) else None
