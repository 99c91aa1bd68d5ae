"""The `algorithm`, `data` and `rewards` sections of a run's config, checked before anything is loaded.

Unknown keys and values that make no sense are ValueErrors that name the field. `hierarchy` is
`nemo_fiberpo.load_hierarchy`'s; `model`, `trainer` and `exp_manager` are NeMo's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.config import mapping, reject_unknown_keys
from nemo_fiberpo.objective import OBJECTIVES, RatioGating, Stratum
from nemo_fiberpo.objective.hierarchy import positive_number
from nemo_fiberpo.objective.surrogate import WEIGHTS
from nemo_fiberpo.objective.wording import nearest
from nemo_fiberpo.plan.assumptions import Assumptions

ADVANTAGES = ("group_normalized", "rloo", "given")
TRUNCATED = ("keep", "mask")
TOO_LONG = ("error", "drop")
REWARD_KINDS = ("rules", "server")
SCORES = ("threshold", "raw")
ON_FAILURE = ("drop", "zero", "error")
PRECISIONS = ("bf16", "bf16-mixed", 16, "16", "16-mixed", 32, "32", "32-true")
SECTIONS = (
    "name",
    "seed",
    "hierarchy",
    "algorithm",
    "data",
    "rewards",
    "model",
    "trainer",
    "exp_manager",
    "pretrained_checkpoint",
    "warm_start",
    "cluster",
    "cpu",
    "collective_timeout",
    "resume",
    "run_dir",
    "data_dir",
)


@dataclass(frozen=True)
class KlSettings:
    """Penalty on the KL divergence to the initial policy, in the loss: coefficient times the k3 estimate per token,
    exp(d) - d - 1 with d = log pi_init - log pi, weighted as the objective weights tokens. 0 switches it off."""

    coefficient: float = 0.0


@dataclass(frozen=True)
class AlgorithmSettings:
    """How rollouts become optimizer steps.

    objective            fiberpo: gated by the hierarchy; ppo, grpo, gspo, truly_ppo, apc: by `gating`, while the
                         hierarchy only reports. conf/algorithm/ has a file for each, with its `weights`
    gating               the fields of that objective's map in `objective/ratio_gating.py`; none for fiberpo
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
    gating: RatioGating | None = None
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
        _choice(self, "objective", tuple(OBJECTIVES))
        kind = OBJECTIVES[self.objective]
        if (self.gating is None) != (kind is None) or (kind is not None and not isinstance(self.gating, kind)):
            raise ValueError(
                f"gating: objective {self.objective} is gated by {kind.__name__ if kind else 'the hierarchy'}, "
                f"got {self.gating!r}"
            )
        for name in ("samples_per_prompt", "prompts_per_rollout", "optimizer_steps", "epochs", "data_epochs"):
            _whole(self, name, 1)
        for name in ("val_check_interval", "save_interval"):
            _whole(self, name, 0)
        _whole(self, "rl_steps", -1)
        if not isinstance(self.packing, bool):
            raise ValueError(f"packing: must be true or false, got {self.packing!r}")
        if isinstance(self.passes, bool) or self.passes not in (1, 2):
            raise ValueError(f"passes: must be 1 or 2, got {self.passes!r}")
        _choice(self, "advantage", ADVANTAGES)
        _choice(self, "weights", WEIGHTS)
        _choice(self, "truncated", TRUNCATED)
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
            _whole(self, "fixed_length", 1)
        if self.val_check_interval and self.save_interval % self.val_check_interval:
            raise ValueError(
                f"save_interval: {self.save_interval} must be a multiple of val_check_interval = "
                f"{self.val_check_interval}"
            )
        if not isinstance(self.kl.coefficient, (int, float)) or not 0 <= self.kl.coefficient < float("inf"):
            raise ValueError(f"kl.coefficient: must be a finite number, at least 0, got {self.kl.coefficient!r}")

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


@dataclass(frozen=True)
class DataSettings:
    """train and heldout are JSONL files (see `prompts.py`); prompts of more than max_prompt_length tokens are an error
    or dropped. `heldout_greedy` evaluates the held-out prompts by greedy decoding in addition to sampling."""

    train: str
    heldout: str | None = None
    max_prompt_length: int = 512
    too_long: str = "error"
    heldout_greedy: bool = False

    def __post_init__(self) -> None:
        _whole(self, "max_prompt_length", 1)
        _choice(self, "too_long", TOO_LONG)


@dataclass(frozen=True)
class RewardSettings:
    """kind `rules` grades responses in killable processes (see `rewards.RuleRewards` for its options); kind `server`
    asks NeMo-Aligner's reward-model server, with the client's own configuration in `server`."""

    kind: str = "rules"
    workers: int = 1
    time_limit: float = 2.0
    memory_limit_mib: int = 4096
    score: str = "threshold"
    on_failure: str = "drop"
    graders: Mapping[str, str] | None = None
    server: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _choice(self, "kind", REWARD_KINDS)
        _choice(self, "score", SCORES)
        _choice(self, "on_failure", ON_FAILURE)
        _whole(self, "workers", 1)
        _whole(self, "memory_limit_mib", 1)
        positive_number(self.time_limit, "time_limit")
        if (self.kind == "server") != (self.server is not None):
            raise ValueError("server: the reward server's address, for kind: server and only there")

    def rule_options(self) -> dict[str, Any]:
        names = ("workers", "time_limit", "memory_limit_mib", "score", "on_failure", "graders")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class WarmStartSettings:
    """The supervised warm start of the quickstart (examples/warm_start.py).

    data          JSONL of prompts with `response`
    steps         optimizer steps at most
    batch_size    samples per optimizer step, over all ranks
    lr            learning rate
    stop_reward   mean reward on `check_prompts` training prompts per domain at which a domain has learned enough; the
                  warm start ends when all have
    rehearsal     share of such a domain in the batches, the others' being 1, so that it is not forgotten
    check_every   optimizer steps between two checks
    """

    data: str
    steps: int
    batch_size: int
    lr: float
    stop_reward: float
    rehearsal: float
    check_every: int
    check_prompts: int


def algorithm_settings(cfg: DictConfig) -> AlgorithmSettings:
    """The `algorithm` section. Raises ValueError naming the field."""
    values = _plain(cfg, "algorithm")
    kl = _build(KlSettings, mapping(values.pop("kl", None) or {}, "algorithm.kl"), "algorithm.kl")
    gating = _gating(values.get("objective", "fiberpo"), values.pop("gating", None))
    return _build(AlgorithmSettings, values, "algorithm", kl=kl, gating=gating)


def _gating(objective: Any, fields: Any) -> RatioGating | None:
    """The gating map of an objective; None for fiberpo, and for a name that AlgorithmSettings refuses."""
    fields = mapping({} if fields is None else fields, "algorithm.gating")
    kind = OBJECTIVES.get(objective) if isinstance(objective, str) else None
    if kind is None:
        if fields and objective == "fiberpo":
            raise ValueError(
                f"algorithm.gating.{next(iter(fields))}: objective fiberpo is gated by the hierarchy and has no fields "
                f"here; with algorithm.objective: {', '.join(name for name in OBJECTIVES if name != 'fiberpo')}"
            )
        return None
    gating: RatioGating = _build(kind, fields, "algorithm.gating")
    return gating


def data_settings(cfg: DictConfig) -> DataSettings:
    """The `data` section. Raises ValueError naming the field."""
    return _build(DataSettings, _plain(cfg, "data"), "data")


def reward_settings(cfg: DictConfig) -> RewardSettings:
    """The `rewards` section. Raises ValueError naming the field."""
    return _build(RewardSettings, _plain(cfg, "rewards"), "rewards")


def warm_start_settings(cfg: DictConfig) -> WarmStartSettings:
    """The `warm_start` section. Raises ValueError naming the field."""
    return _build(WarmStartSettings, _plain(cfg, "warm_start"), "warm_start")


def check_precision(precision: Any) -> None:
    """ValueError unless `trainer.precision` is one that NeMo builds a policy in."""
    if isinstance(precision, bool) or precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: {precision!r} is unknown{nearest(precision, dict.fromkeys(map(str, PRECISIONS)))}"
        )


def cluster_settings(cfg: DictConfig) -> Assumptions:
    """The `cluster` section, which `fiberpo plan` reads; its defaults where there is none. Raises ValueError naming the
    field."""
    return _build(Assumptions, _plain(cfg, "cluster") if cfg.get("cluster") else {}, "cluster")


def check_resume(cfg: DictConfig) -> None:
    """The `resume` section: `allow` lists the keys that may differ when a run goes on. ValueError names the field;
    `resume.RunRecord` says which keys there are."""
    if cfg.get("resume") is None:
        return
    values = _plain(cfg, "resume")
    reject_unknown_keys(values, ("allow",), "resume")
    allow = values.get("allow")
    if not isinstance(allow, list) or not all(isinstance(key, str) and key for key in allow):
        raise ValueError(f"resume.allow: must be a list of keys, such as [hierarchy, model.optim.lr], got {allow!r}")


def _plain(cfg: DictConfig, section: str) -> dict[str, Any]:
    return mapping(OmegaConf.to_container(cfg[section], resolve=True, throw_on_missing=True), section)


def _build(kind: type, values: dict[str, Any], where: str, **extra: Any) -> Any:
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    reject_unknown_keys(values, fields, where)
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and values.get(name) is None and name not in extra:
            raise ValueError(f"{where}.{name}: is required")
    try:
        return kind(**values, **extra)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _whole(settings: Any, name: str, least: int) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: must be a whole number of at least {least}, got {value!r}")


def _choice(settings: Any, name: str, valid: tuple[str, ...]) -> None:
    value = getattr(settings, name)
    if value not in valid:
        raise ValueError(f"{name}: {value!r} is unknown{nearest(value, valid)}")
