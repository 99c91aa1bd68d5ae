"""NeMo 2.2.1 and NeMo-Aligner 0.7.0 without a GPU, on top of `megatron.cpu`.

Both assume NVIDIA's containers, with Apex, Transformer Engine, TensorRT-LLM and PyTriton. `install()` patches what a
CPU run needs, for the whole process, until `uninstall()`; call it before importing anything of `nemo_aligner`. A GPU
machine uses none of this.

The configuration must also set (`conf/model/` does): transformer_engine=False, fusions off,
use_cpu_initialization=True, optim.name=mcore_distributed_optim, trainer.accelerator=cpu.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from nemo_fiberpo.megatron import cpu as megatron_cpu
from nemo_fiberpo.megatron.patching import Patch, Patches

_GPT = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"
_OVERRIDES = "nemo.collections.nlp.parts.nlp_overrides"
_FILE_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


class _Unavailable:
    """Stands for a class that needs a GPU: it can be imported but not instantiated."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(f"{type(self).__name__} needs a GPU machine and is not available in the CPU mode")


def _local_spec(packed_rows: bool, spec_name: str = "", config: Any = None, *_args: Any, **_kwargs: Any) -> Any:
    """Megatron-core's local layer spec, which needs neither Apex nor Transformer Engine; with this package's attention
    and norms if a sequence is split or rows are packed."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from nemo_fiberpo.megatron.cpu_layers import local_block_spec

    if spec_name:
        raise ValueError(
            f"model.name={spec_name!r}: the CPU mode builds Megatron-core's local layer spec; leave name empty"
        )
    if packed_rows or config.context_parallel_size > 1 or config.sequence_parallel:
        return local_block_spec(config, get_num_layers_to_build(config))
    return get_gpt_layer_local_spec(config.num_moe_experts, config.moe_grouped_gemm)


def _seeding_the_tracker(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    def wrapped(seed: int) -> None:
        from megatron.core import parallel_state, tensor_parallel

        set_random_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())

    return wrapped


def _listify(model: Any) -> list[Any]:
    return model if isinstance(model, list) else [model]


def _one_dimensional(rebalance: Callable) -> Callable:
    """`rebalance_nd_tensor` gathers a 0-dimensional size, which gloo does not accept."""
    import torch

    def all_gather_into_tensor(output: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        return rebalance(output, tensor.reshape(1) if tensor.dim() == 0 else tensor, group=group, async_op=async_op)

    assert rebalance is torch.distributed.all_gather_into_tensor
    return all_gather_into_tensor


def _with_serialization_format(write_item: Callable) -> Callable:
    """Since torch 2.6 the private writer takes two more arguments: stream transforms and serialization format."""
    from torch.distributed.checkpoint import filesystem

    @functools.wraps(write_item)
    def wrapped(*args: Any) -> Any:
        if len(args) == 4:
            args = (filesystem._StorageWriterTransforms(), *args, filesystem.SerializationFormat.TORCH_SAVE)
        return write_item(*args)

    return wrapped


def _adam_with_group_steps() -> type:
    """torch's AdamW with Apex's state: `step` per parameter group, not per parameter."""
    import torch

    class AdamW(torch.optim.AdamW):
        @contextlib.contextmanager
        def _steps_with_parameters(self) -> Iterator[None]:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if self.state.get(parameter):
                        self.state[parameter]["step"] = torch.tensor(float(group.get("step", 0)))
            yield
            for state in self.state.values():
                state.pop("step", None)

        def __setstate__(self, state: dict[str, Any]) -> None:
            torch.optim.Optimizer.__setstate__(self, state)
            with self._steps_with_parameters():
                super().__setstate__({})

        def step(self, closure: Any = None) -> Any:
            with self._steps_with_parameters():
                loss = super().step(closure)
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
            return loss

    return AdamW


def _identity(_self: Any, checkpoint: Any) -> Any:
    return checkpoint


def _patches(packed_rows: bool) -> Patches:
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    return Patches(
        (
            Patch(
                "nemo.collections.nlp.models.nlp_model",
                "get_megatron_pretrained_bert_models",
                "asks a registry on the network for a list of BERT models",
                list,
            ),
            Patch(
                _GPT,
                "get_specs",
                "builds every layer spec, those of Transformer Engine included, to pick one",
                functools.partial(_local_spec, packed_rows),
            ),
            Patch(
                "nemo.collections.nlp.modules.common.megatron.megatron_init",
                "_set_random_seed",
                "leaves Megatron's RNG tracker without its streams where no GPU is counted",
                wrap=_seeding_the_tracker,
            ),
            Patch(
                "nemo.collections.nlp.modules.common.megatron.build_model",
                "set_defaults_if_not_set_tensor_model_parallel_attributes",
                "comes from Apex; Megatron-core has the same",
                set_defaults_if_not_set_tensor_model_parallel_attributes,
                missing_ok=True,
            ),
            Patch(
                "nemo.collections.nlp.modules.common.megatron.utils",
                "listify_model",
                "comes from Apex",
                _listify,
                missing_ok=True,
            ),
            *(
                Patch(
                    "nemo.collections.nlp.modules.common.megatron.utils",
                    name,
                    "is Apex's; only isinstance checks read it",
                    _Unavailable,
                    missing_ok=True,
                )
                for name in ("FusedLayerNorm", "FastLayerNorm", "MixedFusedRMSNorm")
            ),
            Patch(_OVERRIDES, "HAVE_APEX", "guards the distributed strategy, which itself does not need Apex", True),
            Patch(
                _OVERRIDES,
                "McoreDistributedOptimizer",
                "is imported together with Apex's optimizer",
                McoreDistributedOptimizer,
                missing_ok=True,
            ),
            Patch(
                _OVERRIDES,
                "MegatronDistributedFusedAdam",
                "is Apex's; only isinstance checks read it",
                _Unavailable,
                missing_ok=True,
            ),
            Patch(f"{_OVERRIDES}:NLPDDPStrategy", "_fix_tensors_device", "asserts that CUDA is initialised", _identity),
            Patch(
                "torch.distributed",
                "all_gather_into_tensor",
                "gloo refuses the 0-dimensional size NeMo-Aligner gathers",
                wrap=_one_dimensional,
            ),
            Patch(
                _FILE_WRITER,
                "_write_item",
                "Megatron-core 0.11 calls torch's writer by its older signature",
                wrap=_with_serialization_format,
            ),
            Patch(
                "megatron.core.optimizer",
                "Adam",
                "torch's AdamW counts steps per parameter; Megatron-core saves Apex's, which counts per group",
                _adam_with_group_steps(),
            ),
            Patch(
                "megatron.core.optimizer.distrib_optimizer",
                "HAVE_APEX_OR_TE",
                "tells whether Adam counts steps per group, which the one above does",
                True,
            ),
        )
    )


def _stub_modules() -> dict[str, ModuleType]:
    """GPU-only modules that NeMo-Aligner imports unguarded, each only if it is absent."""
    stubs: dict[str, ModuleType] = {}
    if importlib.util.find_spec("tensorrt_llm") is None:
        trt_llm = ModuleType("nemo_aligner.utils.trt_llm")
        trt_llm.GPTGenerateTRTLLM = type("GPTGenerateTRTLLM", (_Unavailable,), {})  # type: ignore[attr-defined]
        stubs[trt_llm.__name__] = trt_llm
    if importlib.util.find_spec("pytriton") is None:
        pytriton, client = ModuleType("pytriton"), ModuleType("pytriton.client")
        client.FuturesModelClient = type("FuturesModelClient", (_Unavailable,), {})  # type: ignore[attr-defined]
        pytriton.client = client  # type: ignore[attr-defined]
        stubs |= {"pytriton": pytriton, "pytriton.client": client}
    return stubs


_installed: tuple[Patches, list[str], bool] | None = None


def install(packed_rows: bool = False) -> None:
    """Make NeMo-Aligner run on the CPU in this process; a second call does nothing.

    packed_rows  build models whose attention reads packed rows

    Raises ImportError naming the symbol if this version of NeMo lacks one of those replaced.
    """
    global _installed
    if _installed is not None:
        return
    had_megatron = megatron_cpu.installed()
    # NeMo reads its container's version and parses it without a guard.
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "24.07")
    megatron_cpu.install()
    stubs = {name: module for name, module in _stub_modules().items() if name not in sys.modules}
    sys.modules.update(stubs)
    patches = _patches(packed_rows)
    patches.apply()
    _installed = (patches, list(stubs), had_megatron)


def uninstall() -> None:
    """Undo `install()`."""
    global _installed
    if _installed is None:
        return
    patches, stubs, had_megatron = _installed
    patches.undo()
    for name in stubs:
        sys.modules.pop(name, None)
    if not had_megatron:
        megatron_cpu.uninstall()
    _installed = None
