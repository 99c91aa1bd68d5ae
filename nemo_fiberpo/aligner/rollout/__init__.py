"""Turns samples into the minibatches of the optimizer steps: advantages, labels of the strata, rows."""
