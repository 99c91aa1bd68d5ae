"""The tokenizer that goes with a model on its way from and to Hugging Face: its files, and the tokens that begin, end
and fill a text, by their ids in config.json and generation_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_fiberpo.aligner.huggingface import SPECIAL_TOKENS

VOCABULARY = ("tokenizer*", "vocab.*", "*.tiktoken")
FILES = (
    *(*VOCABULARY, "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template*", "generation_config.json"),  # how a conversation is written, and which tokens end a response
)
_UNLOADABLE = (ValueError, OSError, KeyError, ImportError)


def copy_files(source: Path, target: Path) -> None:
    """What belongs to a tokenizer, and nothing else that lies beside it, such as the weights of another model."""
    for file in _matching(source, FILES):
        target.mkdir(exist_ok=True)
        shutil.copy(file, target)


def check_rows(folder: Path, rows: int) -> None:
    """ValueError where the tokenizer in `folder` has a token that the `rows` of the model's embedding do not reach. A
    folder without one, or with one that cannot be loaded here, says nothing; the actor looks again before training."""
    from transformers import AutoTokenizer

    if not _matching(folder, VOCABULARY):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _UNLOADABLE:
        return
    highest = max((number, token) for token, number in tokenizer.get_vocab().items())
    if highest[0] >= rows:
        raise ValueError(
            f"{folder}: the tokenizer's token {highest[1]!r} has the id {highest[0]}, but vocab_size in config.json is "
            f"{rows}: it is not this model's tokenizer"
        )


def folder_of(model: Mapping[str, Any], nemo: Path) -> Path | None:
    """The tokenizer of NeMo's `model` section: where it is named, else in the `.nemo` folder; None if it is in
    neither."""
    named = (model.get("tokenizer") or {}).get("type")
    folders = [*([Path(named)] if named else []), nemo / "tokenizer"]
    return next((folder for folder in folders if _matching(folder, FILES)), None)


def complete(folder: Path, model: Mapping[str, Any], tokenizer: Path | None) -> list[str]:
    """Put the tokenizer's files and the ids of its tokens into the Hugging Face model in `folder`.

    Ids are those of the model that was imported, else the tokenizer's, else null: the defaults of the family, which
    transformers takes where nothing stands, are other models' tokens. Returns what the user has to know about them.
    """
    if tokenizer is not None:
        copy_files(tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    own, said = _ids(folder) if _matching(folder, VOCABULARY) else ({}, [_no_tokenizer(model)])
    if not own and model.get("huggingface_tokens") is None:
        own = dict.fromkeys(SPECIAL_TOKENS)
        said.append("bos_token_id, eos_token_id and pad_token_id are null in config.json: write the tokenizer's there")
    config = own | config
    _write(folder / "config.json", config)
    generation = folder / "generation_config.json"
    if not generation.exists():
        ids = {name: config[name] for name in SPECIAL_TOKENS if name in config}
        _write(generation, {"_from_model_config": True} | ids)
    ends, end = json.loads(generation.read_text()).get("eos_token_id"), own.get("eos_token_id")
    if end is not None and end not in (ends if isinstance(ends, list) else [ends]):
        said.append(
            f"eos_token_id in generation_config.json is {ends}, but responses of the policy end with the tokenizer's "
            f"{end}: add it there"
        )
    return said


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]


def _ids(folder: Path) -> tuple[dict[str, int | None], list[str]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _UNLOADABLE as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return {}, [f"the tokenizer cannot be loaded, its files are copied as they are: {line}"]
    return {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}, []


def _no_tokenizer(model: Mapping[str, Any]) -> str:
    given = {name: value for name, value in (model.get("tokenizer") or {}).items() if value}
    return (
        f"no tokenizer: model.tokenizer = {given} is no folder of a Hugging Face tokenizer that is here; add its files"
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
