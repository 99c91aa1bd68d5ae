"""Rewards of responses, from graders or from a reward-model server, in the form that PPOTrainer expects."""
