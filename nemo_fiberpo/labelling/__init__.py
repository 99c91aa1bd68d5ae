"""Labels of tokens that a rollout determines: expert partition, prefix, position or segment within the response."""
