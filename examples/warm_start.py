"""Make the quickstart's data and its starting policy: a supervised warm start on reference answers.

    torchrun --nproc_per_node 2 examples/warm_start.py --config-name quickstart

A policy that answers nothing right has nothing to reinforce. This trains a fresh model on prompts with reference
answers, each domain until it answers about a third of its prompts, and writes the .nemo file that
examples/train_gpt_fiberpo.py starts from. The supervised gradient is that of the objective on-policy with advantage 1:
every token's coefficient is its weight."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_fiberpo.aligner import build
from nemo_fiberpo.aligner.checkpoint.resume import lock_run_directory
from nemo_fiberpo.aligner.checkpoint.run_record import RunRecord
from nemo_fiberpo.aligner.config.checks import read_training_config
from nemo_fiberpo.aligner.config.sections import warm_start_settings
from nemo_fiberpo.aligner.lifecycle.ending import run_main
from nemo_fiberpo.aligner.lifecycle.first_rank import decide_on_first_rank, is_first_rank
from nemo_fiberpo.hydra_support.command_line import command_line, prepare_hydra

prepare_hydra()


def run(cfg: DictConfig) -> None:
    config, settings = read_training_config(cfg), warm_start_settings(cfg)
    hierarchy, data, reward = config.hierarchy, config.data, config.rewards
    record, target = RunRecord(cfg), Path(cfg.pretrained_checkpoint.restore_from_path)
    if decide_on_first_rank(cfg.collective_timeout, lambda: whether_to_train(cfg, record, target)) is None:
        return
    # The other ranks wait for this file, whose text says which data is complete.
    complete = Path(cfg.data_dir) / "complete"
    if is_first_rank():
        if not holds(complete, f"seed {cfg.seed}"):
            print("warm start: making the data", flush=True)
            from quickstart_data import write_quickstart_data

            complete.unlink(missing_ok=True)
            write_quickstart_data(Path(cfg.data_dir), seed=cfg.seed)
            complete.write_text(f"seed {cfg.seed}\n")
        record.remember(0)
    build.start(cfg)

    from nemo_aligner.utils.train_script_utils import init_distributed

    from nemo_fiberpo.aligner.actor import FiberPOActor
    from nemo_fiberpo.aligner.config.model_checks import first_token
    from nemo_fiberpo.aligner.data.prompts import PromptDataset
    from nemo_fiberpo.aligner.rewards.reward_model import make_reward_model
    from nemo_fiberpo.prompts.records import load_prompts

    with open_dict(cfg):
        cfg.model.optim.lr = cfg.model.optim.sched.min_lr = settings.lr
        cfg.model.global_batch_size = settings.batch_size
        axes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        replicas = math.prod(cfg.model[axis] for axis in axes)
        ranks = int(os.environ.get("WORLD_SIZE", "1")) // replicas
        cfg.model.micro_batch_size = settings.batch_size // ranks
    trainer = build.create_trainer(cfg)
    wait_until_holds(complete, f"seed {cfg.seed}")
    prompts, answered = load_prompts(data.train), load_prompts(settings.data)
    actor = FiberPOActor(cfg.model, trainer)
    init_distributed(trainer, actor)
    bos_id = first_token(cfg.model, actor.tokenizer)
    checks = PromptDataset(prompts, actor.tokenizer, data.max_prompt_length, bos_id=bos_id)
    optimizer, scheduler, _ = build.initialise(cfg, trainer, actor, checks, settings.steps)
    examples = tokenize(answered, actor.tokenizer, bos_id)
    grader = make_reward_model(reward, checks.records, actor.tokenizer)

    def step(number: int, batch) -> None:
        where = f"step {number} of the warm start"
        supervised_step(actor, hierarchy, optimizer, scheduler, batch, settings.batch_size, where)

    teach(settings, step, examples, actor, grader, checks, ranks, torch.Generator().manual_seed(cfg.model.seed))
    save(actor, optimizer, target)
    grader.close()


def whether_to_train(cfg: DictConfig, record: RunRecord, target: Path) -> dict[str, Any] | None:
    """None if there is nothing to do. First rank; it holds the run's lock from now on: a warm start that waited for
    another one finds what that has written."""
    lock_run_directory(cfg, record)
    if not target.exists():
        return {}
    print(f"warm start: {target} exists, nothing to do", flush=True)
    return None


def holds(path: Path, text: str) -> bool:
    """Whether the file is there and holds `text`."""
    return path.exists() and path.read_text().strip() == text


def wait_until_holds(path: Path, text: str, seconds: float = 300.0) -> None:
    """Until the first rank has written `text` to `path`, before process groups exist. TimeoutError if it does not."""
    until = time.monotonic() + seconds
    while not holds(path, text):
        if time.monotonic() > until:
            raise TimeoutError(f"{path} does not hold {text!r} after {seconds:.0f} s")
        time.sleep(0.1)


def teach(settings, step, examples, actor, grader, checks, ranks: int, generator: torch.Generator) -> None:
    """Take `step` on batches of examples until every domain of `checks` is answered well enough, or `settings.steps`.

    ranks  data-parallel ranks, each of which takes its share of a batch
    """
    from nemo_aligner.utils import parallel_state

    from nemo_fiberpo.aligner.rollout.evaluation import evaluate, mean_rewards

    sample = first_of_each_domain(checks, settings.check_prompts)
    share = dict.fromkeys(checks.domains, 1.0)
    for number in range(settings.steps):
        rank = parallel_state.get_data_parallel_rank()
        step(number, draw(examples, share, settings.batch_size, generator)[rank::ranks])
        if (number + 1) % settings.check_every == 0:
            rows = evaluate(actor, grader, sample, batch=len(sample), seed=number)
            means = mean_rewards(rows, "sampled")
            # A domain that is left out is forgotten within a few steps.
            share = {domain: settings.rehearsal if means[domain] >= settings.stop_reward else 1.0 for domain in share}
            if is_first_rank():
                line = ", ".join(f"{domain} {means[domain]:.2f}" for domain in checks.domains)
                print(f"warm start: step {number + 1}, reward {line}", flush=True)
            if max(share.values()) < 1.0:
                break


def draw(examples, share: dict[str, float], number: int, generator: torch.Generator):
    """`number` examples at random, domains in proportion to their shares."""
    weights = torch.tensor(list(share.values()), dtype=torch.float64)
    domains = torch.multinomial(weights, number, replacement=True, generator=generator).tolist()
    places = torch.rand(number, generator=generator, dtype=torch.float64).tolist()
    pools = [examples[domain] for domain in share]
    return [pools[domain][int(place * len(pools[domain]))] for domain, place in zip(domains, places, strict=True)]


def tokenize(records, tokenizer, bos_id: int | None) -> dict[str, list[tuple[list[int], list[int]]]]:
    """(prompt, answer and end of sequence) as token ids, by domain; see `prompt_ids`."""
    from nemo_fiberpo.aligner.data.prompts import prompt_ids

    examples: dict[str, list[tuple[list[int], list[int]]]] = {}
    for record in records:
        answer = [*tokenizer.text_to_ids(record.response), tokenizer.eos_id]
        examples.setdefault(record.domain, []).append((prompt_ids(record, tokenizer, bos_id), answer))
    return examples


def first_of_each_domain(prompts, number: int):
    """The first `number` prompts of every domain, as a data set that grades and evaluates like `prompts`."""
    from nemo_fiberpo.aligner.data.prompts import PromptSubset

    counts: dict[str, int] = {}
    places = []
    for place, record in enumerate(prompts.records):
        counts[record.domain] = counts.get(record.domain, 0) + 1
        if counts[record.domain] <= number:
            places.append(place)
    return PromptSubset(prompts, places)


def supervised_step(actor, hierarchy, optimizer, scheduler, examples, global_batch: int, where: str) -> None:
    """One optimizer step on -mean log-likelihood of the answers, each answer weighing the same; `where` it is, for an
    error."""
    from nemo_fiberpo.aligner import finite
    from nemo_fiberpo.aligner.rollout.minibatch import build_minibatch, flatten_column, flatten_labels, stacked_shape
    from nemo_fiberpo.objective import build_cells

    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.full((len(examples), width), actor.tokenizer.eos_id)
    mask = torch.zeros(len(examples), width - 1, dtype=torch.bool)
    for row, live, (prompt, answer) in zip(tokens, mask, examples, strict=True):
        row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        live[len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in examples])
    rows = actor.rows(tokens, lengths, actor.cfg.micro_batch_size, packed=False)
    weights = flatten_column(mask.double() / mask.sum(1, keepdim=True) / global_batch, rows)
    labels = {"trajectory": flatten_labels(torch.arange(len(examples)), mask, rows)}
    columns = {"mask": mask, "logprobs": torch.zeros(mask.shape), "advantage": torch.ones(len(examples))}
    cells = build_cells(["trajectory"], labels, flatten_column(mask, rows), shape=stacked_shape(rows))
    minibatch = build_minibatch(columns, rows, weights, cells.shared, None)
    actor.prepare_for_training()
    optimizer.zero_grad()
    actor.prepare_for_training_step()
    actor.step(minibatch, hierarchy, on_policy=True)
    actor.finish_training_step()
    finite.step(optimizer, where)
    scheduler.step()
    actor.finish_training()


def save(actor, optimizer, target: Path) -> None:
    """Write the .nemo file whole or not at all, and only if its weights are finite."""
    from nemo_fiberpo.aligner import finite
    from nemo_fiberpo.storage import manifest, policy_file

    finite.check_weights(actor, optimizer, str(target))
    scratch = target.with_suffix(".partial")
    if is_first_rank():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    torch.distributed.barrier()
    actor.save_to(str(scratch / target.name))
    torch.distributed.barrier()
    if is_first_rank():
        os.replace(scratch / target.name, target)
        found = manifest.entries(target.parent, [target.name])
        manifest.write_atomically(policy_file.seal_of(target), manifest.Manifest(found, {}).text())
        shutil.rmtree(scratch, ignore_errors=True)
        print(f"warm start: wrote {target}", flush=True)


@hydra.main(version_base=None, config_path="../conf", config_name="quickstart")
def main(cfg: DictConfig) -> None:
    OmegaConf.set_struct(cfg, False)
    run_main(lambda: run(cfg))


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
