"""The `algorithm` section of a run's config: how rollouts become optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.fields import choice, whole
from nemo_fiberpo.objective import OBJECTIVES, RatioGating, Stratum
from nemo_fiberpo.objective.surrogate import WEIGHTS

ADVANTAGES = ("group_normalized", "rloo", "given")
TRUNCATED = ("keep", "mask")


@dataclass(frozen=True)
class KlSettings:
    """Penalty on the KL divergence to the initial policy, in the loss: coefficient times the k3 estimate per token,
    exp(d) - d - 1 with d = log pi_init - log pi, weighted as the objective weights tokens. 0 switches it off."""

    coefficient: float = 0.0


@dataclass(frozen=True)
class HierarchyGating:
    """FiberPO: the hierarchy's own gates act.

    use_min   J = sum_i w_i min(r_i A_i, rhat_i A_i), see `nemo_fiberpo.token_coefficients`; false is (18) to the letter
    """

    use_min: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.use_min, bool):
            raise ValueError(f"use_min: must be true or false, got {self.use_min!r}")


@dataclass(frozen=True)
class AlgorithmSettings:
    """How rollouts become optimizer steps.

    objective            fiberpo: gated by the hierarchy; another of `OBJECTIVES`: by `gating`, while the hierarchy only
                         reports. conf/algorithm/ has a file for each, with its `weights`
    gating               the fields of that objective's map in `objective/ratio_gating.py` or `objective/baselines.py`;
                         for fiberpo, those of `HierarchyGating`
    compile              whether the objective's passes over tokens are compiled: auto (on a GPU), true or false. The
                         environment variable NEMO_FIBERPO_COMPILE (auto, 1 or 0) comes before it
    samples_per_prompt   G, responses per prompt: the prompt group
    prompts_per_rollout  prompts per RL step, over all ranks
    optimizer_steps      minibatches, hence optimizer steps, per pass over a rollout; each holds whole prompt groups
    epochs               passes over a rollout
    rl_steps             RL steps to run, or -1 for the whole data set
    data_epochs          passes over the prompts at most
    advantage            group_normalized: (r - mean) / std over the prompt group; rloo: r - mean of the others of the
                         group; given: r itself, as the grader or reward server returned it
    weights              token weights w_i, see `nemo_fiberpo.token_weights`; `fixed_length` (tokens) is the L of
                         fixed_length_mean
    truncated            responses cut at the length limit: `keep` trains on them with the reward they got; `mask` takes
                         them out of the loss and out of every cell, their rewards stay in the group's baseline
    kl                   see KlSettings
    packing              pack the samples of a micro-batch into one row without padding between them (THD format); on a
                         GPU that is Transformer Engine's
    passes               2: exact for every hierarchy and layout. 1: saves the second forward pass where each cell lies
                         inside one micro-batch of one data-parallel rank, which is checked
    val_check_interval   RL steps between evaluations on the held-out prompts; 0: never
    save_interval        RL steps between checkpoints, a multiple of val_check_interval; the end of training and of its
                         time, and a run that a signal stops, are saved too. 0: only a run that a signal or its time
                         limit stops is saved, the trained policy never
    """

    samples_per_prompt: int
    prompts_per_rollout: int
    objective: str = "fiberpo"
    gating: RatioGating | HierarchyGating = field(default_factory=HierarchyGating)
    compile: bool | str = "auto"
    optimizer_steps: int = 1
    epochs: int = 1
    rl_steps: int = -1
    data_epochs: int = 1
    advantage: str = "group_normalized"
    weights: str = "trajectory_mean"
    fixed_length: int | None = None
    truncated: str = "keep"
    kl: KlSettings = field(default_factory=KlSettings)
    packing: bool = False
    passes: int = 2
    val_check_interval: int = 0
    save_interval: int = 0

    def __post_init__(self) -> None:
        choice(self, "objective", tuple(OBJECTIVES))
        kind = OBJECTIVES[self.objective] or HierarchyGating
        if not isinstance(self.gating, kind):
            raise ValueError(
                f"gating: objective {self.objective} has the fields of {kind.__name__}, got {self.gating!r}"
            )
        if self.compile != "auto" and not isinstance(self.compile, bool):
            raise ValueError(f"compile: must be auto, true or false, got {self.compile!r}")
        for name in ("samples_per_prompt", "prompts_per_rollout", "optimizer_steps", "epochs", "data_epochs"):
            whole(self, name, 1)
        for name in ("val_check_interval", "save_interval"):
            whole(self, name, 0)
        whole(self, "rl_steps", -1)
        if not isinstance(self.packing, bool):
            raise ValueError(f"packing: must be true or false, got {self.packing!r}")
        if isinstance(self.passes, bool) or self.passes not in (1, 2):
            raise ValueError(f"passes: must be 1 or 2, got {self.passes!r}")
        choice(self, "advantage", ADVANTAGES)
        choice(self, "weights", WEIGHTS)
        choice(self, "truncated", TRUNCATED)
        if self.prompts_per_rollout % self.optimizer_steps:
            raise ValueError(
                f"optimizer_steps: {self.optimizer_steps} must divide prompts_per_rollout = "
                f"{self.prompts_per_rollout}, so that every optimizer step holds whole prompt groups"
            )
        if self.advantage != "given" and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt} leaves advantage={self.advantage} without a baseline; "
                "take at least 2, or advantage: given"
            )
        if (self.weights == "fixed_length_mean") != (self.fixed_length is not None):
            raise ValueError("fixed_length: a number of tokens, for weights: fixed_length_mean and only there")
        if self.fixed_length is not None:
            whole(self, "fixed_length", 1)
        if self.val_check_interval and self.save_interval % self.val_check_interval:
            raise ValueError(
                f"save_interval: {self.save_interval} must be a multiple of val_check_interval = "
                f"{self.val_check_interval}"
            )
        factor = self.kl.coefficient
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
            raise ValueError(f"kl.coefficient: must be a finite number, at least 0, got {factor!r}")

    @property
    def gating_map(self) -> RatioGating | None:
        """The map that gates in place of the hierarchy; None for fiberpo."""
        return None if isinstance(self.gating, HierarchyGating) else self.gating

    @property
    def use_min(self) -> bool:
        """Whether the minimum of PPO is taken on top of the hierarchy's gates."""
        return isinstance(self.gating, HierarchyGating) and self.gating.use_min

    @property
    def samples_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.samples_per_prompt

    def total_steps(self, prompts: int) -> int:
        """Optimizer steps of the whole run on a data set of `prompts` prompts."""
        rl_steps = self.data_epochs * (prompts // self.prompts_per_rollout)
        if self.rl_steps >= 0:
            rl_steps = min(rl_steps, self.rl_steps)
        return rl_steps * self.optimizer_steps * self.epochs

    def check_passes(self, strata: Sequence[Stratum], micro_batch_size: int) -> None:
        """ValueError where one pass cannot be exact whatever the rollout; the rest shows in its cells."""
        # A join with the trajectory lies inside it.
        coarser = [stratum.name for stratum in strata if "trajectory" not in stratum.columns]
        if self.passes == 2 or not coarser:
            return
        if self.packing:
            raise ValueError(
                f"algorithm.passes: 1 with packing: true, which deals samples to micro-batches by length, but the "
                f"hierarchy has {coarser}; set passes to 2, or take hierarchy=trajectory"
            )
        if "prompt_group" in coarser and micro_batch_size % self.samples_per_prompt:
            raise ValueError(
                f"model.micro_batch_size: {micro_batch_size} is not a multiple of algorithm.samples_per_prompt = "
                f"{self.samples_per_prompt}, which passes: 1 needs for prompt groups; change it, or set passes to 2"
            )

    def check_data(self, data: DataSettings) -> None:
        """ValueError where the data does not go with the algorithm. Files that are not there yet are not looked at."""
        if self.val_check_interval and data.heldout is None:
            raise ValueError(
                f"algorithm.val_check_interval: {self.val_check_interval} evaluates data.heldout, which is not given; "
                "give a file of held-out prompts, or set it to 0"
            )
        path = Path(data.train)
        if not path.is_file():
            return
        with path.open("rb") as file:
            prompts = sum(1 for line in file if line.strip())
        if prompts < self.prompts_per_rollout:
            raise ValueError(
                f"algorithm.prompts_per_rollout: {self.prompts_per_rollout}, but data.train = {path} has {prompts} "
                "prompts; a rollout takes each at most once: set it to at most that, or give more prompts"
            )

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step over all ranks; NeMo's global batch size."""
        return self.samples_per_rollout // self.optimizer_steps
