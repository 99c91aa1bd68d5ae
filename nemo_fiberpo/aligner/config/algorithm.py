"""The `algorithm` section of a run's config: how rollouts become optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.fields import Settings, setting
from nemo_fiberpo.objective import OBJECTIVES, RatioGating, RolloutCorrection, Stratum
from nemo_fiberpo.objective.surrogate import WEIGHTS


@dataclass(frozen=True)
class KlSettings(Settings):
    """Penalty on the KL divergence to the initial policy, in the loss."""

    coefficient: float = setting(0.0, at_least=0)
    """Factor of the KL penalty; 0 disables it. The penalty is the k3 estimate of each token, exp(d) - d - 1 with d =
    log pi_init - log pi, weighted as the objective weights tokens."""


@dataclass(frozen=True)
class HierarchyGating(Settings):
    """FiberPO: gated by the hierarchy."""

    use_min: bool = setting(False)
    """Whether to take PPO's minimum on top of the gates: J = sum_i w_i min(r_i A_i, rhat_i A_i). `false` is (18) of the
    paper."""


@dataclass(frozen=True)
class AlgorithmSettings(Settings):
    """How rollouts become optimizer steps. conf/algorithm/ has a file for each objective."""

    samples_per_prompt: int = setting(at_least=1)
    """Responses per prompt, the size of a prompt group."""

    prompts_per_rollout: int = setting(at_least=1)
    """Prompts per RL step, over all ranks."""

    objective: str = setting("fiberpo", choices=tuple(OBJECTIVES))
    """`fiberpo` is gated by the hierarchy. The others are gated by `algorithm.gating` and only report the hierarchy."""

    gating: RatioGating | HierarchyGating = setting(default_factory=HierarchyGating, form="mapping")
    """Parameters of the objective, see `fiberpo config algorithm.gating`."""

    compile: bool | str = setting("auto", form="auto, true or false")
    """Whether the objective's passes over tokens are compiled; `auto`: on a GPU. The environment variable
    NEMO_FIBERPO_COMPILE (auto, 1 or 0) takes precedence."""

    optimizer_steps: int = setting(1, at_least=1)
    """Optimizer steps per pass over a rollout, one per minibatch. Must divide `prompts_per_rollout`: a minibatch holds
    whole prompt groups."""

    epochs: int = setting(1, at_least=1)
    """Passes over a rollout."""

    rl_steps: int = setting(-1, at_least=-1, may_change=True)
    """RL steps to run; -1: as many as the prompts allow."""

    data_epochs: int = setting(1, at_least=1, may_change=True)
    """Maximum number of passes over the prompts."""

    advantage: str = setting("group_normalized", choices=("group_normalized", "rloo", "given"))
    """Advantage of a response with reward r. `group_normalized`: (r - mean) / std over its prompt group. `rloo`: r
    minus the mean of the others of the group. `given`: r itself, as the grader or the reward server returned it."""

    weights: str = setting("trajectory_mean", choices=WEIGHTS)
    """Weight of a token. `trajectory_mean`: every trajectory counts the same. `token_mean`: every token counts the
    same. `fixed_length_mean`: 1 / (trajectories x `fixed_length`)."""

    fixed_length: int | None = setting(None, at_least=1)
    """Divisor of `weights: fixed_length_mean`, in tokens. Required there, and only there."""

    truncated: str = setting("keep", choices=("keep", "mask"))
    """What happens to responses cut at the length limit. `keep`: they are trained on with their reward. `mask`: they
    are left out of the loss and of all cells, but their reward counts in the baseline of their group."""

    kl: KlSettings = setting(default_factory=KlSettings)

    rollout_correction: RolloutCorrection = setting(default_factory=RolloutCorrection)

    packing: bool = setting(False)
    """Whether the samples of a micro-batch are packed into one row without padding (THD). On a GPU this needs
    Transformer Engine."""

    passes: int | str = setting(2, form="1, 2, auto or all_forward")
    """Forward passes per optimizer step. 2 is exact for every hierarchy and layout. 1 saves the second pass; it
    requires every cell to lie inside one micro-batch of one data-parallel rank, which is checked. `auto` is exact
    everywhere: it runs the second pass only over micro-batches in which it changes a coefficient, as long as that costs
    less than 2. `all_forward` is exact everywhere and saves the second pass: all forward passes come before all
    backward passes. It holds what the backward passes need of all micro-batches at once, so it is meant for
    `model.activations_checkpoint_granularity: full`; `fiberpo plan` counts that memory. See docs/performance.md."""

    kept_on: str = setting("device", choices=("device", "host"))
    """Where `passes: all_forward` keeps what the backward passes need. `host`: in pinned host memory, which a step
    copies to and from."""

    micro_batches: str = setting("any", choices=("any", "whole_groups"))
    """Which samples share a micro-batch. `whole_groups`: all responses to a prompt, so that prompt groups and
    trajectories are cells of one micro-batch. `model.micro_batch_size` must be a multiple of `samples_per_prompt`."""

    val_check_interval: int = setting(0, at_least=0, may_change=True)
    """RL steps between evaluations of the held-out prompts; 0: none during training."""

    save_interval: int = setting(0, at_least=0, may_change=True)
    """RL steps between checkpoints, a multiple of `val_check_interval`. The end of training is saved too, and a run
    stopped by a signal or its time limit. 0: only such a stopped run is saved, and no trained policy is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = OBJECTIVES[self.objective] or HierarchyGating
        if not isinstance(self.gating, kind):
            raise ValueError(
                f"gating: objective {self.objective} has the fields of {kind.__name__}, got {self.gating!r}"
            )
        if self.compile != "auto" and not isinstance(self.compile, bool):
            raise ValueError(f"compile: must be auto, true or false, got {self.compile!r}")
        if self.passes not in (1, 2, "auto", "all_forward") or isinstance(self.passes, bool):
            raise ValueError(f"passes: must be 1, 2, auto or all_forward, got {self.passes!r}")
        if self.kept_on == "host" and not self.all_forward:
            raise ValueError(f"kept_on: host goes with passes: all_forward, got passes: {self.passes}; leave it out")
        if self.prompts_per_rollout % self.optimizer_steps:
            raise ValueError(
                f"optimizer_steps: {self.optimizer_steps} must divide prompts_per_rollout = "
                f"{self.prompts_per_rollout}, so that every optimizer step holds whole prompt groups"
            )
        if self.advantage != "given" and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt} leaves advantage={self.advantage} without a baseline; "
                "set it to at least 2, or advantage: given"
            )
        if (self.weights == "fixed_length_mean") != (self.fixed_length is not None):
            raise ValueError("fixed_length: required for weights: fixed_length_mean, and only there")
        if self.val_check_interval and self.save_interval % self.val_check_interval:
            raise ValueError(
                f"save_interval: {self.save_interval} must be a multiple of val_check_interval = "
                f"{self.val_check_interval}"
            )

    @property
    def gating_map(self) -> RatioGating | None:
        """The ratio-gating map of the objective; None for fiberpo."""
        return None if isinstance(self.gating, HierarchyGating) else self.gating

    @property
    def use_min(self) -> bool:
        """Whether PPO's minimum is taken on top of the hierarchy's gates."""
        return isinstance(self.gating, HierarchyGating) and self.gating.use_min

    @property
    def all_forward(self) -> bool:
        """Whether all forward passes of a step come before all backward passes."""
        return self.passes == "all_forward"

    @property
    def whole_groups(self) -> bool:
        """Whether the samples of a prompt group are dealt to one rank, and in padded rows to one micro-batch."""
        return self.passes == 1 or self.micro_batches == "whole_groups"

    @property
    def on_policy(self) -> bool | None:
        """Whether a step is on-policy; None leaves it to the actor. A map that couples the tokens of a trajectory
        is the identity at ratio 1 where they have one weighted advantage only, and corrections differ by token."""
        couples = self.gating_map is not None and self.gating_map.stratum is not None
        return False if couples and self.rollout_correction.active else None

    def total_steps(self, prompts: int) -> int:
        """Optimizer steps of the whole run on a data set of `prompts` prompts."""
        rl_steps = self.data_epochs * (prompts // self.prompts_per_rollout)
        if self.rl_steps >= 0:
            rl_steps = min(rl_steps, self.rl_steps)
        return rl_steps * self.optimizer_steps * self.epochs

    def check_passes(self, strata: Sequence[Stratum], micro_batch_size: int) -> None:
        """ValueError if prompt groups do not fit into micro-batches, or if one pass cannot be exact for any rollout.
        The rest is checked on a rollout's cells."""
        if self.micro_batches == "whole_groups" and micro_batch_size % self.samples_per_prompt:
            raise ValueError(
                f"algorithm.micro_batches: whole_groups, but model.micro_batch_size = {micro_batch_size} is not a "
                f"multiple of algorithm.samples_per_prompt = {self.samples_per_prompt}; change one, or set it to any"
            )
        # A join with the trajectory lies inside it.
        coarser = [stratum.name for stratum in strata if "trajectory" not in stratum.columns]
        if self.passes != 1 or not coarser:
            return
        if self.packing and (self.micro_batches == "any" or coarser != ["prompt_group"]):
            raise ValueError(
                f"algorithm.passes: 1 with packing: true, which deals samples to micro-batches by length, but the "
                f"hierarchy has {coarser}; set passes to 2 or auto, or use hierarchy=trajectory; micro_batches: "
                "whole_groups keeps prompt groups together"
            )
        if "prompt_group" in coarser and micro_batch_size % self.samples_per_prompt:
            raise ValueError(
                f"model.micro_batch_size: {micro_batch_size} is not a multiple of algorithm.samples_per_prompt = "
                f"{self.samples_per_prompt}, which passes: 1 needs for prompt groups; change it, or set passes to 2"
            )

    def check_data(self, data: DataSettings) -> None:
        """ValueError if the data does not suit the algorithm. A data file that does not exist yet is not checked."""
        if self.val_check_interval and data.heldout is None:
            raise ValueError(
                f"algorithm.val_check_interval: {self.val_check_interval} evaluates data.heldout, which is not set; "
                "name a file of held-out prompts, or set it to 0"
            )
        path = Path(data.train)
        if not path.is_file():
            return
        with path.open("rb") as file:
            prompts = sum(1 for line in file if line.strip())
        if prompts < self.prompts_per_rollout:
            raise ValueError(
                f"algorithm.prompts_per_rollout: {self.prompts_per_rollout}, but data.train = {path} has {prompts} "
                "prompts; a rollout uses each at most once: lower it, or add prompts"
            )

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step over all ranks; NeMo's global batch size."""
        return self.prompts_per_rollout * self.samples_per_prompt // self.optimizer_steps
