"""The sections of a run's config as checked dataclasses. What leaves: settings objects, or a ValueError that names the
field."""
