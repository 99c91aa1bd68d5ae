"""Tokenized prompts with their domains and graders' records."""
