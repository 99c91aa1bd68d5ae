"""`fiberpo verify`: its arguments, and the ranks that it starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from nemo_fiberpo.plan.layout import Layout

if TYPE_CHECKING:
    from nemo_fiberpo.verification.plans import Sizes

DESCRIPTION = """Runs optimizer steps of a small random model on a layout of ranks and on one rank, and prints by how
much the loss, the log-probs and the gradients of all parameters differ. The layout comes from a config, from the
options, or from a config with options on top.

Starts its own ranks: one per GPU, or on a CPU as many as the layout needs. Under torchrun or srun it is one of them.
Exit status: 0 if all differences are within the tolerance, 1 if not.

examples:
  fiberpo verify --tp 2 --pp 2                          4 ranks, over gloo where there is no GPU
  fiberpo verify my_run --cpu                           the layout of conf/my_run.yaml, on this CPU
  srun --nodes=4 --ntasks-per-node=8 fiberpo verify --config-name my_run
  torchrun --nproc_per_node=8 -m nemo_fiberpo.cli verify --tp 2 --cp 2 --ep 4 --precision float64
"""
_AXES = {
    "tp": "tensor parallelism",
    "pp": "pipeline stages",
    "cp": "context parallelism",
    "ep": "expert parallelism",
    "etp": "tensor parallelism of the experts; default: that of the dense layers",
    "vpp": "virtual pipeline stages of a rank",
}


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """`verify`; `add` makes the parser of a command that takes a config and overrides."""
    verify = add("verify", help="whether the gradients of a layout are those of one rank", description=DESCRIPTION)
    for name, meaning in _AXES.items():
        verify.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    verify.add_argument("--ranks", type=int, metavar="N", help="processes to start; the rest is data parallelism")
    verify.add_argument("--precision", choices=("float64", "float32", "bf16"), help="float64 on a CPU, bf16 on GPUs")
    verify.add_argument("--layers", choices=("local", "transformer_engine"), help="default: Transformer Engine in bf16")
    verify.add_argument("--tolerance", type=float, metavar="X", help="for all errors; default: by precision")
    verify.add_argument("--cpu", action="store_true", help="over gloo, also where there are GPUs")


def _sizes(given: argparse.Namespace) -> Sizes:
    """Those of the config, where one is named, and over them those of the options."""
    from nemo_fiberpo.verification.plans import Sizes

    of_options = {name: size for name in _AXES if (size := getattr(given, name)) is not None}
    if given.config is None:
        if given.overrides:
            raise ValueError(f"{given.overrides[0]}: overrides are those of a config; name one before it")
        return Sizes(**of_options)
    from nemo_fiberpo.aligner.config.sections import algorithm_settings
    from nemo_fiberpo.cli.compose import compose
    from nemo_fiberpo.cli.planning import add_checkpoint

    cfg = compose(given.config, given.overrides)
    add_checkpoint(cfg)
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    layout = Layout.from_config(model, {})
    experts = bool(model.get("num_moe_experts"))
    of_config = {
        **{name: getattr(layout, name) for name in _AXES},
        "experts": experts,
        "packed": algorithm_settings(cfg).packing,
        "sequence_parallel": layout.sequence_parallel,
        "dispatcher": model.get("moe_token_dispatcher_type") or "alltoall",
        "recompute": model.get("activations_checkpoint_granularity") == "full",
    }
    return Sizes(**(of_config | of_options))


def verify(given: argparse.Namespace, arguments: Sequence[str], say: Callable[[str], None]) -> int:
    """Compare, as the launcher of all ranks or as one of them; the exit status. ValueError for a layout that cannot be.

    arguments   of the command line, from which the ranks that it starts read the same
    """
    import torch

    from nemo_fiberpo.cli.launcher import adopt_srun, is_rank, run_ranks
    from nemo_fiberpo.cli.training import QUIET
    from nemo_fiberpo.verification.ranks import Verification
    from nemo_fiberpo.verification.ranks import verify as compare

    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ |= {} if is_rank() else adopt_srun()
    gpus = 0 if given.cpu else torch.cuda.device_count()
    sizes = _sizes(given)
    verification = Verification(sizes, gpus == 0, given.precision, given.layers, given.tolerance)
    if gpus == 0 and given.layers == "transformer_engine":
        raise ValueError("--layers: transformer_engine needs GPUs; take local")
    if verification.layers == "transformer_engine" and verification.precision_name != "bf16":
        raise ValueError(f"--layers: transformer_engine with --precision {given.precision}; take bf16, or local layers")
    if is_rank():
        if given.ranks not in (None, int(os.environ["WORLD_SIZE"])):
            raise ValueError(
                f"--ranks: {given.ranks}, but the launcher started {os.environ['WORLD_SIZE']}; leave it out"
            )
        return 0 if compare(verification, say) else 1
    ranks = given.ranks if given.ranks is not None else gpus or sizes.least_ranks(2)
    for problem in sizes.problems(ranks):
        raise ValueError(problem)
    if gpus and ranks > gpus:
        raise ValueError(f"--ranks: {ranks} ranks, but {gpus} GPUs; use torchrun or srun on several nodes, or --cpu")
    return run_ranks([sys.executable, "-m", "nemo_fiberpo.cli", *arguments], ranks)
