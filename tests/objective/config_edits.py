"""Examples of a hierarchy in YAML, by name and as lists, and what they are with one entry changed."""

from __future__ import annotations

import copy
import re
from typing import Any

from omegaconf import OmegaConf

YAML = """
token_clip: 0.04
strata:
  domain: {budget: {pos: 0.02, neg: 0.015}, budgets: {code: {pos: 0.03, neg: 0.02}}}
  prompt_group: {budget: {pos: 0.04, neg: 0.03}, slope: {cap: 32}, enabled: false}
  trajectory: {budget: {pos: 0.12, neg: 0.05}, slope: 32, min_tokens: 8}
"""
LISTED = """
token_clip: 0.04
strata:
  - {name: domain, budget: {pos: 0.02, neg: 0.015}, budgets: {code: {pos: 0.03, neg: 0.02}}}
  - {name: prompt_group, budget: {pos: 0.04, neg: 0.03}, slope: {cap: 32}, enabled: false}
  - {name: trajectory, budget: {pos: 0.12, neg: 0.05}, slope: 32, min_tokens: 8}
"""
BRANCHED = """
token_clip: 0.04
strata:
  domain: {budget: {pos: 0.02, neg: 0.015}}
  task: {budget: {pos: 0.03, neg: 0.02}, only: {domain: [code, math]}}
  task_language: {join: [task, language], budget: {pos: 0.03, neg: 0.02}, only: {domain: [code]}}
  trajectory: {budget: {pos: 0.12, neg: 0.05}}
branches:
  modality: {beside: domain, budget: {pos: 0.02, neg: 0.01}, budgets: {image: {pos: 0.03, neg: 0.02}}}
  expert: {budget: {pos: 0.02, neg: 0.01}, slope: {cap: 8}, enabled: false}
sweeps: 3
"""
BRANCHED_LISTED = """
token_clip: 0.04
strata:
  - {name: domain, budget: {pos: 0.02, neg: 0.015}}
  - {name: task, budget: {pos: 0.03, neg: 0.02}, only: {domain: [code, math]}}
  - {name: task_language, join: [task, language], budget: {pos: 0.03, neg: 0.02}, only: {domain: [code]}}
  - {name: trajectory, budget: {pos: 0.12, neg: 0.05}}
branches:
  - {name: modality, beside: domain, budget: {pos: 0.02, neg: 0.01}, budgets: {image: {pos: 0.03, neg: 0.02}}}
  - {name: expert, budget: {pos: 0.02, neg: 0.01}, slope: {cap: 8}, enabled: false}
sweeps: 3
"""


def edited(path: str, value: Any, text: str) -> dict[str, Any]:
    """The example with one entry set; `...` removes it. A number is the place of a stratum, in either form."""
    config: Any = copy.deepcopy(OmegaConf.to_container(OmegaConf.create(text)))
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = at(node, part)
    last = int(last) if isinstance(node, list) else key_of(node, last)
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return config


def key_of(node: dict[str, Any], part: str) -> str:
    return list(node)[int(part)] if part.isdigit() else part


def at(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, list) else node[key_of(node, part)]


def by_name(message: str, text: str) -> str:
    """The pattern of a message for the mapping in `text`, from that for the list."""
    config: Any = OmegaConf.to_container(OmegaConf.create(text))

    def path(match: re.Match[str]) -> str:
        return rf"{match[1]}\.{list(config[match[1]])[int(match[2])]}"

    return re.sub(r"(strata|branches)\\\[(\d)\\\]", path, message)
