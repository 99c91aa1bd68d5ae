"""Files that would run code when they are loaded. Each would leave a file behind: none does, and each is refused.

Every way in that a checkpoint, a policy, a Hugging Face model or a file of data has: pickles at each place where
Megatron or NeMo unpickle, configurations inside archives, tokenizers with code, entries that a task evaluates. Before,
each pickle and each place is tried without the restriction: there the file must appear.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import OmegaConf

from nemo_fiberpo import load_hierarchy
from nemo_fiberpo.aligner.checkpoint.candidates import choose
from nemo_fiberpo.conversion import files
from nemo_fiberpo.graders import builtin, checks
from nemo_fiberpo.prompts.records import load_prompts
from nemo_fiberpo.storage import pickles, policy_file
from nemo_fiberpo.storage.manifest import Manifest
from tests.faults.calls import calls
from tests.faults.outcome import Outcomes, TooLong, within
from tests.faults.readers import PICKLES
from tests.storage.test_policy_file import CONFIG, packed, write
from tests.support.hf_models import make

SECONDS = 60.0

RUN = "os.system"
CONFIGS: dict[str, Any] = {
    **{
        f"{where}{key}": OmegaConf.to_container(OmegaConf.from_dotlist([f"{where}{key}={RUN}"]))
        for where in ("", "optim.", "optim.sched.", "tokenizer.", "data.", "ppo.", "a.b.c.")
        for key in ("_target_", "cls")
    },
    "optim.target": {"optim": {"target": RUN}},
    "list": {"params": [{"x": {"_target_": RUN}}]},
    "target as a mapping": {"target": {"_target_": RUN}},
    "trust_remote_code": {"tokenizer": {"trust_remote_code": True}},
    "trust_remote_code as a text": {"tokenizer": {"trust_remote_code": "yes"}},
    "tabular": {"tokenizer": {"library": "tabular", "vocab_file": "v.pkl"}},
    "library by its path": {"tokenizer": {"library": "../x"}},
    "resolver": {"num_layers": "${oc.env:HOME}"},
    "decode": {"num_layers": "${oc.decode:'1'}"},
    "eval": {"num_layers": "${eval:'1'}"},
}
YAML = {
    "object/apply": "a: !!python/object/apply:os.system ['touch {flag}']\n",
    "object/new": "a: !!python/object/new:os.system ['touch {flag}']\n",
    "name": "a: !!python/name:os.system\n",
    "module": "a: !!python/module:os\n",
    "object": "a: !!python/object:subprocess.Popen {{args: [touch, {flag}]}}\n",
    "path": "a: !!python/object/apply:subprocess.check_output [[touch, {flag}]]\n",
    "tuple": "a: !!python/tuple [!!python/object/apply:os.mknod [{flag}]]\n",
    "alias": "a: &a [x]\nb: *a\n",
}
MODEL_FILES: dict[str, tuple[str, str]] = {
    "config.json: auto_map": ("config.json", '{"auto_map": {"AutoConfig": "own--code.Config"}}'),
    "config.json: custom_pipelines": ("config.json", '{"custom_pipelines": {"x": {"impl": "code.X"}}}'),
    "tokenizer_config.json: auto_map": ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["code.T", null]}}'),
    "tokenizer_config.json: class": ("tokenizer_config.json", '{"tokenizer_class": "code.T"}'),
    "generation_config.json": ("generation_config.json", '{"auto_map": {"x": "code.X"}, "eos_token_id": 7}'),
}
DATA = {
    "number_sorting": {"answer": "__import__('os').system('touch {flag}')", "metadata": {"direction": "ascending"}},
    "bitwise_arithmetic": {"answer": "1", "metadata": {"problem": "__import__('os').system('touch {flag}')"}},
}


def payloads(folder: Path, most: int | None = None) -> Outcomes:
    """All of them, or `most` pickles for each place; a fault is a file that was made, or a payload that was taken."""
    out, flag = Outcomes(), folder / "flag"
    pickles.lift()
    controls(out, folder, flag)
    pickles.restrict()
    for site, read in PICKLES.items():
        for name, found in calls(flag, most).items():
            tried(out, site, name, flag, read, fresh(folder / "pickles"), found)
    for kind, text in policies(flag):
        for form in ("folder", "file"):
            policy = write(fresh(folder / "policy.nemo"), text)
            policy = policy if form == "folder" else packed(policy)
            tried(out, f"restore_from_path, {form}", kind, flag, policy_file.check, policy)
    weights(out, folder, flag)
    hugging_face(out, folder, flag, most)
    data(out, folder, flag)
    return out


def made(flag: Path) -> bool:
    """Whether a payload made its file, which is removed."""
    there = list(flag.parent.glob(flag.name + "*"))  # some functions add a suffix
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return bool(there)


def controls(out: Outcomes, folder: Path, flag: Path) -> None:
    """Without the restriction every payload runs, and so does one at every place; else their refusal would say
    nothing."""
    for name, found in calls(flag).items():
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(found))
        if not made(flag):
            out.add("control", "did not run", name)
    for site, read in PICKLES.items():
        with contextlib.suppress(BaseException), mock.patch.object(pickles, "restrict"):
            read(fresh(folder / "pickles"), calls(flag)["os.mkdir"])
        if not made(flag):
            out.add("control", "did not run", site)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def tried(
    out: Outcomes, site: str, name: str, flag: Path, load: Callable[..., Any], *given: Any, harmless: bool = False
) -> None:
    """`harmless`: what is loaded may be taken as data, as long as nothing of it runs."""
    became, fault = "loaded as data" if harmless else "taken", "" if harmless else "it was taken"
    try:
        with within(SECONDS):
            load(*given)
    except TooLong:
        became, fault = "hung", "it hung"
    except BaseException as error:  # torch's CheckpointException is no Exception
        became, fault = "refused", "" if str(error) else "without a message"
    if made(flag):
        became, fault = "ran", "it ran"
    out.add(site, became, fault and f"{name}: {fault}")


def policies(flag: Path) -> Iterator[tuple[str, Any]]:
    """Configurations in a policy."""
    for kind, change in CONFIGS.items():
        yield (
            kind,
            OmegaConf.to_container(OmegaConf.merge(CONFIG, change)) if "target as" not in kind else CONFIG | change,
        )
    for kind, text in YAML.items():
        yield kind, text.format(flag=flag)


def weights(out: Outcomes, folder: Path, flag: Path) -> None:
    """Weights of older formats, beside whole ones too, and archives whose members lead elsewhere."""
    for name in ("model_weights.ckpt", "mp_rank_00/model_weights.ckpt", "context/io.json", "x.ckpt"):
        policy = write(fresh(folder / "policy.nemo"))
        (policy / name).parent.mkdir(exist_ok=True)
        (policy / name).write_bytes(pickle.dumps(calls(flag)["os.system"]))
        for form, given in (("folder", policy), ("file", packed(policy))):
            tried(out, f"restore_from_path, {form}", name, flag, policy_file.check, given)
    kinds: Mapping[bytes, str] = {
        tarfile.SYMTYPE: "/etc",
        tarfile.LNKTYPE: "x",
        tarfile.REGTYPE: "",
        tarfile.FIFOTYPE: "",
    }
    for kind, link in kinds.items():
        for name in ("../flag", str(flag), "a/../../flag"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, link
            with tarfile.open(folder / "outside.nemo", "w") as archive:
                archive.addfile(entry)
            tried(out, "restore_from_path, member", name, flag, policy_file.check, folder / "outside.nemo")
    for body in ({"state": {"step": "x"}}, {"files": {"../flag": {"size": 1, "sha256": "x"}}}):
        checkpoint = fresh(folder / "checkpoints") / "fiberpo-step=1"
        checkpoint.mkdir()
        sealed = Manifest(body.get("files", {}), body.get("state", {"step": 1}))  # type: ignore[arg-type]
        (checkpoint / "manifest.json").write_text(sealed.text())
        tried(out, "resume, manifest", str(body), flag, choose, checkpoint.parent, None)


def hugging_face(out: Outcomes, folder: Path, flag: Path, most: int | None) -> None:
    source, target = folder / "hf", folder / "made.nemo"
    make("llama").save_pretrained(source)
    code = source / "code.py"
    code.write_text(f"open({str(flag)!r}, 'w').close()\n")
    whole = {path.name: path.read_bytes() for path in source.iterdir()}

    def restored() -> None:
        fresh(source)
        for name, content in whole.items():
            (source / name).write_bytes(content)
        shutil.rmtree(target, ignore_errors=True)

    for kind, (name, text) in MODEL_FILES.items():
        restored()
        before = json.loads(whole.get(name, b"{}"))
        (source / name).write_text(json.dumps(before | json.loads(text)))
        tried(out, "import-hf", kind, flag, files.import_huggingface, source, target, harmless=True)
    for name in ("model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "tokenizer.json", "tokenizer.model"):
        for kind in ("os.system", "eval", "open"):
            restored()
            if not name.startswith("tokenizer"):
                (source / "model.safetensors").unlink()
            (source / name).write_bytes(pickle.dumps(calls(flag)[kind]))
            load, harmless = files.import_huggingface, name.startswith("tokenizer")
            tried(out, "import-hf", f"{name}, {kind}", flag, load, source, target, harmless=harmless)
    restored()
    files.import_huggingface(source, target)
    (target / "manifest.json").unlink()
    kept = {name: (target / "model_weights" / name).read_bytes() for name in ("common.pt", ".metadata")}
    for name, content in kept.items():
        for kind, found in calls(flag, most).items():
            with contextlib.suppress(Exception):  # some are no pickles to torch
                torch.save({"a": found}, target / "model_weights" / name) if name == "common.pt" else (
                    target / "model_weights" / name
                ).write_bytes(pickle.dumps(found))
            shutil.rmtree(folder / "back", ignore_errors=True)
            back = folder / "back"
            tried(out, "export-hf", f"{name}, {kind}", flag, files.export_huggingface, target, back)
        (target / "model_weights" / name).write_bytes(content)


def data(out: Outcomes, folder: Path, flag: Path) -> None:
    """Lines of data that a task would evaluate, and files that are none."""
    path = folder / "data.jsonl"
    for task, entry in DATA.items():
        record = json.loads(json.dumps(entry).replace("{flag}", str(flag)))
        path.write_text(
            json.dumps({"prompt": "p", "domain": "d", "grader": "reasoning_gym", "task": task, "entry": record}) + "\n"
        )

        def check() -> None:
            (line,) = load_prompts(path)
            wrong = checks.complaint(builtin.reasoning_gym, line.grader, line.fields, line.prompt, None)
            if wrong:
                raise ValueError(wrong)

        tried(out, "data", task, flag, check)
    for name, found in calls(flag).items():
        path.write_bytes(pickle.dumps(found))
        tried(out, "data", f"a pickle, {name}", flag, load_prompts, path)
    for kind, text in YAML.items():
        path.with_suffix(".yaml").write_text(text.format(flag=flag))
        tried(out, "hierarchy file", kind, flag, load_hierarchy, path.with_suffix(".yaml"))
