"""The tokenizer of a model converted from or to Hugging Face: its files, and the ids of its BOS, EOS and padding tokens
in config.json and generation_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_fiberpo.conversion.tensors import SPECIAL_TOKENS
from nemo_fiberpo.conversion.weights import belongs, read_json

VOCABULARY = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
FILES = (
    *(*VOCABULARY, "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.json", "chat_template.jinja"),  # chat template
    "generation_config.json",  # which tokens end a response
)
_UNLOADABLE = (ValueError, OSError, KeyError, ImportError)


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, and only those; files outside `source` that links lead to are left out. ValueError
    for an invalid *.json."""
    for file in _matching(source, FILES):
        if file.suffix == ".json":
            read_json(file)
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)


def check(folder: Path, rows: int, model_end: Any) -> list[str]:
    """Warnings about the tokenizer in `folder`: how prompts and responses of a run will differ from transformers'.

    model_end  `eos_token_id` of config.json

    ValueError if a token's id is beyond the `rows` of the embedding. A missing or unloadable tokenizer is a warning;
    the actor checks again before training.
    """
    if not _matching(folder, VOCABULARY):
        return ["no tokenizer found; a run needs one, see model.tokenizer.type"]
    tokenizer, why = _loaded(folder)
    if tokenizer is None:
        return [f"the tokenizer cannot be loaded, its files are copied as they are: {why}"]
    number, token = max((number, token) for token, number in tokenizer.get_vocab().items())
    if number >= rows:
        raise ValueError(
            f"{folder}: the tokenizer's token {token!r} has the id {number}, but vocab_size in config.json is "
            f"{rows}: it is not this model's tokenizer"
        )
    return [*_other_ends(folder, tokenizer, model_end), *_first_token(tokenizer)]


def _other_ends(folder: Path, tokenizer: Any, model_end: Any) -> Iterator[str]:
    """Warnings if the model's responses end with other tokens than the policy's will."""
    generation = folder / "generation_config.json"
    ends = _listed(read_json(generation).get("eos_token_id") if belongs(generation) else model_end)
    end = tokenizer.eos_token_id
    if end is None:
        yield "the tokenizer has no token that ends a text, so a run would refuse it"
    elif end not in ends:
        yield (
            f"the model's responses end with {_describe(tokenizer, ends)}, those of the policy with the tokenizer's "
            f"{_describe(tokenizer, [end])}: change eos_token in tokenizer_config.json if that is not intended"
        )
    elif others := [token for token in ends if token != end]:
        yield (
            f"the model's responses also end with {_describe(tokenizer, others)}, those of the policy only with "
            f"{_describe(tokenizer, [end])}, unless model.ppo.sampling_params.end_strings has the others"
        )


def _first_token(tokenizer: Any) -> Iterator[str]:
    begins, ids = tokenizer.bos_token_id, tokenizer("a").input_ids
    if begins is not None and ids[:1] == [begins]:
        yield (
            f"the tokenizer begins every text with {_describe(tokenizer, [begins])}; prompts of a run do only if "
            "model.ppo.sampling_params.add_BOS is true"
        )


def _describe(tokenizer: Any, ids: Iterable[int]) -> str:
    return ", ".join(f"{number} ({tokenizer.convert_ids_to_tokens(number)!r})" for number in ids) or "none"


def _listed(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def folder_of(model: Mapping[str, Any], nemo: Path) -> Path | None:
    """The tokenizer of NeMo's `model` section: as named, else in the `.nemo` folder; None if it is in neither."""
    named = (model.get("tokenizer") or {}).get("type")
    folders = [*([Path(named)] if named else []), nemo / "tokenizer"]
    return next((folder for folder in folders if _matching(folder, FILES)), None)


def complete(folder: Path, model: Mapping[str, Any], tokenizer: Path | None) -> list[str]:
    """Add the tokenizer's files and token ids to the Hugging Face model in `folder`. Returns warnings.

    Ids are those of the imported model, else the tokenizer's, else null: without any, transformers would use the
    family's defaults, which are other models' tokens.
    """
    if tokenizer is not None:
        copy_files(tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    own, warnings = _ids(folder) if _matching(folder, VOCABULARY) else ({}, [_no_tokenizer(model)])
    if not own and model.get("huggingface_tokens") is None:
        own = dict.fromkeys(SPECIAL_TOKENS)
        warnings.append(
            "bos_token_id, eos_token_id and pad_token_id are null in config.json: write the tokenizer's there"
        )
    config = own | config
    _write(folder / "config.json", config)
    generation = folder / "generation_config.json"
    if not generation.exists():
        ids = {name: config[name] for name in SPECIAL_TOKENS if name in config}
        _write(generation, {"_from_model_config": True} | ids)
    ends, end = json.loads(generation.read_text()).get("eos_token_id"), own.get("eos_token_id")
    if end is not None and end not in _listed(ends):
        warnings.append(
            f"eos_token_id in generation_config.json is {ends}, but responses of the policy end with the tokenizer's "
            f"{end}: add it there"
        )
    return warnings


def _matching(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names if belongs(folder / name)]


def _loaded(folder: Path) -> tuple[Any, str]:
    """The tokenizer, or None and why it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), ""
    except _UNLOADABLE as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def _ids(folder: Path) -> tuple[dict[str, int | None], list[str]]:
    tokenizer, why = _loaded(folder)
    if tokenizer is None:
        return {}, [f"the tokenizer cannot be loaded, its files are copied as they are: {why}"]
    return {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}, []


def _no_tokenizer(model: Mapping[str, Any]) -> str:
    given = {name: value for name, value in (model.get("tokenizer") or {}).items() if value}
    return f"no tokenizer: model.tokenizer = {given} is not a local folder of a Hugging Face tokenizer; add its files"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
