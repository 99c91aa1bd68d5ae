"""Generation with NeMo's native loop on layouts that it does not support: context and expert parallel."""
