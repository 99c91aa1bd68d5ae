"""python -m tests.faults.recording OUT SCRIPT ARGUMENTS: runs a script and notes every key of a config that it reads.

OUT is JSON: {key: {type of the value: [how it was read]}}, of the run's config by dotted key from its root, and of
copies of its sections that NeMo makes. A section that is read as a whole is `section.*`. Reads by OmegaConf itself and
by this package do not count.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
from collections import defaultdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

READS = ("__getattr__", "__getitem__", "get", "__contains__", "pop")
_IGNORED = ("omegaconf", "hydra", "nemo_fiberpo")
found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))


def where(node: DictConfig, key: str) -> str | None:
    """The key from the root of a run's config; None for a config that is no part of one."""
    content = node._get_root()._content
    keys = set(content) if isinstance(content, dict) else set()
    full = node._get_full_key(key)
    if {"trainer", "model"} <= keys:
        return full
    for section, own in (("model", {"ppo", "mcore_gpt"}), ("exp_manager", {"explicit_log_dir"})):
        if own <= keys:
            return f"{section}.{full}"
    return None


def note(node: DictConfig, key: str, how: str, value: Any) -> None:
    if not sys._getframe(2).f_globals.get("__name__", "").startswith(_IGNORED):
        path = where(node, key)
        if path is not None:
            found[path][type(value).__name__].add(how)


def wrap(how: str) -> None:
    original = getattr(DictConfig, how)

    def read(self: DictConfig, key: Any, *rest: Any, **options: Any) -> Any:
        value = original(self, key, *rest, **options)
        if isinstance(key, str) and not key.startswith("_"):
            note(self, key, how, value)
        return value

    setattr(DictConfig, how, read)


def install(out: str) -> None:
    for how in READS:
        wrap(how)
    original = OmegaConf.to_container

    def to_container(cfg: Any, **options: Any) -> Any:
        if isinstance(cfg, DictConfig):
            note(cfg, "*", "to_container", {})
        return original(cfg, **options)

    OmegaConf.to_container = staticmethod(to_container)  # type: ignore[method-assign]
    owner = os.getpid()

    def write() -> None:
        if os.getpid() == owner:
            plain = {key: {kind: sorted(how) for kind, how in of.items()} for key, of in sorted(found.items())}
            with open(out, "w") as file:
                json.dump(plain, file, indent=1)

    atexit.register(write)


if __name__ == "__main__":
    install(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
