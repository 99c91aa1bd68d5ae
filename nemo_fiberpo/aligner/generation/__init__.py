"""Responses from the policy by NeMo's native loop, on layouts that it does not know: context and expert parallel."""
