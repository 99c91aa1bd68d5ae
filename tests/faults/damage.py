"""Damage to every kind of file of a checkpoint, a policy, a Hugging Face model, a run's record and its data: each is
noticed, names its file, ends in time and is no bare traceback.

A checkpoint and a policy with a manifest are held against it. What has none (a Hugging Face model, data, a policy that
is "unverified") can only be found where its structure breaks, so there the content that the damage leaves must be
refused or be whole again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from nemo_fiberpo.aligner.checkpoint.candidates import choose
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.loggers import DAMAGED, MetricsFile
from nemo_fiberpo.conversion.weights import Weights
from nemo_fiberpo.prompts.records import load_prompts
from nemo_fiberpo.storage import manifest, policy_file
from tests.faults.outcome import Outcomes, TooLong, within
from tests.storage.test_policy_file import FILES as OF_POLICY
from tests.storage.test_policy_file import packed, seal, write
from tests.support.damage import FILES, flip, name_of, save, truncate
from tests.support.hf_models import make

SECONDS = 20.0
Damage = Callable[[Path, random.Random], None]


def flipped(path: Path, at: random.Random) -> None:
    flip(path, at.randrange(8 * path.stat().st_size))


def cut(path: Path, at: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: at.randrange(path.stat().st_size)])


def zeroed(path: Path, at: random.Random) -> None:
    """A block that was never written, as after a crash of the machine."""
    content = bytearray(path.read_bytes())
    place = at.randrange(len(content))
    content[place : place + 64] = bytes(len(content[place : place + 64]))
    path.write_bytes(bytes(content) if bytes(content) != path.read_bytes() else bytes(content) + b"\0")


def longer(path: Path, at: random.Random) -> None:
    path.write_bytes(path.read_bytes() + at.randbytes(at.randrange(1, 64)))


def swapped(path: Path, at: random.Random) -> None:
    """With another file of the folder, or with itself turned round."""
    content = path.read_bytes()
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and "manifest" not in other.name]
    others = [other for other in others if other.read_bytes() != content]
    if others:
        other = at.choice(others)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        path.write_bytes(content[::-1] + b"x")


def gone(path: Path, _at: random.Random) -> None:
    path.unlink()


def folder(path: Path, _at: random.Random) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path, _at: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path, _at: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def dangling(path: Path, _at: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


BYTES: list[Damage] = [flipped, flipped, flipped, cut, cut, zeroed, longer, swapped]
DAMAGES: list[Damage] = [*BYTES, gone, folder, fifo, endless, dangling]


def tried(out: Outcomes, kind: str, what: str, name: str, use: Callable[[], str]) -> None:
    """`use` returns what was noticed, "" for nothing, or raises ValueError; either names the file."""
    try:
        with within(SECONDS):
            said = use()
    except ValueError as error:
        said = str(error)
    except TooLong:
        out.add(kind, "hung", what)
        return
    except BaseException as error:
        out.add(kind, "traceback", f"{what}: {type(error).__name__}: {error}")
        return
    if not said:
        out.add(kind, "silent", what)
    elif name not in said:
        out.add(kind, "names another file", f"{what}: {said[:200]}")
    else:
        out.add(kind, "named")


def of_checkpoints(out: Outcomes, where: Path, at: random.Random) -> None:
    """The newest of two; the run goes on from the one before, and the file is told."""
    for name in (*FILES, manifest.NAME):
        for damage in DAMAGES:
            shutil.rmtree(where, ignore_errors=True)
            save(where, 2)
            newest = save(where, 4)
            before = (newest / name).read_bytes()
            damage(newest / name, at)

            def use() -> str:
                found = choose(where, {"step": 4, "name": name_of(4)})
                assert found.checkpoint == where / name_of(2), f"it goes on from {found.checkpoint}"
                return "\n".join(found.lines)

            if not _same(newest / name, before):
                tried(out, "checkpoint", f"{damage.__name__} {name}", name, use)


def of_policies(out: Outcomes, where: Path, at: random.Random) -> None:
    for name in (*OF_POLICY, manifest.NAME):
        for damage in DAMAGES:
            shutil.rmtree(where, ignore_errors=True)
            policy = seal(write(where / "p.nemo"))
            damage(policy / name, at)
            what = f"{damage.__name__} {name}"
            # without its manifest nothing can be held against it: it is said to be unverified
            expected = "unverified" if name == manifest.NAME and damage in (gone, dangling) else name
            tried(out, ".nemo folder", what, expected, partial(_noticed, policy))
    for name in ("packed.nemo", "packed.nemo.manifest.json"):
        for damage in DAMAGES:
            shutil.rmtree(where, ignore_errors=True)
            policy = seal(packed(write(where / "p.nemo")))
            damage(policy.with_name(name), at)
            expected = "unverified" if name.endswith("json") and damage in (gone, dangling) else "packed.nemo"
            tried(out, ".nemo file", f"{damage.__name__} {name}", expected, partial(_noticed, policy))


def _noticed(policy: Path) -> str:
    said = policy_file.check(policy)
    return said if "unverified" in said else ""


def of_archives(out: Outcomes, where: Path, at: random.Random) -> None:
    """A `.nemo` file without a manifest: the archive's own structure, and the configuration in it."""
    for damage in (cut, gone, folder, fifo, endless, dangling):
        for _ in range(4):
            shutil.rmtree(where, ignore_errors=True)
            policy = packed(write(where / "p.nemo"))
            damage(policy, at)
            tried(out, ".nemo file, no manifest", damage.__name__, "packed.nemo", partial(policy_file.check, policy))


def of_models(out: Outcomes, where: Path, at: random.Random) -> None:
    """A Hugging Face model in several shards."""
    made = where.with_name("hf")
    make("llama").save_pretrained(made, max_shard_size="20KB")
    for name in sorted(path.name for path in made.iterdir() if "safetensors" in path.name):
        for damage in (cut, longer, swapped, gone, folder, fifo, endless, dangling):
            shutil.rmtree(where, ignore_errors=True)
            shutil.copytree(made, where)
            damage(where / name, at)

            def use() -> str:
                weights = Weights(where)
                for tensor in sorted(weights.names):
                    weights.read(tensor)
                return ""

            tried(out, "Hugging Face model", f"{damage.__name__} {name}", "safetensors", use)


def of_records(out: Outcomes, where: Path, at: random.Random) -> None:
    """run.json, which is read at every start, and metrics.jsonl, which goes back to a checkpoint's step."""
    cfg = OmegaConf.create(
        {
            "run_dir": str(where), "seed": 1, "trainer": {}, "model": {}, "data": {"train": "x"},
            "algorithm": {"samples_per_prompt": 8, "prompts_per_rollout": 8},
        }
    )  # fmt: skip
    for damage in (cut, cut, cut, longer, folder, fifo, endless, zeroed, zeroed):
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        RunRecord(cfg).remember(0)
        damage(where / "run.json", at)

        def use() -> str:
            RunRecord(cfg).check()
            return ""

        tried(out, "run.json", damage.__name__, "run.json", use)
    for number in range(40):
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        path = where / "metrics.jsonl"
        rows = [json.dumps({"rl_step": step, "step": step, "x": 0.5}).encode() for step in range(4)]
        rows[1] = _broken(rows[1], number, at)
        path.write_bytes(b"\n".join(rows) + b"\n")

        tried(out, "metrics.jsonl", f"{rows[1]!r}", "metrics.jsonl", partial(_rewound, path))


def _rewound(path: Path) -> str:
    """Where the two whole lines before the checkpoint's step are kept and the damaged one is put aside, the file."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        MetricsFile(path).rewind(3)
    kept, aside = path.read_bytes().count(b"\n"), path.with_name(path.name + DAMAGED)
    return said.getvalue() if kept == 2 and aside.exists() else f"{kept} lines kept"


def _loaded(path: Path) -> str:
    load_prompts(path)
    return ""


def _broken(row: bytes, number: int, at: random.Random) -> bytes:
    """A line that is no record of a step any more."""
    key = row.index(b"rl_step")
    if number % 4 == 0:
        return row[: at.randrange(1, len(row))]
    if number % 4 == 1:
        place = key + at.randrange(7)
        return row[:place] + bytes([row[place] ^ 1]) + row[place + 1 :]
    if number % 4 == 2:
        return at.randbytes(20).replace(b"\n", b"")
    return row.replace(b"{", b"[", 1)


def of_data(out: Outcomes, where: Path, at: random.Random) -> None:
    line = json.dumps({"prompt": "2+5=", "domain": "m", "grader": "math_verify", "answer": "7"}) + "\n"
    for damage in (cut, cut, gone, folder, fifo, endless, dangling, truncate_twice):
        for _ in range(3):
            shutil.rmtree(where, ignore_errors=True)
            where.mkdir()
            path = where / "train.jsonl"
            path.write_text(line)
            damage(path, at)
            tried(out, "data", damage.__name__, "train.jsonl", partial(_loaded, path))


def truncate_twice(path: Path, _at: random.Random) -> None:
    truncate(path)
    truncate(path)


def _same(path: Path, before: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == before


def damages(where: Path, seed: int = 0, rounds: int = 2) -> Outcomes:
    """All of them, each round at other places; a fault is damage that goes unnoticed, names another file, hangs or ends
    in a traceback."""
    out, at = Outcomes(), random.Random(seed)
    for _ in range(rounds):
        for part in (of_checkpoints, of_policies, of_archives, of_models, of_records, of_data):
            part(out, where / "made", at)
    return out
