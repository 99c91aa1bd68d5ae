"""One partition of the experts drifts: what a hierarchy with expert partitions sees, and what one without them sees.

    python docs/figures/experts.py [folder]

A small mixture of experts (Megatron-core's GPTModel on CPU: 2 layers, 8 experts in 4 partitions of two, of which 2
experts see a token) is trained on three synthetic domains and samples responses. The routers of its last layer label
their tokens. Then noise is added to the weights of the two experts of one partition in that layer, more and more of it,
and the log-ratios of the responses go through both hierarchies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from drawing import BLACK, BLUE, GREEN, ORANGE, RED, frame, new_figure, save
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.objective import ExpertPartitions

DOMAINS = ("count", "repeat", "sorted")
VOCAB, LENGTH, PROMPT = 16, 40, 8  # tokens there are, of a sequence, of its prompt
PARTITIONS = {"experts_0-1": [0, 1], "experts_2-3": [2, 3], "experts_4-5": [4, 5], "experts_6-7": [6, 7]}
PERTURBED, LAYER = "experts_2-3", 2
GROUPS, SAMPLES = 48, 8
NOISE = torch.linspace(0.0, 0.7, 15).tolist()  # standard deviation, in those of the weights

CONF = Path(__file__).resolve().parents[2] / "conf" / "hierarchy"
HIERARCHIES = {name: fpo.load_hierarchy(CONF / f"{name}.yaml") for name in ("expert_coarsest", "domain")}


def sequences(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token sequences [number, LENGTH] and their domains [number]; a tenth of the tokens is noise."""

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    place = torch.arange(LENGTH)
    count = (draw(VOCAB, number, 1) + (1 + draw(4, number, 1)) * place) % VOCAB
    repeat = draw(VOCAB, number, 5)[:, place % 5]
    ordered = draw(VOCAB, number, LENGTH).sort(1).values
    domain = draw(3, number)
    tokens = torch.stack([count, repeat, ordered])[domain, torch.arange(number)]
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    return torch.where(noise, draw(VOCAB, *tokens.shape), tokens), domain


@contextmanager
def one_process() -> Iterator[None]:
    """Megatron-core's process groups, of one process."""
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with cpu.megatron_on_cpu():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        torch.manual_seed(0)
        yield
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def make_model() -> Any:
    """The policy, with random weights."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    from nemo_fiberpo.megatron.cpu_layers import local_block_spec

    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, normalization="RMSNorm",
        num_moe_experts=8, moe_router_topk=2, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.02,
        moe_token_dispatcher_type="allgather", moe_ffn_hidden_size=128,
    )  # fmt: skip
    spec = local_block_spec(config, config.num_layers)
    return GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="rope").train()


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def train(model: Any, steps: int = 400) -> float:
    """Next-token prediction; the last loss."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # of the loss that balances experts, as Megatron's schedules do
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens, _ = sequences(32, generator)
        loss = torch.nn.functional.cross_entropy(
            logits_of(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


@torch.no_grad()
def respond(model: Any) -> tuple[Tensor, Tensor]:
    """Sampled sequences [GROUPS * SAMPLES, LENGTH] from prompts of PROMPT tokens, and the domains of the groups."""
    generator = torch.Generator().manual_seed(2)
    prompts, domain = sequences(GROUPS, generator)
    tokens = prompts[:, :PROMPT].repeat_interleave(SAMPLES, 0)
    while tokens.shape[1] < LENGTH:
        shares = logits_of(model, tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], 1)
    return tokens, domain


@torch.no_grad()
def look(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens[:, 1:] and the expert partition of each, [b, LENGTH - 1]: one watched pass."""
    from nemo_fiberpo.megatron.gpt import gpt_policy
    from nemo_fiberpo.megatron.routing import RoutingCapture, hard_labels
    from nemo_fiberpo.megatron.sequences import padded_rows
    from nemo_fiberpo.megatron.step import current_log_probs

    table, _ = ExpertPartitions(by=PARTITIONS).table(8)
    capture = RoutingCapture([model], table, [LAYER])
    rows = padded_rows(tokens)
    batch = [{"rows": rows}]
    with capture.watch(gpt_policy(model, [rows]), batch) as policy:
        (values,) = current_log_probs(policy, batch)
    (masses,) = capture.masses()
    return values[:, :-1].double(), hard_labels(masses)[:, :-1].long()


@contextmanager
def perturbed(model: Any, noise: float) -> Iterator[None]:
    """The model with noise on the weights of one partition's experts."""
    generator = torch.Generator().manual_seed(3)
    experts = model.decoder.layers[LAYER - 1].mlp.experts.local_experts
    weights = [weight for index in PARTITIONS[PERTURBED] for weight in experts[index].parameters()]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight += noise * old.std() * torch.randn(old.shape, generator=generator)
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def measure(model: Any) -> tuple[dict[str, list[Mapping[str, float]]], dict[str, float]]:
    """Per hierarchy the metrics at every noise level; and each partition's share of the tokens."""
    tokens, domain = respond(model)
    old, partition = look(model, tokens)
    live = torch.zeros(old.shape, dtype=torch.bool)
    live[:, PROMPT - 1 :] = True
    sample = torch.arange(len(tokens))
    labels = {"domain": domain[sample // SAMPLES], "prompt_group": sample // SAMPLES, "trajectory": sample}
    flat = {name: label[:, None].expand(old.shape).reshape(-1) for name, label in labels.items()}
    flat["expert_partition"] = partition.reshape(-1)
    names = {"domain": DOMAINS, "expert_partition": tuple(PARTITIONS)}
    courses: dict[str, list[Mapping[str, float]]] = {name: [] for name in HIERARCHIES}
    for noise in NOISE:
        with perturbed(model, noise):
            log_ratio = (look(model, tokens)[0] - old).reshape(-1)
        for name, hierarchy in HIERARCHIES.items():
            named = {column: names[column] for column in names if column in hierarchy.columns}
            cells = hierarchy.cells(flat, live.reshape(-1), named)
            cells = cells.share([cells.census()], 0)
            weighted = live.reshape(-1) / live.sum()
            courses[name].append(fpo.surrogate(log_ratio, weighted, cells, hierarchy).report.metrics())
    shares = torch.bincount(partition[live], minlength=len(PARTITIONS)).double() / live.sum()
    return courses, dict(zip(PARTITIONS, shares.tolist(), strict=True))


def used(course: Sequence[Mapping[str, float]], stratum: str, figure: str) -> list[float]:
    """The larger of both channels' use of the budget, per noise level."""
    return [max(metrics[f"{stratum}/{channel}/{figure}"] for channel in ("pos", "neg")) for metrics in course]


def draw(courses: Mapping[str, Sequence[Mapping[str, float]]], shares: Mapping[str, float]) -> None:
    figure = new_figure(13, 4.4)
    first, second, third = figure.subplots(1, 3)
    for name, colour in zip(PARTITIONS, (BLUE, RED, GREEN, ORANGE), strict=True):
        style = {"linewidth": 2.6} if name == PERTURBED else {"linewidth": 1.6, "linestyle": "--"}
        label = f"{name.replace('_', ' ')} ({shares[name]:.0%} of the tokens)"
        values = used(courses["expert_coarsest"], f"expert_partition.{name}", "budget_used")
        first.plot(NOISE, values, color=colour, label=label, **style)
    strata = zip(("domain", "prompt_group", "trajectory"), ("-", "--", ":"), strict=True)
    for stratum, dash in strata:
        values = used(courses["domain"], stratum, "budget_used_max")
        second.plot(NOISE, values, color=BLACK, linestyle=dash, label=stratum.replace("_", " "))
    for name, colour, label in (("expert_coarsest", RED, "with partitions"), ("domain", BLACK, "without")):
        third.plot(NOISE, [metrics["token/clipped"] for metrics in courses[name]], color=colour, label=label)
    noise = f"noise on the weights of {PERTURBED.replace('_', ' ')} / their std"
    frame(first, "With partitions of experts (expert_coarsest)", noise, "budget used, |drift| / budget")
    frame(second, "Without (domain): largest cell of each stratum", noise, "budget used, |drift| / budget")
    frame(third, "Tokens that the token clip cuts", noise, "share of the tokens")
    for axes in (first, second):
        axes.set_ylim(0, 3.4)
        axes.axhspan(1.0, 3.4, color="0.5", alpha=0.12, linewidth=0)
        axes.axhline(1.0, color="0.2", linewidth=1.0)
        axes.annotate("out of pass-through", (NOISE[-1], 1.05), ha="right", fontsize=9)
    for axes in (first, second, third):
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    save(figure, "experts.png")


if __name__ == "__main__":
    with one_process():
        policy = make_model()
        train(policy)
        draw(*measure(policy))
