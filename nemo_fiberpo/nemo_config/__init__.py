"""NeMo's sections of a run's config: which keys are read, and what they mean."""
