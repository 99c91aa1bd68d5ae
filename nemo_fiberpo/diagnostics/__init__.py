"""What a batch tells of a policy's drift, beyond what a training step reports."""
