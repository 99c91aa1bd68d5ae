"""Diagnostics of a policy's drift beyond the report of a training step."""
