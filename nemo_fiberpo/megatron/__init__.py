"""The Megatron-core seam: process groups, vocab-parallel log-probs, the exact step, Megatron on CPU.

Works with megatron-core 0.11, 0.16 and 0.19; what differs is found by looking, never by comparing versions.
Importing this package imports neither megatron nor torch.distributed's backends.
"""
