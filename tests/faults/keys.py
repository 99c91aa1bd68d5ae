"""Which keys of NeMo's sections a run reads: recorded in two-step runs of the quickstart, and what CPU runs cannot show
from the signatures and sources that read the rest. Writes nemo_fiberpo/nemo_config/keys.json.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_fiberpo.nemo_config import keys as nemo_keys
from tests.support.launching import DENSE, ROOT, WARM_START, arguments, environment

RECORDED = [
    *("algorithm.rl_steps=2", "algorithm.save_interval=1", "algorithm.kl.coefficient=0.01"),
    *("algorithm.val_check_interval=0", *WARM_START),
]
# Modules that read the model's config by `cfg.get("key")` or `cfg.key`, some of it only on GPUs.
_SOURCES = (
    *("nemo.collections.nlp.models.language_modeling.megatron_gpt_model", "nemo.core.classes.modelPT"),
    *("nemo.collections.nlp.models.language_modeling.megatron_base_model", "nemo.collections.nlp.models.nlp_model"),
    *("nemo.collections.nlp.parts.megatron_trainer_builder", "nemo.utils.callbacks.dist_ckpt_io"),
    *("nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor", "nemo_aligner.utils.train_utils"),
)
_KINDS = {"bool": "bool", "int": "number", "float": "number", "str": "text", "ListConfig": "list", "list": "list"}
_OF_SHAPES = ("DictConfig", "dict")


def kind_of(types: Iterable[str]) -> str:
    """One kind for all values that were seen."""
    kinds = {"mapping" if name in _OF_SHAPES else _KINDS.get(name, "any") for name in types if name != "NoneType"}
    return kinds.pop() if len(kinds) == 1 else "any"


def recorded(recording: dict[str, dict[str, list[str]]]) -> Iterator[tuple[str, str]]:
    for key, types in recording.items():
        of = key.partition(".")[0]
        # hydra-style instantiation and `in` ask every section for these
        if of in ("model", "trainer", "exp_manager") and key.rpartition(".")[2] not in ("cls", "params", "target", "*"):
            kinds = [name for name, how in types.items() if how != ["__contains__"]]
            yield key, kind_of(kinds or ["NoneType"])


def annotated(of: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Of a dataclass: its fields, by their annotation and default."""
    for field in dataclasses.fields(of):
        name = getattr(field.type, "__name__", str(field.type))
        yield f"{prefix}.{field.name}", _KINDS.get(name, "any")


def in_sources() -> Iterator[tuple[str, str]]:
    for name in _SOURCES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text()
        for key in re.findall(r"\bcfg(?:\.model)?\.get\(\s*['\"](\w+)|\bself\.cfg\.(?!get\b|pop\b)(\w+)", text):
            yield f"model.{key[0] or key[1]}", "any"


def signatures() -> Iterator[tuple[str, str]]:
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from nemo.core.config import schedulers
    from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig

    yield from annotated(MLATransformerConfig, "model")
    yield from annotated(ExpManagerConfig, "exp_manager")
    yield from annotated(CallbackParams, "exp_manager.checkpoint_callback_params")
    for name, params in vars(schedulers).items():
        if name.endswith("Params"):
            yield from annotated(params, "model.optim.sched")


def merged(recordings: Iterable[dict[str, Any]]) -> dict[str, str]:
    out: dict[str, str] = dict((*signatures(), *in_sources()))
    for recording in recordings:
        for key, kind in recorded(recording):
            out[key] = kind if out.get(key, "any") == "any" or kind == "any" else out[key]
    out |= nemo_keys.BY_HAND
    return {key: out[key] for key in sorted(out)}


def record(folder: Path) -> list[dict[str, Any]]:
    """The recordings of a mixture of experts and of a dense policy."""
    found = []
    for name, model in (("experts", []), ("dense", DENSE)):
        run_dir, out = folder / name, folder / f"{name}.json"
        given = arguments(run_dir, *RECORDED, *model)
        subprocess.run([sys.executable, str(ROOT / "examples/warm_start.py"), *given], env=environment(), check=True)
        script = [sys.executable, "-m", "tests.faults.recording", str(out), str(ROOT / "examples/train_gpt_fiberpo.py")]
        subprocess.run([*script, *given], env=environment(), check=True, cwd=ROOT)
        found.append(json.loads(out.read_text()))
    return found


def write(folder: Path) -> None:
    read = merged(record(folder))
    nemo_keys.FILE.write_text(json.dumps(read, indent=1) + "\n")
    print(f"{nemo_keys.FILE}: {len(read)} keys")
