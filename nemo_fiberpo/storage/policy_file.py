"""A `.nemo` file or folder, checked before anything of it is loaded: whole by its manifest, only plain files within
bounds, and a configuration that runs no code.

Its configuration is untrusted. NeMo imports what `target` and `_target_` name, transformers runs the code of a trusted
tokenizer, and some kinds of tokenizer unpickle their vocabulary; none of that is read from here.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_fiberpo.storage import manifest, reading
from nemo_fiberpo.storage.manifest import Manifest

CONFIG, WEIGHTS = "model_config.yaml", "model_weights"
TOKENIZERS = ("huggingface", "sentencepiece", "megatron", "tiktoken", "byte-level")
_OWN = ("target", "nemo_version", "optim")  # written by NeMo, unused here
_NAMES_CODE = ("_target_", "target", "cls")
_RESOLVER = re.compile(r"\$\{[^}]*:")
_LARGEST_CONFIG = 2**20
_EXPANSION = 16  # largest ratio of content to archive size; weights hardly compress


def check(policy: Path, verify: Callable[[Path, Manifest], list[str]] = manifest.problems) -> str:
    """Check a policy; returns a line that tells whether it was verified against a manifest.

    ValueError naming the file if it does not match its manifest, is not a plain file, has pickled weights of an older
    NeMo or is a checkpoint of NeMo 2, and as `read_config`. OSError if a file cannot be read.
    """
    said = _verified(policy, verify)
    names = _names(policy)
    for name in names:
        if name.suffix == ".ckpt":
            raise ValueError(
                f"{policy}: {name} is a pickle of weights, which is not loaded; save the policy as a distributed "
                f"checkpoint ({WEIGHTS}/), as NeMo does from 2.0 on"
            )
        if name.parts[0] == "context":
            raise ValueError(
                f"{policy}: is a checkpoint of NeMo 2, whose {name} names functions to call; export it to Hugging Face "
                "with NeMo and use `fiberpo import-hf`"
            )
    read_config(policy)
    return said


def seal_of(policy: Path) -> Path:
    """Path of a policy's manifest: in the folder, or beside the file."""
    return policy / manifest.NAME if policy.is_dir() else policy.with_name(policy.name + "." + manifest.NAME)


def _verified(policy: Path, verify: Callable[[Path, Manifest], list[str]]) -> str:
    seal = seal_of(policy)
    try:
        found = manifest.read_file(seal)
    except ValueError as error:
        raise _damaged(policy, str(error), seal) from error
    if found is None:
        return f"policy {policy}: unverified, there is no {seal.name}"
    if policy.is_dir():
        root, added = policy, sorted(set(manifest.files_of(policy)) - set(found.files))
    else:
        root, added = policy.parent, [policy.name] if len(found.files) != 1 else []
        # A single file may have been renamed.
        found = Manifest(dict(zip([policy.name], found.files.values(), strict=False)), found.state)
    if added:
        raise _damaged(policy, f"{added[0]} is not in the manifest", seal)
    if wrong := verify(root, found):
        raise _damaged(policy, "; ".join(wrong), seal)
    return f"policy {policy}: whole by its manifest"


def _damaged(policy: Path, what: str, seal: Path) -> ValueError:
    return ValueError(
        f"{policy}: damaged: {what}. Restore an intact copy; or remove {seal}, if it was changed on purpose"
    )


def _names(policy: Path) -> list[PurePosixPath]:
    if policy.is_dir():
        return [PurePosixPath(name) for name in manifest.files_of(policy)]
    with open_archive(policy) as archive:
        return [name for _, name in members(archive, policy) if name.parts]


@contextlib.contextmanager
def open_archive(policy: Path) -> Iterator[tarfile.TarFile]:
    """The archive; ValueError if it is not one."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(reading.open_regular(policy))
            archive = stack.enter_context(tarfile.open(fileobj=file))
        except (OSError, tarfile.TarError, EOFError) as error:
            raise ValueError(f"{policy}: is no .nemo file or folder: {error}") from error
        yield archive


def members(archive: tarfile.TarFile, policy: Path) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath]]:
    """The files and folders of an archive and their names in it. ValueError for anything else, for a name that leads
    out of it or is duplicate, and if they are far larger than the archive."""
    most = _EXPANSION * policy.stat().st_size
    seen: set[PurePosixPath] = set()
    try:
        for member in archive:
            name = PurePosixPath(member.name)
            plain = (member.isfile() and not member.issparse()) or member.isdir()
            if not plain or name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{policy}: {member.name!r} is no plain file inside the archive")
            if name in seen:
                raise ValueError(f"{policy}: {member.name!r} is twice in the archive")
            seen.add(name)
            most -= member.size
            if most < 0:
                raise ValueError(f"{policy}: holds more than {_EXPANSION} times its own size, at {member.name!r}")
            yield member, name
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{policy}: is cut short or damaged: {error}") from error


def read_config(policy: Path) -> DictConfig:
    """The `model` section of a policy, without the run's part: the class, NeMo's version and the optimizer.

    ValueError naming the file and the key if it names code to run, trusts a tokenizer's code, has a kind of tokenizer
    not in TOKENIZERS, calls a resolver, has aliases (which can grow without bound), or is not a mapping.
    """
    where, text = f"{policy}/{CONFIG}", _text(policy)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError(f"{where}: has YAML aliases; write out their values")
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{where}: cannot be read: {str(error) or type(error).__name__}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{where}: must be a mapping")
    plain: Any = OmegaConf.to_container(config, resolve=False)
    for name in ("target", "nemo_version"):
        if isinstance(plain.get(name), str):
            del plain[name]
    _refuse_code(plain, where, "")
    library = (plain.get("tokenizer") or {}).get("library")
    if library is not None and library not in TOKENIZERS:
        raise ValueError(f"{where}: tokenizer.library: {library!r} is not one of {', '.join(TOKENIZERS)}")
    return OmegaConf.create({name: value for name, value in plain.items() if name not in _OWN})


def _text(policy: Path) -> str:
    if policy.is_dir():
        try:
            with reading.open_listed(policy / CONFIG) as file:
                raw = file.read(_LARGEST_CONFIG + 1)
        except OSError as error:
            raise ValueError(f"{policy / CONFIG}: {error.strerror}") from error
    else:
        with open_archive(policy) as archive:
            inside = (member for member, name in members(archive, policy) if name == PurePosixPath(CONFIG))
            member = next(inside, None)
            content = archive.extractfile(member) if member is not None else None
            if content is None:
                raise ValueError(f"{policy}: holds no {CONFIG}")
            raw = content.read(_LARGEST_CONFIG + 1)
    if len(raw) > _LARGEST_CONFIG:
        raise ValueError(f"{policy}/{CONFIG}: has more than {_LARGEST_CONFIG} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{policy}/{CONFIG}: is no text: {error}") from error


def _refuse_code(value: Any, where: str, key: str) -> None:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            inner = f"{key}.{name}" if key else str(name)
            if name in _NAMES_CODE:
                raise ValueError(f"{where}: {inner}: {entry!r} names code to run; a policy's configuration must not")
            if name == "trust_remote_code" and entry not in (False, None):
                raise ValueError(f"{where}: {inner}: {entry!r}; the code of a tokenizer is not run, set it to false")
            _refuse_code(entry, where, inner)
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            _refuse_code(entry, where, f"{key}[{number}]")
    elif isinstance(value, str) and _RESOLVER.search(value):
        raise ValueError(f"{where}: {key}: {value!r} calls a resolver; write its value there")
