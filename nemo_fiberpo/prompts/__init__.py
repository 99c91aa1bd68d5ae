"""Prompts in JSONL files, read and checked; nothing here needs torch."""
