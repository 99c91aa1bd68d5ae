"""Rewards of responses, from rules graded here or from a reward-model server, in the shape that PPOTrainer expects."""
