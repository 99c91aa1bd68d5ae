"""Attacks on what a run reads: `python -m tests.faults payloads | damage | fuzz`. docs/faults.md has their figures."""
