"""Which checkpoint a run goes on from: chosen by the first rank, read by all, and the same on every rank.

Before process groups exist, over the launcher's store. The first rank takes the run's lock, lists the checkpoints,
reads manifests, decides and clears away; the others hash the files that it names against the manifest that it sends,
and take over its decision with the trainer's state. No rank decides by its own view of the file system, which may be
late.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nemo_fiberpo.aligner import manifest, run_lock, storage
from nemo_fiberpo.aligner.manifest import Choice, Manifest
from nemo_fiberpo.aligner.resume import RunRecord


class SaidByFirstRank(ValueError):
    """The error of the first rank, on another one: the first has said it."""


Found = tuple[Path, Manifest] | None
_stores: list[Any] = []  # the first rank's serves the others until their process groups exist


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
    job trains in the directory, if the record is of another run, if no checkpoint is whole although there was one, or
    if a file cannot be read: a read that fails says nothing about a checkpoint, and going back for it would lose steps.
    """
    directory, ranks = checkpoint_directory(cfg), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return _decide(cfg, directory, record)
    timeout = timedelta(seconds=cfg.collective_timeout)
    base, rank, _ = next(rendezvous("env://", timeout=timeout))
    _stores.append(base)
    store = PrefixStore("fiberpo/resume", base)
    store.set_timeout(timeout)
    if rank == 0:
        return _lead(cfg, directory, record, store, ranks)
    return _follow(store, rank, ranks)


def _decide(cfg: DictConfig, directory: Path, record: RunRecord, verify: manifest.Verify = manifest.problems) -> Found:
    """The decision of the first rank, with all that it changes on the disk."""
    run_lock.hold(cfg.run_dir, min(run_lock.PATIENCE, cfg.collective_timeout / 2))  # the other ranks wait meanwhile
    record.check()  # again: the job before this one may have changed it until it gave the lock back
    try:
        return _settled(_choose(cfg, directory, record, verify))
    except OSError as error:
        raise ValueError(
            f"{storage.in_words(error)}: a file of the run could not be read or moved, which does not say that it is "
            "damaged. Give the same command again when it can be; to go on without that checkpoint, move its folder to "
            f"{directory.parent / manifest.DAMAGED}"
        ) from error


def _choose(cfg: DictConfig, directory: Path, record: RunRecord, verify: manifest.Verify) -> Choice:
    if cfg.exp_manager.get("resume_from_checkpoint"):
        raise ValueError(
            "exp_manager.resume_from_checkpoint: a run goes on from its own checkpoints; a new one begins from "
            "pretrained_checkpoint.restore_from_path"
        )
    choice = manifest.choose(directory, record.checkpoint, verify)
    if choice.checkpoint is not None and not cfg.exp_manager.get("resume_if_exists", True):
        raise ValueError(
            f"exp_manager.resume_if_exists: false, but {directory} has checkpoints; give a run_dir of its own"
        )
    return choice


def _settled(choice: Choice) -> Found:
    for line in manifest.clear_away(choice):
        print(f"checkpoint {line}", flush=True)
    if choice.checkpoint is None or choice.manifest is None:
        print("beginning at RL step 0", flush=True)
        return None
    print(f"going on from {choice.checkpoint.name}: RL step {choice.manifest.state['step']}", flush=True)
    return choice.checkpoint, choice.manifest


def _lead(cfg: DictConfig, directory: Path, record: RunRecord, store: Any, ranks: int) -> Found:
    """The first rank: decide, have the others read, tell them the decision or the error."""
    rounds = 0

    def tell(**message: Any) -> None:
        nonlocal rounds
        store.set(f"round/{rounds}", json.dumps(message))
        rounds += 1

    def answers(path: Path, wanted: Manifest) -> list[str]:
        """Problems that all ranks found, the first rank's own first. OSError if one could not read a file."""
        number = rounds
        tell(verify=str(path), manifest=wanted.text())
        found = manifest.problems(path, wanted, _share(wanted, 0, ranks))
        for rank in range(1, ranks):
            answer = json.loads(store.get(f"found/{number}/{rank}"))
            if "unreadable" in answer:
                code, reason, file = answer["unreadable"]
                raise OSError(code, f"{reason}, says rank {rank} on {answer['host']}", file)
            found += answer["problems"]
        return found

    def verify(path: Path, wanted: Manifest) -> list[str]:
        """What another rank misses or finds altered counts if the first rank finds it too: the view of one node may be
        late, or its mount ill. Until they agree all read again, a few times."""
        for wait in (*storage.WAITS, None):
            found = answers(path, wanted)
            names = [name for name in wanted.files if any(line.startswith(f"{name}: ") for line in found)]
            confirmed = manifest.problems(path, wanted, names)
            if len(confirmed) == len(names):
                return confirmed
            if wait is not None:
                time.sleep(wait)
        only = next(line for line in found if line not in confirmed)
        raise OSError(0, "whole as the first rank reads it, but not as another does", f"{path}/{only}")

    try:
        settled = _decide(cfg, directory, record, verify)
    except BaseException as error:  # told to the others: they wait for it
        tell(error=str(error) or type(error).__name__)
        raise
    tell(choice=None if settled is None else str(settled[0]), manifest=None if settled is None else settled[1].text())
    return settled


def _follow(store: Any, rank: int, ranks: int) -> Found:
    """Any other rank: read what the first names, and take over what it decides. SaidByFirstRank if that is an error."""
    rounds = 0
    while True:
        message = json.loads(store.get(f"round/{rounds}"))
        if "error" in message:
            raise SaidByFirstRank(message["error"])
        wanted = None if message["manifest"] is None else manifest.parse(message["manifest"].encode())
        if "choice" in message:
            return None if wanted is None else (Path(message["choice"]), wanted)
        assert wanted is not None
        answer = _read_share(Path(message["verify"]), wanted, rank, ranks)
        store.set(f"found/{rounds}/{rank}", json.dumps(answer))
        rounds += 1


def _read_share(path: Path, wanted: Manifest, rank: int, ranks: int) -> dict[str, Any]:
    try:
        return {"problems": manifest.problems(path, wanted, _share(wanted, rank, ranks))}
    except OSError as error:
        reason = [error.errno, error.strerror or type(error).__name__, str(error.filename)]
        return {"unreadable": reason, "host": os.uname().nodename}


def _share(wanted: Manifest, rank: int, ranks: int) -> list[str]:
    """The files of one rank, as much of every size on each."""
    by_size = sorted(wanted.files, key=lambda name: (-wanted.files[name]["size"], name))
    return by_size[rank::ranks]
