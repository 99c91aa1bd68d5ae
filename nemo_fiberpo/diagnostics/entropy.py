"""Entropy of the policy that sampled a rollout, over all tokens and by the labels of `token_labels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from nemo_fiberpo.labelling.token_labels import PREFIX


def entropy_metrics(
    columns: Mapping[str, Tensor], names: Mapping[str, Sequence[str]], reduce: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """`entropy`: an estimate of the old policy's, in nats per token: the mean of -log pi_old over the live tokens of
    all ranks. `entropy/<column>.<name>` and `token_share/<column>.<name>`: the same over the tokens with a label, and
    their share.

    columns  of this rank's samples: `mask` and `logprobs`, [b, s - 1], and those of `TokenLabels.columns`
    names    of the labels by column
    reduce   sums a flat float64 buffer over the ranks; called once
    """
    mask = columns["mask"]
    value = columns["logprobs"][mask].double().neg()
    places, labels = ["entropy"], [mask.long() - 1]
    for column in names:
        if PREFIX + column in columns:
            labels.append(columns[PREFIX + column].long() + len(places))
            places += [f"{column}.{name}" for name in names[column]]
    sums = value.new_zeros(2, len(places))
    for label in labels:
        sums[0].index_add_(0, label[mask], value)
        sums[1].index_add_(0, label[mask], value.new_ones(len(value)))
    total, count = reduce(sums.flatten()).view(2, -1)
    mean = total / count.clamp_min(1.0)
    metrics = {"entropy": mean[0]}
    for index, place in list(enumerate(places))[1:]:
        metrics[f"token_share/{place}"] = count[index] / count[0].clamp_min(1.0)
        if count[index] > 0:
            metrics[f"entropy/{place}"] = mean[index]
    return metrics
