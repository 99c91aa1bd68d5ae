"""What docs/layouts.md says beside its tables."""

from __future__ import annotations

from tests.megatron.comparison import BOUND

INTRO = f"""\
# The same gradient on every layout

The loss and every parameter gradient of a step do not depend on how the global batch and the model are laid out. This
is the record of that claim: every layout of 1, 2, 4 and 8 ranks that Megatron allows, on real process groups over gloo,
with Megatron's own model, schedules, dispatchers and DDP. Made by

    bash tests/run.sh matrix

**What is compared.** A GPT of 2 to 8 layers, 8 experts (top-2) and 8 heads, in float64. One process with the whole
batch in one micro-batch computes the objective by loops over tokens and cells that share no code with the package, and
its gradient by autograd. Each layout takes the same step: 16 samples of 2 to 12 tokens in scattered order, in domains,
prompt groups and trajectories, among them an empty trajectory and some of one response token; every regime of the gates
occurs. Of every parameter the shards of all ranks are put together, and the error is `|g - g'| / |g'|` of the worst
copy. Bound: {BOUND:g} for the loss and for every gradient. The metrics must be those of one process to 1e-9. The
router's softmax, which Megatron computes in float32 in any model, is float64 here.

**Expert partitions.** The hierarchies of all variants but `dense` and `seg` have a stratum of expert partitions, a map
of the 8 experts to 3 partitions that no layout's expert-parallel ranks have. Each layout reads the labels from
Megatron's own routers (`megatron/routing.py`) in a pass for log-probs: what `gating` returns, before the top-k
selection, becomes probabilities of all experts, summed into partitions, added over the layers of all pipeline stages,
gathered over sequence-parallel ranks; labels come back to the samples as log-probs do, and the step is taken with them.
The one process works the masses out again from the inputs of its routers. Masses must agree to {BOUND:g} (they are kept
in units of 2^-40, so that sums over layers are exact in any order), labels and soft memberships at every token.

**Segments.** `seg` runs on every layout that splits sequences over ranks. Each rank labels the responses of its own
samples from their tokens (`labelling/`): segments between markers, which may be nested or never closed, and spans that
are masked. The one process labels them character by character. Labels and masks must agree at every token.

| hierarchy | variants |
|---|---|
| domain, group, trajectory, (trajectory, partition) | `ag-pad`; with soft membership `a2a-pad` |
| the same, cells of less than 3 tokens merged into their parent | padded rows of the others |
| partition, (domain, p.), (group, p.), (trajectory, p.) | `a2a-thd`, `ag-thd`, packed rows of the others |
| trajectory, (trajectory, partition) | `one` |
| domain, group, trajectory | `dense` |
| segment, (domain, s.), (trajectory, s.), and domain, group, trajectory, (trajectory, s.), in turn | `seg` |

**Variants.** One set of process groups is used by several steps:

| variant | what differs |
|---|---|
| `ag-pad`, `ag-thd`, `a2a-pad`, `a2a-thd` | all-gather or all-to-all dispatcher; padded rows or one packed (THD) row |
| `opt` | distributed optimizer (gradients are reduce-scattered), buckets reduced during the backward pass |
| `rec` | full activation recomputation |
| `one` | one pass; every cell, a trajectory, lies in one micro-batch |
| `chunk` | log-probs from hidden states (`logprobs: chunked`), every other time with tied embeddings |
| `slice`, `sum` | log-probs gathered over cp, with either backward pass of the gather |
| `vpp2`, `vpp4` | virtual pipeline stages of a rank; `vpp2` with buckets reduced during the backward pass |
| `dense` | no experts, no sequence parallelism |
| `seg` | labels of the sampled tokens |

`ag-pad` and `a2a-thd` have rotary positions, `ag-thd` and `a2a-pad` learned ones, the others either. Steps have `pp`
micro-batches, 2 without pipeline stages. On 8 ranks each layout has two of the first four variants, both dispatchers
and both kinds of rows, in alternation, and of `opt`, `rec`, `one`, `chunk`, `slice` and `sum` one or two in turn; that
keeps the whole under an hour on two cores.

**What is left out**, because Megatron itself does not allow it or does not get it right:

- `tp x pp x cp x dp` is the number of ranks and `ep x etp` divides `tp x cp x dp`; `initialize_model_parallel` raises
  for anything else. `ep` divides the 8 experts. Tensor parallelism comes with sequence parallelism, without which
  Megatron refuses to train a mixture of experts (not so `dense`).
- `etp` is 1 or `tp`, and differs from `tp` only with `ep > 1`: without expert parallelism Megatron's linear layers take
  the experts for dense layers over `tp` (`explicit_expert_comm`, `allreduce`). 0.11.0 then fails at an assertion;
  0.16.1 runs, and never adds up the experts' gradients over the tensor-parallel ranks.
- The interleaved schedule needs `pp > 1` and micro-batches that are a multiple of `pp` (Megatron raises); stages times
  virtual stages are at most 8, one layer each. It runs with `overlap_p2p_comm`: Megatron's training arguments demand
  that of 2 stages, because a batch of messages there mixes up activations and gradients.
- megatron-core 0.11.0 alone: the all-to-all dispatcher with `etp > 1`, `ep > 1` and several experts on a rank, whose
  forward pass is wrong unless `moe_permute_fusion` (Transformer Engine) is on: it sorts tokens back by
  `num_global_tokens_per_local_expert.T` of a tensor of three dimensions instead of two. 0.16.1 is right.

**All-reduces** are those that the gates issued, counted at `torch.distributed`: their number per step of two passes and
their bytes together, the largest of the variants. One process issues none. One pass (`one`) needs one, and two more per
micro-batch over cp alone where the sequence is split.
"""
