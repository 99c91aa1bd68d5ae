"""Labels of tokens that come from a rollout: the partition of experts, the prefix, the place within the response."""
