"""Checkpoints that count only when whole, the record of a run, and which checkpoint a run resumes from."""
