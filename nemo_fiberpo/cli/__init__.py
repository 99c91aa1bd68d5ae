"""The command `fiberpo`.

Its exit status is 0; 1 if a run failed or cannot run; 2 if the input cannot be read; 75 if a run is unfinished, which
the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from nemo_fiberpo.cli import analysing, reference, training, verifying
from nemo_fiberpo.cli.compose import known

EXAMPLES = """examples:
  fiberpo train my_run                              train on this machine
  fiberpo check my_run                              what is wrong with it?
  fiberpo plan cluster/mixtral_8x7b                 what will it need?
  fiberpo verify --tp 2 --pp 2                      gradients as on one rank?
  fiberpo config algorithm                          what do its keys mean?
  fiberpo compare runs/seed0 runs/seed1 runs/grpo   what did they do?
  fiberpo calibrate runs/grpo                       budgets from its drift
  fiberpo import-hf /models/Mixtral-8x7B moe.nemo   Hugging Face to NeMo
  fiberpo export-hf runs/my_run/policy.nemo hf      and back
"""
PLAN_EXAMPLES = """examples:
  fiberpo plan cluster/llama3_1_8b trainer.num_nodes=2 hierarchy=tree
  fiberpo plan /data/my_run.yaml --json
  fiberpo plan my_run algorithm.passes=auto --run runs/my_run

configurations that can be named:
  {names}
"""
CONVERSIONS = {
    "import-hf": ("DIR", "OUT.nemo", "a folder with config.json and *.safetensors", "the .nemo folder to write"),
    "export-hf": ("RUN.nemo", "DIR", "a .nemo file or folder", "the folder to write"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns its exit status."""
    try:
        return _main(arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _say("", stream)


def _main(arguments: Sequence[str] | None) -> int:
    parser, of_runs = _parsers()
    # argparse ends a list of arguments at the first option; arguments after it are overrides too.
    given, more = parser.parse_known_args(arguments)
    if given.command not in of_runs or any(argument.startswith("-") for argument in more):
        given = parser.parse_args(arguments)
    if given.command in of_runs:
        if given.config_name is not None and given.config is not None:  # as in the training script
            given.overrides.insert(0, given.config)
        given.config = given.config_name or given.config
        if given.config is None and given.command != "verify":
            _say(f"{of_runs[given.command].format_help()}\nerror: which configuration?\n", sys.stderr)
            return 2
        given.overrides += more
    try:
        if given.command == "train":
            return training.train(given.config, given.overrides, given.ranks, given.verbose)
        if given.command == "check":
            return training.check(
                given.config, given.overrides, partial(_say, stream=sys.stdout), partial(_say, stream=sys.stderr)
            )
        if given.command == "verify":
            every = sys.argv[1:] if arguments is None else arguments
            return verifying.verify(given, every, partial(_say, stream=sys.stdout))
        if given.command == "plan":
            return _plan(given.config, given.overrides, given.json, given.run)
        if given.command == "config":
            _say(reference.config(given.section, given.markdown) + "\n", sys.stdout)
            return 0
        if given.command in ("compare", "calibrate"):
            analysing.run(given, partial(_say, stream=sys.stdout), partial(_say, stream=sys.stderr))
            return 0
        return _convert(given.command, given.source, given.target)
    except (ValueError, OSError) as error:
        _say(f"error: {error}\n", sys.stderr)
        return 2


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `fiberpo`, and those of its commands that take a config and overrides."""
    raw = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
    description = "Multi-scale trust regions for reinforcement learning of language models."
    parser = argparse.ArgumentParser(
        prog="fiberpo",
        usage="fiberpo COMMAND ...",
        description=description,
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    # The metavar, whose width places the commands' help.
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND ...", prog="fiberpo")
    of_runs: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, **texts: Any) -> argparse.ArgumentParser:
        of_runs[name] = command = commands.add_parser(name, formatter_class=raw, allow_abbrev=False, **texts)
        command.add_argument(
            "config", nargs="?", metavar="CONFIG", help="a file of conf/ by its name, or a path to a YAML file"
        )
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as model.micro_batch_size=2")
        command.add_argument("--config-name", metavar="CONFIG", help="the same, as the training script has it")
        return command

    training.add_commands(add)
    plan = add(
        "plan",
        help="what a run will need, or why it cannot run",
        description="Ranks, groups, memory, cells and collectives of a run, or why it cannot run.",
        epilog=PLAN_EXAMPLES.format(names="\n  ".join(known()) or "none: there is no conf/ here"),
    )
    plan.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help="the run_dir of a run with algorithm.passes: auto; what steps cost in it",
    )
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    verifying.add_command(add)
    reference.add_command(commands, raw)
    analysing.add_commands(commands, raw)
    for name, (source, target, reads, writes) in CONVERSIONS.items():
        does = "a Hugging Face model as a policy" if name == "import-hf" else "a policy as a Hugging Face model"
        convert = commands.add_parser(
            name, help=does, description=f"{does}; docs/checkpoint_conversion.md".capitalize()
        )
        convert.add_argument("source", metavar=source, type=Path, help=reads)
        convert.add_argument("target", metavar=target, type=Path, help=writes)
    return parser, of_runs


def _plan(config: str, overrides: Sequence[str], as_json: bool, run: Path | None) -> int:
    from nemo_fiberpo.cli.compose import compose
    from nemo_fiberpo.cli.planning import plan_of
    from nemo_fiberpo.plan.table import format_plan

    found = plan_of(compose(config, overrides), config, run)
    _say((json.dumps(found.as_dict(), indent=1) if as_json else format_plan(found)) + "\n", sys.stdout)
    for problem in found.problems:
        _say(f"error: {problem}\n", sys.stderr)
    return 1 if found.problems else 0


def _convert(command: str, source: Path, target: Path) -> int:
    from nemo_fiberpo.conversion.files import export_huggingface, import_huggingface

    for line in (import_huggingface if command == "import-hf" else export_huggingface)(source, target):
        _say(f"warning: {line}\n", sys.stderr)
    _say(f"wrote {target}\n", sys.stdout)
    return 0


def _say(text: str, stream: TextIO) -> None:
    """Print; a closed pipe, as after `head`, is ignored."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # Otherwise the interpreter fails again when it flushes the stream at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
