"""Prompts from JSONL files. What leaves: a `PromptDataset` of tokenized prompts with their domains and graders'
records."""
