"""What a run will need, computed before it is launched: ranks and groups, memory, cells, bytes of our collectives.

Pure arithmetic on a run's configuration. It needs neither GPUs nor Megatron nor NeMo; `fiberpo plan` (`cli/`)
composes the configuration and prints the result.
"""
