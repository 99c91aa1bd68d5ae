"""The tokenizer that goes with a model on its way from and to Hugging Face: its files, and the tokens that begin, end
and fill a text, by their ids in config.json and generation_config.json."""

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
    *("chat_template.json", "chat_template.jinja"),  # how a conversation is written
    "generation_config.json",  # which tokens end a response
)
_UNLOADABLE = (ValueError, OSError, KeyError, ImportError)


def copy_files(source: Path, target: Path) -> None:
    """What belongs to a tokenizer, and nothing else that lies beside it, such as the weights of another model, or that
    a link out of the folder leads to. ValueError for a *.json that is none."""
    for file in _matching(source, FILES):
        if file.suffix == ".json":
            read_json(file)
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)


def check(folder: Path, rows: int, model_end: Any) -> list[str]:
    """What a user has to know about the tokenizer in `folder` before training: how prompts and responses differ from
    what transformers makes of the model.

    model_end  `eos_token_id` of config.json

    ValueError where it has a token that the `rows` of the model's embedding do not reach. A folder without one, or with
    one that cannot be loaded here, is said; the actor looks again before training.
    """
    if not _matching(folder, VOCABULARY):
        return ["no tokenizer there; a run needs one: model.tokenizer.type"]
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
    """Where the model's responses end at other tokens than the policy's will."""
    generation = folder / "generation_config.json"
    ends = _listed(read_json(generation).get("eos_token_id") if belongs(generation) else model_end)
    end = tokenizer.eos_token_id
    if end is None:
        yield "the tokenizer has no token that ends a text, so a run would refuse it"
    elif end not in ends:
        yield (
            f"the model's responses end with {_words(tokenizer, ends)}, those of the policy with the tokenizer's "
            f"{_words(tokenizer, [end])}: take another eos_token in tokenizer_config.json if that is not meant"
        )
    elif others := [token for token in ends if token != end]:
        yield (
            f"the model's responses also end with {_words(tokenizer, others)}, those of the policy with "
            f"{_words(tokenizer, [end])} alone, unless model.ppo.sampling_params.end_strings has the others"
        )


def _first_token(tokenizer: Any) -> Iterator[str]:
    begins, ids = tokenizer.bos_token_id, tokenizer("a").input_ids
    if begins is not None and ids[:1] == [begins]:
        yield (
            f"the tokenizer begins every text with {_words(tokenizer, [begins])}; prompts of a run begin with it where "
            "model.ppo.sampling_params.add_BOS is true"
        )


def _words(tokenizer: Any, ids: Iterable[int]) -> str:
    return ", ".join(f"{number} ({tokenizer.convert_ids_to_tokens(number)!r})" for number in ids) or "none"


def _listed(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


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
    if end is not None and end not in _listed(ends):
        said.append(
            f"eos_token_id in generation_config.json is {ends}, but responses of the policy end with the tokenizer's "
            f"{end}: add it there"
        )
    return said


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
    return (
        f"no tokenizer: model.tokenizer = {given} is no folder of a Hugging Face tokenizer that is here; add its files"
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
