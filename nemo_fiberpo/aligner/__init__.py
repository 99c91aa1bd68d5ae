"""FiberPO in NeMo-Aligner.

The rooms, lowest first: `lifecycle`, `config`, `data`, `generation`, `rewards`, `rollout`, `checkpoint`. `actor` and
`trainer` use them, and `run` builds a run from a config.
"""
