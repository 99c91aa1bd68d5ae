"""The `rewards` section of a run's config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_fiberpo.fields import Settings, setting
from nemo_fiberpo.graders.builtin import UNSAFE_TASKS
from nemo_fiberpo.values import nearest


@dataclass(frozen=True)
class RewardSettings(Settings):
    """How responses are scored: by graders in separate processes, or by a reward-model server."""

    kind: str = setting("rules", choices=("rules", "server"))
    """`rules`: the grader that each line of the data names, see docs/graders.md. `server`: NeMo-Aligner's reward-model
    server; leave every key but `server` at its default then."""

    workers: int = setting(1, at_least=1, may_change=True)
    """Grading processes per rank that grades."""

    time_limit: float = setting(2.0, above=0)
    """Wall-clock seconds for one response. A grader that needs longer is killed."""

    memory_limit_mib: int = setting(4096, at_least=1, may_change=True)
    """Address space of a grading process, and the size of any file that it writes, in MiB."""

    score: str = setting("threshold", choices=("threshold", "raw"))
    """`threshold`: the reward is 1 for a score of at least 1, else 0. `raw`: the reward is the score."""

    on_failure: str = setting("drop", choices=("drop", "zero", "error"))
    """What happens to a response whose grader crashed or ran out of time. `drop`: it is left out of the loss and of
    baselines. `zero`: its reward is 0. `error`: the run ends."""

    max_failed: float = setting(0.5, at_least=0, at_most=1, may_change=True)
    """Share of the responses of a rollout or an evaluation that may fail to be graded; above it the run ends."""

    unsafe_tasks: Sequence[str] | None = setting(None, form="list of tasks, such as [countdown]")
    """Tasks of reasoning-gym that may evaluate responses as Python, see docs/graders.md. Others that do are refused."""

    graders: Mapping[str, str] | None = setting(None, form="{name: package.module:function}")
    """Custom graders, by the name that `grader` has in the data."""

    server: Mapping[str, Any] | None = setting(None, form="mapping", may_change=True)
    """Configuration of NeMo-Aligner's client of the reward-model server. Required for `kind: server`, only there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.unsafe_tasks or ():
            if task not in UNSAFE_TASKS:
                raise ValueError(f"unsafe_tasks: {task!r} is unknown{nearest(task, UNSAFE_TASKS)}")
        object.__setattr__(self, "unsafe_tasks", sorted(set(self.unsafe_tasks or ())))
        for name, target in (self.graders or {}).items():
            if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)*:\w+", target):
                raise ValueError(
                    f"graders.{name}: must be package.module:function, got {target!r}; the module may be beside the "
                    "run config"
                )
        if (self.kind == "server") != (self.server is not None):
            raise ValueError("server: the reward server's address, required for kind: server, and only there")
        for entry in dataclasses.fields(self) if self.kind == "server" else ():
            given = getattr(self, entry.name)
            if entry.name not in ("kind", "graders", "server") and given not in (entry.default, []):
                raise ValueError(f"{entry.name}: {given!r} applies only to kind: rules; leave it at {entry.default!r}")

    def rule_options(self) -> dict[str, Any]:
        """The keys that `kind: rules` reads."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.name not in ("kind", "server")]
        return {name: getattr(self, name) for name in names}
