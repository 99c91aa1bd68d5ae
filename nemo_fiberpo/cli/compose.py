"""A configuration by name or path, composed as in the training script."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_fiberpo.values import nearest

SHIPPED = Path(__file__).resolve().parents[2] / "conf"
"""conf/ of the repository, beside the package."""


@dataclass(frozen=True)
class Source:
    """A configuration: its name in `folder`, and the tree with its defaults if that is not `folder`."""

    folder: Path
    name: str
    tree: Path | None = None


def folders() -> list[Path]:
    """Where names are looked up: ./conf, then conf/ of the repository."""
    own = Path.cwd() / "conf"
    return [folder for folder in dict.fromkeys([own.resolve(), SHIPPED]) if folder.is_dir()]


def known() -> list[str]:
    """Names of the configurations that can be given without a path."""
    found = []
    for pattern in ("*.yaml", "cluster/*.yaml"):
        files = (path.relative_to(folder) for folder in folders() for path in sorted(folder.glob(pattern)))
        found += [str(file.with_suffix("")) for file in files if file.name != "base.yaml"]
    return list(dict.fromkeys(found))


def find(config: str) -> Source:
    """The configuration of that name, else at that path. ValueError with suggestions."""
    if not config.endswith((".yaml", ".yml")):
        for folder in folders():
            if (folder / f"{config}.yaml").is_file():
                return _at(folder / f"{config}.yaml", config)
    path = Path(config if config.endswith((".yaml", ".yml")) else f"{config}.yaml")
    if not path.is_file():
        raise ValueError(_unknown(config, path))
    if path.suffix != ".yaml":
        raise ValueError(f"{config}: Hydra reads only .yaml; rename it to {path.with_suffix('.yaml').name}")
    return _at(Path(os.path.abspath(path)), config)


def _at(path: Path, config: str) -> Source:
    """A file inside a tree of configurations has its defaults there; any other in a shipped tree."""
    tree = next((above for above in path.parents if _is_tree(above)), None)
    if tree is not None:
        return Source(tree, str(path.relative_to(tree).with_suffix("")))
    shipped = next((folder for folder in folders() if _is_tree(folder)), None)
    if shipped is None:
        raise ValueError(
            f"{config}: no conf/ of nemo_fiberpo with its defaults in {Path.cwd()} or "
            f"{SHIPPED.parent}; run fiberpo in a clone of the repository, or install the package from one with pip -e"
        )
    _check_names(path.parent, shipped, [path.stem])
    return Source(path.parent, path.stem, shipped)


def _check_names(folder: Path, shipped: Path, names: Iterable[str]) -> None:
    """ValueError if the training script would load another file of the same name: it searches its own conf/ before its
    --config-dir."""
    for name in names:
        file, hidden_by = folder / f"{name}.yaml", shipped / f"{name}.yaml"
        if file.is_file() and hidden_by.is_file():
            raise ValueError(f"{file}: the training script would take {hidden_by}, of the same name; rename it")


def _is_tree(folder: Path) -> bool:
    return (folder / "base.yaml").is_file() and (folder / "algorithm").is_dir()


def _unknown(config: str, path: Path) -> str:
    names = known()
    if path.parent != Path() and path.parent.is_dir() and config.endswith((".yaml", ".yml")):
        beside = {file.name for file in path.parent.glob("*.yaml")}
        near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, sorted(beside), 3, 0.5)]
        return f"{config}: there is no such file" + (f"; did you mean {' or '.join(near)}?" if near else "")
    # A layout also matches without its folder: mixtral_8x7b for cluster/mixtral_8x7b.
    likeness = {name: max(_likeness(config, name), _likeness(config, name.split("/")[-1])) for name in names}
    near = sorted((name for name in names if likeness[name] > 0.6), key=lambda name: -likeness[name])[:3]
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(names) or 'none'}"
    where = " or ".join(str(folder) for folder in folders()) or "./conf"
    return f"{config}: is neither the name of a file in {where} nor a path to a .yaml{hint}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def compose(config: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration, composed as in the training script. ValueError of one line if that fails."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException, OverrideParseException
    from hydra.types import RunMode

    from nemo_fiberpo.hydra_support.command_line import find_modules_in, prepare_hydra
    from nemo_fiberpo.hydra_support.command_line import overrides as for_hydra

    prepare_hydra()
    source = find(config)
    find_modules_in([str(source.folder)])
    try:
        given = for_hydra(overrides)
        OverridesParser.create().parse_overrides(given)
        if source.tree is not None:
            given.append(f"hydra.searchpath=[{','.join(_search_path(source))}]")
        with initialize_config_dir(config_dir=str(source.folder), version_base=None):
            if source.tree is not None:
                loader = GlobalHydra.instance().config_loader()
                chosen = loader.compute_defaults_list(source.name, given, RunMode.RUN).defaults
                _check_names(source.folder, source.tree, [default.config_path or "" for default in chosen])
            return hydra_compose(config_name=source.name, overrides=given)
    except OverrideParseException as error:
        wrong = error.override.removeprefix("++") if error.override not in overrides else error.override
        raise ValueError(f"override {wrong!r}: {_one_line(error)}; write KEY=VALUE, quoted for the shell") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config}: {_one_line(error)}") from error


def _search_path(source: Source) -> list[str]:
    """The file's own search path and its tree, quoted for Hydra."""
    own = OmegaConf.load(source.folder / f"{source.name}.yaml")
    if not isinstance(own, DictConfig):
        raise ValueError(f"{source.folder / source.name}.yaml: must be a mapping of sections")
    paths = [*(OmegaConf.select(own, "hydra.searchpath") or ()), f"file://{source.tree}"]
    return ["'" + str(path).replace("'", "\\'") + "'" for path in paths]


def _one_line(error: Exception) -> str:
    """A parser's message without its search path and links; for an unknown option, with the nearest one."""
    message = str(error).split("Config search path:")[0]
    message, _, options = message.partition("Available options in ")
    lines = [line.strip() for line in message.splitlines()]
    tail = ""
    if options and isinstance(missing := getattr(error, "missing_cfg_file", None), str):
        tail = nearest(missing.split("/")[-1], options.split()[1:])
    return " ".join(line for line in lines if line and not line.startswith("See https")) + tail
