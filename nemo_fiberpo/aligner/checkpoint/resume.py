"""Which checkpoint a run resumes from: decided by the first rank, verified by all, before process groups exist.

The first rank takes the run's lock, reads the manifests, decides and cleans up. The others hash the files that it names
against the manifest that it sends, and follow its decision: their own view of the file system may be stale.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.aligner.checkpoint import candidates
from nemo_fiberpo.aligner.checkpoint.candidates import Choice, Verify
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.lifecycle.first_rank import Message, Ranks, connect
from nemo_fiberpo.aligner.lifecycle.preemption import NOT_FINISHED, Stopped
from nemo_fiberpo.storage import manifest, policy_file, reading, run_lock
from nemo_fiberpo.storage.manifest import Manifest

Found = tuple[Path, Manifest] | None


def checkpoint_directory(cfg: DictConfig) -> Path:
    """Where NeMo saves. ValueError if the config leaves that to NeMo: it would be a new directory at every start."""
    own = cfg.exp_manager.get("checkpoint_callback_params", {}).get("dirpath")
    if own is None and cfg.exp_manager.get("explicit_log_dir") is None:
        raise ValueError("exp_manager.explicit_log_dir: is required, so that a resumed run finds its checkpoints")
    return Path(own) if own is not None else Path(cfg.exp_manager.explicit_log_dir) / "checkpoints"


def find_checkpoint(cfg: DictConfig, record: RunRecord) -> Found:
    """The newest whole checkpoint, the same on every rank; None to start at RL step 0.

    The first rank locks the run's directory and tries the checkpoints, newest first; every rank reads a share of the
    files of each. Those that are not whole are reported and cleaned up. ValueError on every rank if another job uses
    the directory, if it holds another run, if no checkpoint is whole although one was, if a file cannot be read, or if
    a rank does not answer within `collective_timeout`. Stopped if an earlier start of this job has the directory.
    """
    ranks = connect(cfg.collective_timeout)
    if ranks is None:
        return _decide(cfg, record)
    return _lead(cfg, record, ranks) if ranks.rank == 0 else _follow(ranks)


def lock_run_directory(cfg: DictConfig, record: RunRecord) -> None:
    """Lock the run's directory and check what it holds. First rank, while the others wait.

    ValueError as `run_lock.hold`, or if the directory holds another run; Stopped if an earlier start of this job has
    it.
    """
    try:
        run_lock.hold(cfg.run_dir, min(run_lock.PATIENCE, cfg.collective_timeout / 2))
    except run_lock.HeldByEarlierStart as held:
        print(f"{held}. Ending with status {NOT_FINISHED}, to be started again later", flush=True)
        raise Stopped from held
    record.check()  # under the lock: the previous job may change it until it ends


def _decide(cfg: DictConfig, record: RunRecord, verify: Verify = manifest.problems) -> Found:
    """The first rank's decision, with all that it changes on disk."""
    directory = checkpoint_directory(cfg)
    lock_run_directory(cfg, record)
    try:
        choice = _choose(cfg, directory, record, verify)
        _check_policy(cfg, verify)
        return _settled(choice)
    except OSError as error:
        raise ValueError(
            f"{reading.describe(error)}: a file of the run could not be read or moved; it may still be whole. "
            "Run the same command again once it can be read; to resume without that checkpoint, move its folder to "
            f"{directory.parent / candidates.DAMAGED}"
        ) from error


def _choose(cfg: DictConfig, directory: Path, record: RunRecord, verify: Verify) -> Choice:
    if cfg.exp_manager.get("resume_from_checkpoint"):
        raise ValueError(
            "exp_manager.resume_from_checkpoint: a run resumes from its own checkpoints; a new one starts from "
            "pretrained_checkpoint.restore_from_path"
        )
    choice = candidates.choose(directory, record.checkpoint, verify, record.id)
    if choice.checkpoint is not None and not cfg.exp_manager.get("resume_if_exists", True):
        raise ValueError(f"exp_manager.resume_if_exists: false, but {directory} has checkpoints; use another run_dir")
    return choice


def _check_policy(cfg: DictConfig, verify: Verify) -> None:
    """Check the policy file, also on a resume, which reads it too. `build.load_actor` reports a missing one."""
    given = OmegaConf.select(cfg, "pretrained_checkpoint.restore_from_path", throw_on_missing=False)
    if given is not None and Path(given).exists():
        print(policy_file.check(Path(given), verify), flush=True)


def _settled(choice: Choice) -> Found:
    for line in candidates.clear_away(choice):
        print(f"checkpoint {line}", flush=True)
    if choice.checkpoint is None or choice.manifest is None:
        print("starting at RL step 0", flush=True)
        return None
    print(f"resuming from {choice.checkpoint.name}: RL step {choice.manifest.state['step']}", flush=True)
    return choice.checkpoint, choice.manifest


def _lead(cfg: DictConfig, record: RunRecord, ranks: Ranks) -> Found:
    """The first rank: decide with the other ranks' help, and send them the decision or the error."""

    def answers(path: Path, wanted: Manifest) -> list[str]:
        """Problems that all ranks found, the first rank's own first. OSError, after all have answered, if one could not
        read a file."""
        question = {"checkpoint": str(path), "manifest": wanted.text()}
        found = ranks.ask(question, lambda _: _read_share(path, wanted, 0, ranks.number))
        for rank, answer in enumerate(found):
            if "unreadable" in answer:
                code, reason, file = answer["unreadable"]
                raise OSError(code, reason if rank == 0 else f"{reason} (rank {rank} on {answer['host']})", file)
        return [line for answer in found for line in answer["problems"]]

    def verify(path: Path, wanted: Manifest) -> list[str]:
        """A problem that another rank finds counts only if the first rank finds it too: one node's view or mount may be
        stale. All read again a few times until they agree."""
        for wait in (*reading.WAITS, None):
            found = answers(path, wanted)
            names = [name for name in wanted.files if any(line.startswith(f"{name}: ") for line in found)]
            confirmed = manifest.problems(path, wanted, names)
            if len(confirmed) == len(names):
                return confirmed
            if wait is not None:
                time.sleep(wait)
        only = next(line for line in found if line not in confirmed)
        raise OSError(0, "whole on the first rank, but not on another", f"{path}/{only}")

    found: Found = None

    def decide() -> Message | None:
        nonlocal found
        found = _decide(cfg, record, verify)
        return None if found is None else {"checkpoint": str(found[0]), "manifest": found[1].text()}

    ranks.lead(decide)
    return found


def _follow(ranks: Ranks) -> Found:
    """Any other rank: read what the first names, and follow its decision."""

    def received(message: Message) -> tuple[Path, Manifest]:
        return Path(message["checkpoint"]), manifest.parse(message["manifest"].encode())

    decision = ranks.follow(lambda question: _read_share(*received(question), ranks.rank, ranks.number))
    return None if decision is None else received(decision)


def _read_share(path: Path, wanted: Manifest, rank: int, ranks: int) -> Message:
    """Problems of one rank's share of the files, or the file that it could not read."""
    try:
        return {"problems": manifest.problems(path, wanted, _share(wanted, rank, ranks))}
    except OSError as error:
        reason = [error.errno, error.strerror or type(error).__name__, str(error.filename)]
        return {"unreadable": reason, "host": os.uname().nodename}


def _share(wanted: Manifest, rank: int, ranks: int) -> list[str]:
    """The files that one rank reads, about equally many bytes on each."""
    by_size = sorted(wanted.files, key=lambda name: (-wanted.files[name]["size"], name))
    return by_size[rank::ranks]
