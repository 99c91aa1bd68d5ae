"""Checkpoints with manifests, the record of a run, and which checkpoint a run resumes from."""
