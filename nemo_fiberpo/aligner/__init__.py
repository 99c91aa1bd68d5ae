"""FiberPO in NeMo-Aligner: the actor, the trainer, and the rooms that they stand on.

Lowest first: `lifecycle`, `config`, `data`, `generation`, `rewards`, `rollout`, `checkpoint`; `actor` and `trainer` use
them all, and `launch` builds a run from a config.
"""
