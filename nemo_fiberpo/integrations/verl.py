"""verl as a host: FiberPO as `actor.policy_loss.loss_mode=fiberpo` on verl's FSDP and Megatron engines.

verl calls `engine.train_batch(mini-batch, loss)` once per optimizer step. The engines here take the exact step there:

    A  `infer_batch` of the mini-batch                    -> current log-probs, hence log-ratios
    B  one all-reduce: sums of the cells
    C  gates, one all-reduce: adjoint sums                -> coefficients c_j = dJ / d log pi_j
    D  verl's own `train_batch`, whose policy loss is     -sum_j c_j log pi_j, with c constant

The coefficients travel in the mini-batch, so that verl may split it into micro-batches as it likes. Entropy bonus, KL
loss, clipping and logging stay verl's.

Importing this module registers the engines and the loss. verl imports it by the entry point `verl.plugins`; so does its
config, which names `FiberPOConfig`. A step that cannot be exact is an error, never another objective.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

# First: verl asks for the platform once, when its engines are imported.
import nemo_fiberpo.integrations.verl_cpu  # noqa: F401  isort:skip
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.utils.metric.utils import Metric
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from nemo_fiberpo.config import load_hierarchy, load_token_labels
from nemo_fiberpo.integrations.verl_batch import COEFFICIENTS, REFERENCE, ResponseBatch, Step
from nemo_fiberpo.integrations.verl_columns import check_columns
from nemo_fiberpo.megatron.groups import Axis, Reducer, TokenAxes
from nemo_fiberpo.megatron.schedule import refuse_inexact, without_trace
from nemo_fiberpo.megatron.step import linear_loss
from nemo_fiberpo.objective import OBJECTIVES, Hierarchy, RatioGating, RolloutCorrection, check_gating

__all__ = ["FiberPOConfig", "FiberPOEngine", "FiberPOFSDPEngine", "register"]

LOSS_MODE = "fiberpo"
DROPOUT = (
    "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "dropout", "router_jitter_noise",
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass
class FiberPOConfig(PolicyLossConfig):
    """`actor.policy_loss`, with `_target_: nemo_fiberpo.integrations.verl.FiberPOConfig` and `loss_mode: fiberpo`.

    hierarchy   the path of a YAML file, or its content
    objective   fiberpo: gated by the hierarchy; another of `OBJECTIVES`: by `gating`, while the hierarchy only reports
    gating      the fields of that objective's map in `objective/ratio_gating.py` or `objective/baselines.py`; for
                fiberpo {use_min: true or false}
    rollout_weights   the fields of `RolloutCorrection`, such as {kind: tis, high: 2}, in place of verl's own
                `algorithm.rollout_correction`; needs `rollout_log_probs`
    """

    hierarchy: Any = None
    objective: str = "fiberpo"
    gating: dict[str, Any] = field(default_factory=dict)
    rollout_weights: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loss_mode == LOSS_MODE:
            self.parsed = self.parse()
            try:
                self.correction = RolloutCorrection(**self.rollout_weights)
            except (TypeError, ValueError) as error:
                raise ValueError(f"actor.policy_loss.rollout_weights: {error}") from error

    def parse(self) -> tuple[Hierarchy, RatioGating | None, bool]:
        """The hierarchy, the map that gates in its place, and whether a minimum is taken. Raises ValueError."""
        where = "actor.policy_loss"
        if self.hierarchy is None:
            raise ValueError(f"{where}.hierarchy: is required: a YAML file's path, see docs/hierarchy.md")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"{where}.objective: must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        hierarchy, kind, fields = load_hierarchy(self.hierarchy), OBJECTIVES[self.objective], dict(self.gating)
        check_columns(hierarchy)
        if load_token_labels(self.hierarchy) is not None:
            raise ValueError(
                f"{where}.hierarchy: token_labels and ignore are for the NeMo-Aligner host; leave them out, with the "
                "strata that use them. verl's response_mask already leaves out what a tool wrote"
            )
        use_min = fields.pop("use_min", False) if kind is None else False
        try:
            gating = kind(**fields) if kind is not None else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}.gating: of objective {self.objective}: {error}") from error
        if kind is None and (fields or not isinstance(use_min, bool)):
            raise ValueError(f"{where}.gating: fiberpo has use_min, true or false, got {dict(self.gating)}")
        check_gating(gating, hierarchy)
        return hierarchy, gating, use_min


@dataclass
class MicroBatch:
    """What the policy loss needs beside verl's arguments; [b, R]. `error` is what it found."""

    coefficients: Tensor
    reference: Tensor
    value: float  # this micro-batch's share of -J, for verl's figures
    error: float = 0.0


_current: ContextVar[MicroBatch | None] = ContextVar("fiberpo_micro_batch", default=None)


@register_policy_loss(LOSS_MODE)
def fiberpo_policy_loss(
    *, log_prob: Tensor, response_mask: Tensor, config: Any, **_: Any
) -> tuple[Tensor, dict[str, Any]]:
    """-sum_j c_j log pi_j of one micro-batch, times `dp_size` as verl wants it, with the value of -J."""
    micro = _current.get()
    if micro is None:
        raise RuntimeError(
            f"actor.policy_loss.loss_mode={LOSS_MODE}: this engine is not one of nemo_fiberpo's, so the step cannot be "
            f"exact. They are registered for: {', '.join(_registered) or 'nothing'}; set actor.strategy to fsdp2 or "
            "megatron on one of these devices"
        )
    gap = (log_prob.detach() - micro.reference.to(log_prob.device)).abs()
    micro.error = float(torch.where(response_mask, gap, 0.0).amax())
    loss = linear_loss(log_prob, micro.coefficients) * config.global_batch_info["dp_size"]
    return loss - loss.detach() + micro.value, {}


def _with_coefficients(loss_function: Callable, value_per_row: float, *, data: TensorDict, **arguments: Any) -> Any:
    """verl's loss of one micro-batch, with the coefficients that travel in it at hand."""
    carried = data.select(COEFFICIENTS, REFERENCE).to_padded_tensor()
    micro = MicroBatch(carried[COEFFICIENTS], carried[REFERENCE], value_per_row * data.shape[0])
    token = _current.set(micro)
    try:
        loss, metrics = loss_function(data=data, **arguments)
    finally:
        _current.reset(token)
    return loss, metrics | {"recompute_error": Metric("max", micro.error)}


class FiberPOEngine:
    """Mixin over an engine of verl: the exact step where the loss asks for it, verl's own step elsewhere."""

    step: Step | None = None

    def train_batch(self: Any, data: TensorDict, loss_function: Callable) -> Any:
        """One optimizer step. SPMD: every rank calls this; one exchange of labels, one of cells, and
        `hierarchy.num_reductions` all-reduces beside verl's own."""
        config = requested(loss_function)
        if config is None:
            return super().train_batch(data, loss_function)  # type: ignore[misc]
        first = self.step is None
        if self.step is None:
            self.refuse_inexact()
            hierarchy, gating, use_min = config.policy_loss.parsed
            correction = config.policy_loss.correction
            self.step = Step(hierarchy, gating, use_min, Reducer(self.token_axes()), correction)
        with self.without_trace():
            output = self.infer_batch(data, None)
        batch = ResponseBatch.of(data, output.get("model_output", {}).get("log_probs"))
        calls = self.step.reducer.calls
        result, of_correction = self.step.evaluate(batch, data, config)
        if first and dist.get_rank() == 0:
            logger.warning(describe(self, config.policy_loss))  # verl shows no lower level unless told to
        batch.carry(data, result)
        value = -result.value / data.shape[0]
        output = super().train_batch(data, partial(_with_coefficients, loss_function, value))  # type: ignore[misc]
        if self.is_mp_src_rank_with_outputs():
            figures = {f"gates/{name}": figure for name, figure in result.report.metrics().items()} | of_correction
            figures["gate_all_reduces"] = float(self.step.reducer.calls - calls)
            kinds = {name: "max" if "max" in name else "mean" for name in figures}
            output["metrics"] |= {name: Metric(kinds[name], figure) for name, figure in figures.items()}
        return output

    def token_axes(self) -> TokenAxes:
        """Which ranks hold which tokens."""
        raise NotImplementedError

    def refuse_inexact(self) -> None:
        """ValueError under a setting with which passes A and D would not be the same function."""
        raise NotImplementedError

    def without_trace(self) -> contextlib.AbstractContextManager[None]:
        """Around pass A."""
        return contextlib.nullcontext()


def requested(loss_function: Any) -> Any:
    """The actor's config where its loss is ours, else None. ValueError where it is ours and cannot be had."""
    config = getattr(loss_function, "keywords", {}).get("config")
    policy_loss = getattr(config, "policy_loss", None)
    if policy_loss is None or policy_loss.get("loss_mode") != LOSS_MODE:
        return None
    if not isinstance(policy_loss, FiberPOConfig):
        raise ValueError(
            f"actor.policy_loss._target_: must be {FiberPOConfig.__module__}.FiberPOConfig for loss_mode={LOSS_MODE}, "
            f"and actor.policy_loss.hierarchy a hierarchy's YAML file; it is {type(policy_loss).__name__}"
        )
    if loss_function.func is not ppo_loss:
        raise ValueError(
            f"loss_mode={LOSS_MODE}: {loss_function.func.__name__} is another loss; switch distillation off"
        )
    return config


class FiberPOFSDPEngine(FiberPOEngine, FSDPEngineWithLMHead):
    """FSDP and FSDP2, with or without Ulysses sequence parallelism, over which verl gathers the log-probs."""

    def token_axes(self) -> TokenAxes:
        sp = self.ulysses_sequence_parallel_size
        dp = Axis("dp", self.get_data_parallel_size(), self.get_data_parallel_rank(), sharded=True)
        return TokenAxes((Axis("sp", sp, dist.get_rank() % sp, sharded=False), dp))

    def refuse_inexact(self) -> None:
        for name in DROPOUT:
            value = getattr(self.model_config.hf_config, name, None)
            if isinstance(value, float) and value > 0:
                raise ValueError(
                    f"actor_rollout_ref.model.override_config.{name}: {value} is refused by the exact step, whose two "
                    "passes must be the same function; set it to 0"
                )


_registered: list[str] = []


def register(device: str, vendor: str | None) -> None:
    """Make the engines those of a device of a vendor, or of every vendor that has none of its own.

    verl looks for (device, vendor) first, so its own engines stay where they are.
    """
    engines: list[tuple[list[str], type]] = [(["fsdp", "fsdp2"], FiberPOFSDPEngine)]
    with contextlib.suppress(ImportError):  # an installation without megatron-core or its bridge
        engines.append((["megatron"], _megatron_engine()))
    for backends, engine in engines:
        EngineRegistry.register("language_model", backends, device, vendor)(engine)
        _registered.extend(f"{backend} on {vendor or device}" for backend in backends)


def _megatron_engine() -> type:
    from verl.workers.engine.megatron import MegatronEngineWithLMHead

    class FiberPOMegatronEngine(FiberPOEngine, MegatronEngineWithLMHead):
        """Megatron-core under verl's schedule, which gathers log-probs over context parallel ranks."""

        def token_axes(self) -> TokenAxes:
            return TokenAxes.from_parallel_state(gathered={"cp": "slice"})

        def refuse_inexact(self) -> None:
            if self.engine_config.dynamic_context_parallel:
                raise ValueError(
                    "actor_rollout_ref.actor.megatron.dynamic_context_parallel: true is refused by the exact step; set "
                    "it to false"
                )
            # verl divides by the tokens that calculate_per_token_loss counts, so that it changes no gradient.
            refuse_inexact(SimpleNamespace(**{**vars(self.tf_config), "calculate_per_token_loss": False}))

        @contextlib.contextmanager
        def without_trace(self) -> Iterator[None]:
            with without_trace(list(self.module)):
                yield

    return FiberPOMegatronEngine


def describe(engine: Any, config: FiberPOConfig) -> str:
    """What is logged once, when the gates of the first step have acted."""
    hierarchy = engine.step.hierarchy
    axes = " x ".join(f"{axis.name} {axis.size}" for axis in engine.step.reducer.axes.axes)
    return (
        f"FiberPO is active: objective {config.objective} on {type(engine).__name__} ({axes}), exact over "
        f"micro-batches and ranks, {hierarchy.num_reductions} reductions per optimizer step\n{hierarchy.describe()}"
    )


for _device, _vendor in (("cuda", "nvidia"), ("cuda", "amd"), ("cpu", None)):
    register(_device, _vendor)
