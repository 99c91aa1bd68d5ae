"""Grading of answers in processes that can be killed: the graders that ship, the pool, and what confines an answer.

`pool.GraderPool` is what the trainer uses. Grading processes import the other files by themselves, without torch.
"""
