"""The sections of a run's config as checked dataclasses."""
