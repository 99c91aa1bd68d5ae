"""The same step through verl's RayWorkerGroup: a driver, and actors of Ray that have the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.workers.engine_workers import TrainingWorker

import nemo_fiberpo.integrations.verl  # noqa: F401  before verl's worker asks for an engine
from nemo_fiberpo.integrations.verl_cpu import init_process_group
from tests.verl.host import Batch, mini_batch, parameters, recorded_gradients, worker_config

ROOT = Path(__file__).parent.parent.parent


class RecordingWorker(TrainingWorker):
    """verl's worker over gloo, which also tells what its optimizer step did."""

    def __init__(self, config: Any) -> None:
        init_process_group()
        super().__init__(config)
        self.flops_counter = None  # knows GPUs only

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def record(self) -> None:
        self.gradients = recorded_gradients(self.engine)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def recorded(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "gradients": self.gradients, "parameters": parameters(self.engine)}


@contextmanager
def ray_on_this_machine(cpus: int) -> Iterator[None]:
    """A Ray of its own with so many CPUs, whose actors import this checkout."""
    variables = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for tries_left in (2, 1, 0):
        try:
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=100_000_000,
                log_to_driver=False, runtime_env={"env_vars": variables},
                _system_config={"worker_niceness": 0},  # else whatever else runs here starves the workers
            )  # fmt: skip
            break
        except Exception:  # Ray gives its node 30 s to start, which may be too little on a busy machine
            ray.shutdown()
            if not tries_left:
                raise
    try:
        yield
    finally:
        ray.shutdown()


def step_of_group(workers: int, folder: Any, batch: Batch, **arguments: Any) -> dict[str, Any]:
    """One `train_mini_batch` of the whole batch, which verl splits over the workers: metrics, and a record of each."""
    config, loss = worker_config(folder, **arguments)
    pool = RayResourcePool(process_on_nodes=[workers], use_gpu=False, max_colocate_count=1)
    actor = RayClassWithInitArgs(cls=ray.remote(RecordingWorker), config=config)
    group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=actor, device_name="cpu")
    group.reset()
    group.set_loss_fn(loss)
    group.record()
    output = group.train_mini_batch(mini_batch(batch, len(batch.uid))).get()
    return {"metrics": output["metrics"], "workers": group.recorded()}
