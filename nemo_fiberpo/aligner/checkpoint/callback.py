"""NeMo's checkpoint callback with a manifest: a checkpoint is valid once every file of it has been read back.

Import it after `build.start`, so that NeMo finds the CPU mode installed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exp_manager import CallbackParams
from nemo.utils.model_utils import ckpt_to_dir
from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.aligner import finite
from nemo_fiberpo.aligner.checkpoint import candidates
from nemo_fiberpo.aligner.checkpoint.resume import checkpoint_directory
from nemo_fiberpo.graders.signals import signals_blocked
from nemo_fiberpo.storage import manifest, policy_file
from nemo_fiberpo.storage.manifest import Manifest


class WholeCheckpoints(NeMoModelCheckpoint):
    """NeMoModelCheckpoint that writes a manifest into a checkpoint once all ranks have written their part, before it
    removes an older one.

    trainer_state  the trainer's counters (RL steps, prompts, optimizer steps) when a save begins
    on_whole       called on the first rank with name and counters of a checkpoint that has its manifest
    run_id         the id in the run's record, or None; called on the first rank
    durable        files that must be on disk before a checkpoint is valid, since a resume does not rewrite them

    Weights that are not finite are never saved: ValueError on every rank, before anything is written.

    SPMD: every rank saves and reads back a share of the files; the first writes the manifest.
    """

    trainer_state: Callable[[], Mapping[str, int]]
    on_whole: Callable[[str, Mapping[str, int]], None]
    run_id: Callable[[], str | None] = staticmethod(lambda: None)
    durable: tuple[Path, ...] = ()

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        self.finish_saves(trainer, blocking=True)  # one at a time
        finite.check_weights(trainer.lightning_module, trainer.optimizers[0], f"checkpoint {Path(filepath).stem}")
        with signals_blocked():  # a signal to the whole job must not end Megatron's writer processes
            super()._save_checkpoint(trainer, filepath)

    def finish_saves(self, trainer: Any, blocking: bool = False) -> None:
        """Finalize asynchronous saves that all ranks have written; with `blocking`, wait for all. Collective."""
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AsyncFinalizableCheckpointIO):
            io.maybe_finalize_save_checkpoint(blocking=blocking)

    def _get_finalize_save_checkpoint_callback(self, trainer: Any, filepath: str, global_step: int) -> Callable:
        finalize = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)
        checkpoint, state = ckpt_to_dir(filepath), dict(self.trainer_state())

        def finish() -> None:
            self._seal(checkpoint, state)
            finalize()

        return finish

    def _seal(self, checkpoint: Path, state: Mapping[str, int]) -> None:
        torch.distributed.barrier()  # all ranks have written
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = [name for name in manifest.files_of(checkpoint) if _reader(name, ranks) == rank]
        gathered: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(gathered, manifest.entries(checkpoint, mine))
        if rank == 0:
            files = {name: entry for part in gathered for name, entry in part.items()}
            for path in self.durable:
                if path.exists():
                    manifest.sync(path)
            manifest.write(checkpoint, Manifest(dict(sorted(files.items())), state, self.run_id()))
            self.on_whole(checkpoint.name, state)

    def adopt(self, trainer: Any) -> None:
        """Have `save_top_k` and `save_last` count the checkpoints that the first rank sees on disk: a resumed run's own
        state is as old as its checkpoint, and the other ranks may see something else. Collective."""
        listed = candidates.whole_in(Path(self.dirpath)) if trainer.is_global_zero else []
        steps = dict(trainer.strategy.broadcast(listed))
        paths = {f"{Path(self.dirpath) / name}.ckpt": step for name, step in steps.items()}
        lasts = [path for path in paths if path.endswith("-last.ckpt")]
        self.last_model_path = lasts[0] if lasts else ""
        surplus = lasts[1:]
        if self.monitor == "step" and self.save_top_k > 0:
            kept = [path for path in paths if path not in lasts]
            surplus += kept[self.save_top_k :]
            self._count({path: torch.tensor(paths[path]) for path in kept[: self.save_top_k]})
        for path in surplus:
            if trainer.is_global_zero:
                print(f"checkpoint {Path(path).stem}: removed, exceeds save_top_k and save_last", flush=True)
            self._remove_checkpoint(trainer, path, override_async=True)

    def _count(self, best: dict[str, torch.Tensor]) -> None:
        """Set Lightning's record of the best checkpoints, without NeMo's `_remove_invalid_entries_from_topk`, which
        looks at the disk and could differ between ranks."""
        order = sorted(best, key=lambda path: int(best[path]), reverse=self.mode != "min")
        self.best_k_models = best
        self.best_model_path, self.kth_best_model_path = (order[0], order[-1]) if order else ("", "")
        self.best_model_score, self.kth_value = best.get(self.best_model_path), best.get(self.kth_best_model_path)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """NeMo's: write the policy as a .nemo file, with a manifest beside it."""
        self.finish_saves(trainer, blocking=True)
        finite.check_weights(pl_module, trainer.optimizers[0], self._format_nemo_checkpoint_name())
        if trainer.is_global_zero:  # NeMo's staging folder, which a killed run leaves behind
            shutil.rmtree(Path(self.dirpath) / candidates.UNPACKED, ignore_errors=True)
        trainer.strategy.barrier()
        with signals_blocked():
            super().on_train_end(trainer, pl_module)
        policy = Path(self._format_nemo_checkpoint_name())
        if self.save_nemo_on_train_end and trainer.is_global_zero:
            files = manifest.entries(policy.parent, [policy.name])
            seal = Manifest(files, dict(self.trainer_state()), self.run_id())
            manifest.write_atomically(policy_file.seal_of(policy), seal.text())
        trainer.strategy.barrier()

    def complete_policy(self, trainer: Any, pl_module: Any) -> None:
        """Write the .nemo file of the last RL step if a kill has left it missing or truncated. Collective."""
        policy = Path(self._format_nemo_checkpoint_name())
        whole = trainer.is_global_zero and manifest.holds(policy_file.seal_of(policy), self.trainer_state())
        if self.save_nemo_on_train_end and not trainer.strategy.broadcast(whole):
            pl_module.prepare_for_training()
            with patch.object(trainer, "val_check_interval", 0):  # as NeMo-Aligner sets it: no further `-last` copy
                self.on_train_end(trainer, pl_module)
            pl_module.finish_training()


def _reader(name: str, ranks: int) -> int:
    """The rank that reads a file back: the one that wrote `__<rank>_<number>.distcp`, whose page cache has it, else the
    first."""
    number = name.rsplit("/", 1)[-1].removeprefix("__").split("_")[0]
    return int(number) % ranks if name.endswith(".distcp") and number.isdigit() else 0


def make_callback(cfg: DictConfig) -> WholeCheckpoints:
    """The callback of `exp_manager.checkpoint_callback_params`. ValueError if a resumed run could go back with them."""
    given = OmegaConf.to_container(cfg.exp_manager.checkpoint_callback_params, resolve=True)
    values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(CallbackParams), given))
    assert isinstance(values, dict)
    params: dict[str, Any] = {str(key): value for key, value in values.items() if key != "filepath"}
    if params.get("monitor") != "step" and not params.get("save_last"):
        raise ValueError(
            "exp_manager.checkpoint_callback_params.save_last: must be true unless monitor is step: otherwise only the "
            "best checkpoints are saved, and a resumed run goes back to one of them"
        )
    params["dirpath"] = str(checkpoint_directory(cfg))
    if params.get("prefix") is None:
        params["prefix"] = cfg.exp_manager.name
    NeMoModelCheckpoint.CHECKPOINT_NAME_LAST = params["filename"] + "-last"
    return WholeCheckpoints(**params)
