"""The record of a run, `run.json`: its identity, and which of it may change on a resume."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_fiberpo.aligner.checkpoint.identity import identity_of, identity_of_record, under
from nemo_fiberpo.storage import reading
from nemo_fiberpo.storage.manifest import write_atomically
from nemo_fiberpo.values import nearest

# NeMo's checkpoints load into any layout, and log-probs can be computed either way. Rounding and random numbers then
# differ, so metrics match those of an uninterrupted run only in distribution; the change is recorded.
_LAYOUT = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.expert_tensor_parallel_size",
    "model.sequence_parallel",
    "model.logprobs",
    "ranks",
)


def _sha256(path: Any) -> str | None:
    if path is None or not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunRecord:
    """`run.json` in `run_dir`: the run's identity, its changes on resumes, and its newest whole checkpoint.

    {"id": hex, "identity": {key: value}, "changes": [{"rl_step", "changed": {key: [before, after]}}], "checkpoint":
    {"step", "name"} or null}. Paths inside `run_dir` are relative to it, so that a run can be moved. The config is read
    at construction, since NeMo modifies it later; the file is not.
    """

    def __init__(self, cfg: DictConfig):
        self.path = Path(cfg.run_dir) / "run.json"
        self._run_dir = str(cfg.run_dir)
        self._data = {name: cfg.data.get(name) for name in ("train", "heldout")}
        self._allowed = tuple((cfg.get("resume") or {}).get("allow") or ())
        self._identity = _portable(identity_of(cfg), self._run_dir)

    def check_allowed(self) -> None:
        """ValueError naming an entry of `resume.allow` that is not a key of this run, now or in the record."""
        stored = self._stored()
        keys = {**self._identity, **(stored["identity"] if stored else {})}  # a removed key is a change too
        sections = {key.rsplit(".", number)[0] for key in keys for number in range(key.count(".") + 1)}
        files = [f"data.{name}{end}" for name in self._data for end in ("", ".sha256")]
        known = [*keys, *sections, *files]
        for key in self._allowed:
            if key not in known:
                raise ValueError(f"resume.allow: {key!r} is not a key that must stay the same{nearest(key, known)}")

    def identity(self) -> dict[str, Any]:
        """The identity, with the digests of the data files (null where there is none yet), as JSON values."""
        digests = {f"data.{name}.sha256": _sha256(path) for name, path in self._data.items()}
        return self._identity | digests

    def _stored(self) -> dict[str, Any] | None:
        """What `run.json` holds; None without one. ValueError if it cannot be read or is not the record of a run."""
        try:
            raw = reading.read_bytes(self.path)
        except OSError as error:
            raise ValueError(f"{reading.describe(error)}: cannot read the record of the run; try again") from error
        if raw is None:
            return None
        try:
            stored: dict[str, Any] = json.loads(raw)
            _check_record(stored)
            stored["identity"] = _portable(identity_of_record(stored["identity"]), self._run_dir)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: not the record of a run ({type(error).__name__}: {error}). Restore an intact copy; "
                "or use another run_dir, such as "
                f"run_dir={self._run_dir}-2; or, if the checkpoints are of this very config, remove it to resume from "
                "the newest whole one unchecked"
            ) from None
        return stored

    def _changed(self, stored: Mapping[str, Any]) -> dict[str, list[Any]]:
        before, now = stored["identity"], self.identity()
        return {key: [before.get(key), now.get(key)] for key in {**now, **before} if before.get(key) != now.get(key)}

    def check(self) -> None:
        """ValueError as `check_allowed`; and one naming every changed key that is neither of the layout nor covered by
        `resume.allow`."""
        self.check_allowed()
        stored = self._stored()
        changed = self._changed(stored) if stored else {}
        refused = [key for key in changed if not under(key, (*_LAYOUT, *self._allowed))]
        if not refused:
            return
        who = [f"the run in {self._run_dir}"] + ["it"] * (len(refused) - 1)
        lines = [
            f"{key}: {changed[key][1]!r}, but {it} has {changed[key][0]!r}"
            for key, it in zip(refused, who, strict=True)
        ]
        raise ValueError(
            f"{'; '.join(lines)}; use another run_dir, such as run_dir={self._run_dir}-2, or accept the "
            f"change{'s' if len(refused) > 1 else ''} with resume.allow=[{','.join(refused)}]"
        )

    def remember(self, rl_step: int) -> dict[str, list[Any]]:
        """Record the identity from this RL step on; returns what has changed, {key: [before, after]}. First rank."""
        stored = {"id": uuid.uuid4().hex} | (self._stored() or {"changes": [], "checkpoint": None})
        changed = self._changed(stored) if rl_step > 0 and "identity" in stored else {}
        if changed:
            stored["changes"].append({"rl_step": rl_step, "changed": changed})
        self._write(stored | {"identity": self.identity()})
        return changed

    @property
    def id(self) -> str | None:
        """The id in the manifests of its checkpoints; None before the run begins."""
        stored = self._stored()
        return stored.get("id") if stored else None

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """Name and RL step of the newest whole checkpoint, None if there never was one."""
        stored = self._stored()
        return stored.get("checkpoint") if stored else None

    def note_checkpoint(self, name: str, state: Mapping[str, int]) -> None:
        """Record a whole checkpoint. First rank."""
        stored = self._stored()
        assert stored is not None, "remember() comes first"
        self._write(stored | {"checkpoint": {"name": name, "step": state["step"]}})

    def _write(self, stored: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(stored, indent=1) + "\n")


def _check_record(stored: Any) -> None:
    """ValueError, KeyError or TypeError unless this has the structure that RunRecord writes."""
    if not isinstance(stored["identity"], dict) or not isinstance(stored["changes"], list):
        raise ValueError("identity and changes have the wrong type")
    newest = stored["checkpoint"]
    if not isinstance(stored.get("id", ""), str):
        raise ValueError("id has the wrong type")
    if newest is not None and not (isinstance(newest["step"], int) and isinstance(newest["name"], str)):
        raise ValueError("checkpoint has the wrong type")


def _portable(identity: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """The identity, with paths inside the run's directory relative to it."""
    prefixes = {run_dir, os.path.abspath(run_dir), os.path.realpath(run_dir)}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(entry) for entry in value]
        if isinstance(value, dict):
            return {key: moved(entry) for key, entry in value.items()}
        if not isinstance(value, str):
            return value
        inside = next((prefix for prefix in prefixes if value.startswith(prefix.rstrip("/") + "/")), None)
        return value if inside is None else "${run_dir}" + value[len(inside.rstrip("/")) :]

    return {key: moved(value) for key, value in identity.items()}
