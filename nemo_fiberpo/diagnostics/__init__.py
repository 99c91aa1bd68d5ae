"""Diagnostics of a policy beyond the report of a training step: divergence, regimes of the gates, entropy."""
