"""Labels of tokens that a rollout determines: by expert partition, prefix, position, or segment of the response."""
