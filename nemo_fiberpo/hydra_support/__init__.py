"""How Hydra composes a run's config, for the scripts and for `fiberpo`."""
