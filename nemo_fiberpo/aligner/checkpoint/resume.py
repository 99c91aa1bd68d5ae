"""Which checkpoint a run goes on from: chosen by the first rank, read by all, and the same on every rank.

Before process groups exist. The first rank takes the run's lock, lists the checkpoints, reads manifests, decides and
clears away; the others hash the files that it names against the manifest that it sends, and take over its decision with
the trainer's state. No rank decides by its own view of the file system, which may be late.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.aligner.checkpoint import candidates
from nemo_fiberpo.aligner.checkpoint.candidates import Choice, Verify
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.lifecycle import run_lock
from nemo_fiberpo.aligner.lifecycle.first_rank import Message, Ranks, connect
from nemo_fiberpo.storage import manifest, policy_file, reading
from nemo_fiberpo.storage.manifest import Manifest

Found = tuple[Path, Manifest] | None


def checkpoint_directory(cfg: DictConfig) -> Path:
    """Where NeMo saves. ValueError if the config leaves that to NeMo: it would be another directory at every start."""
    own = cfg.exp_manager.get("checkpoint_callback_params", {}).get("dirpath")
    if own is None and cfg.exp_manager.get("explicit_log_dir") is None:
        raise ValueError("exp_manager.explicit_log_dir: is required, so that a resumed run finds its checkpoints")
    return Path(own) if own is not None else Path(cfg.exp_manager.explicit_log_dir) / "checkpoints"


def find_checkpoint(cfg: DictConfig, record: RunRecord) -> Found:
    """The newest whole checkpoint, the same on every rank, before process groups exist; None to begin at RL step 0.

    The first rank locks the run's directory and goes through the candidates, newest first; every rank reads its share
    of the files of each. What is not whole is said in a line each and cleared away. ValueError on every rank if another
    job trains in the directory, if the record is of another run, if no checkpoint is whole although there was one, if a
    file cannot be read (a read that fails says nothing about a checkpoint, and going back for it would lose steps), or
    if a rank does not answer within `collective_timeout`. `preemption.Stopped` as `run_lock.hold`.
    """
    ranks = connect(cfg.collective_timeout)
    if ranks is None:
        return _decide(cfg, record)
    return _lead(cfg, record, ranks) if ranks.rank == 0 else _follow(ranks)


def take_directory(cfg: DictConfig, record: RunRecord) -> None:
    """Lock the run's directory and look what it holds; the other ranks wait meanwhile. First rank.

    ValueError and `preemption.Stopped` as `run_lock.hold`; ValueError if the directory has another run.
    """
    run_lock.hold(cfg.run_dir, min(run_lock.PATIENCE, cfg.collective_timeout / 2))
    record.check()  # under the lock: the job before this one may change it until it ends


def _decide(cfg: DictConfig, record: RunRecord, verify: Verify = manifest.problems) -> Found:
    """The decision of the first rank, with all that it changes on the disk."""
    directory = checkpoint_directory(cfg)
    take_directory(cfg, record)
    try:
        choice = _choose(cfg, directory, record, verify)
        _check_policy(cfg, verify)
        return _settled(choice)
    except OSError as error:
        raise ValueError(
            f"{reading.in_words(error)}: a file of the run could not be read or moved, which does not say that it is "
            "damaged. Give the same command again when it can be; to go on without that checkpoint, move its folder to "
            f"{directory.parent / candidates.DAMAGED}"
        ) from error


def _choose(cfg: DictConfig, directory: Path, record: RunRecord, verify: Verify) -> Choice:
    if cfg.exp_manager.get("resume_from_checkpoint"):
        raise ValueError(
            "exp_manager.resume_from_checkpoint: a run goes on from its own checkpoints; a new one begins from "
            "pretrained_checkpoint.restore_from_path"
        )
    choice = candidates.choose(directory, record.checkpoint, verify, record.id)
    if choice.checkpoint is not None and not cfg.exp_manager.get("resume_if_exists", True):
        raise ValueError(
            f"exp_manager.resume_if_exists: false, but {directory} has checkpoints; give a run_dir of its own"
        )
    return choice


def _check_policy(cfg: DictConfig, verify: Verify) -> None:
    """ValueError as `policy_file.check`; a run that goes on reads its policy too. One that is not there is for
    `build.load_actor` to say."""
    given = OmegaConf.select(cfg, "pretrained_checkpoint.restore_from_path", throw_on_missing=False)
    if given is not None and Path(given).exists():
        print(policy_file.check(Path(given), verify), flush=True)


def _settled(choice: Choice) -> Found:
    for line in candidates.clear_away(choice):
        print(f"checkpoint {line}", flush=True)
    if choice.checkpoint is None or choice.manifest is None:
        print("beginning at RL step 0", flush=True)
        return None
    print(f"going on from {choice.checkpoint.name}: RL step {choice.manifest.state['step']}", flush=True)
    return choice.checkpoint, choice.manifest


def _lead(cfg: DictConfig, record: RunRecord, ranks: Ranks) -> Found:
    """The first rank: decide, have the others read, tell them the decision or the error."""

    def answers(path: Path, wanted: Manifest) -> list[str]:
        """Problems that all ranks found, the first rank's own first. OSError if one could not read a file, when all
        have answered."""
        question = {"checkpoint": str(path), "manifest": wanted.text()}
        found = ranks.ask(question, lambda _: _read_share(path, wanted, 0, ranks.number))
        for rank, answer in enumerate(found):
            if "unreadable" in answer:
                code, reason, file = answer["unreadable"]
                raise OSError(code, reason if rank == 0 else f"{reason}, says rank {rank} on {answer['host']}", file)
        return [line for answer in found for line in answer["problems"]]

    def verify(path: Path, wanted: Manifest) -> list[str]:
        """What another rank misses or finds altered counts if the first rank finds it too: the view of one node may be
        late, or its mount ill. Until they agree all read again, a few times."""
        for wait in (*reading.WAITS, None):
            found = answers(path, wanted)
            names = [name for name in wanted.files if any(line.startswith(f"{name}: ") for line in found)]
            confirmed = manifest.problems(path, wanted, names)
            if len(confirmed) == len(names):
                return confirmed
            if wait is not None:
                time.sleep(wait)
        only = next(line for line in found if line not in confirmed)
        raise OSError(0, "whole as the first rank reads it, but not as another does", f"{path}/{only}")

    found: Found = None

    def decide() -> Message | None:
        nonlocal found
        found = _decide(cfg, record, verify)
        return None if found is None else {"checkpoint": str(found[0]), "manifest": found[1].text()}

    ranks.lead(decide)
    return found


def _follow(ranks: Ranks) -> Found:
    """Any other rank: read what the first names, and take over what it decides, Stopped and errors too."""

    def received(message: Message) -> tuple[Path, Manifest]:
        return Path(message["checkpoint"]), manifest.parse(message["manifest"].encode())

    decision = ranks.follow(lambda question: _read_share(*received(question), ranks.rank, ranks.number))
    return None if decision is None else received(decision)


def _read_share(path: Path, wanted: Manifest, rank: int, ranks: int) -> Message:
    """Problems of the files of one rank, or what it could not read."""
    try:
        return {"problems": manifest.problems(path, wanted, _share(wanted, rank, ranks))}
    except OSError as error:
        reason = [error.errno, error.strerror or type(error).__name__, str(error.filename)]
        return {"unreadable": reason, "host": os.uname().nodename}


def _share(wanted: Manifest, rank: int, ranks: int) -> list[str]:
    """The files of one rank, as much of every size on each."""
    by_size = sorted(wanted.files, key=lambda name: (-wanted.files[name]["size"], name))
    return by_size[rank::ranks]
