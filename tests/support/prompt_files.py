"""Files of prompts, as `load_prompts` reads them."""

from __future__ import annotations

import json
from pathlib import Path


def line(prompt: str | None = "2+5=", domain: str | None = "math", **changes) -> dict:
    """A good record; a change to None takes the field away."""
    record = {"prompt": prompt, "domain": domain, "grader": "math_verify", "answer": "7"} | changes
    return {name: value for name, value in record.items() if value is not None}


def write_lines(folder: Path, *lines: dict | str, name: str = "prompts.jsonl") -> Path:
    """A file with a record or a text a line."""
    path = folder / name
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path
