"""Rows of context-parallel ranks, padded and packed, worked by hand; the attention over them, against plain softmax."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo.megatron.sequences import (
    Rows,
    gather_rows,
    length_multiple,
    packed_rows,
    packed_spans,
    padded_rows,
    zigzag,
)
from tests.support import distributed

# Three sequences of at most 5 tokens: 10 11 12 13 14, 20 21, 30 31 32.
TOKENS = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 99, 99, 99], [30, 31, 32, 99, 99]])
LENGTHS = [5, 2, 3]


def every_rank(packed: bool, cp_size: int, **options: object) -> list[Rows]:
    return [
        packed_rows(TOKENS, LENGTHS, cp_size=cp_size, cp_rank=rank, **options)
        if packed
        else padded_rows(TOKENS, cp_size=cp_size, cp_rank=rank, **options)
        for rank in range(cp_size)
    ]


def test_zigzag_pairs_early_with_late_chunks() -> None:
    """8 places on 2 ranks: chunks 0 1 | 2 3 | 4 5 | 6 7, of which rank 0 has the outer, rank 1 the inner two."""
    assert zigzag(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert zigzag(5, 1, 0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="sequence length: 6 does not divide by 4"):
        zigzag(6, 2, 0)


@pytest.mark.parametrize(
    ("tp", "cp", "sp", "multiple"),
    [(1, 1, False, 1), (2, 1, True, 2), (2, 1, False, 1), (1, 2, False, 4), (2, 4, True, 16)],
)
def test_what_lengths_must_be_multiples_of(tp: int, cp: int, sp: bool, multiple: int) -> None:
    assert length_multiple(tp, cp, sp) == multiple


def test_padded_rows_by_hand() -> None:
    """5 tokens padded to 8, split over 2 ranks. Columns have 4 entries a sample: entry t belongs to token t + 1, whose
    log-prob is the output at place t; place 4, the last token, predicts nothing."""
    first, second = every_rank(False, 2, multiple=4)
    assert first.tokens[0].tolist() == [10, 11, 0, 0]  # places 0 1 6 7
    assert first.targets[0].tolist() == [11, 12, 0, 0]
    assert first.source.tolist() == [[0, 1, -1, -1], [4, 5, -1, -1], [8, 9, -1, -1]]
    assert second.tokens[0].tolist() == [12, 13, 14, 0]  # places 2 3 4 5
    assert second.targets[0].tolist() == [13, 14, 0, 0]
    assert second.source.tolist() == [[2, 3, -1, -1], [6, 7, -1, -1], [10, 11, -1, -1]]
    assert second.positions[0].tolist()[:3] == [2, 3, 4]
    assert first.seq_length == second.seq_length == 8 and first.packed is None


def test_packed_rows_by_hand() -> None:
    """Lengths 5, 2, 3 in spans of 8, 4, 4 behind each other, and 4 places to the width of 20; each span is split."""
    assert packed_spans(LENGTHS, 4) == [8, 4, 4]
    first, second = every_rank(True, 2, multiple=4, seq_length=20)
    #                                       places 0 1 6 7 | 0 3 | 0 3 | padding
    assert first.tokens.tolist() == [[10, 11, 0, 0, 20, 0, 30, 0, 0, 0]]
    assert first.targets.tolist() == [[11, 12, 0, 0, 21, 0, 31, 0, 0, 0]]
    assert first.source.tolist() == [[0, 1, -1, -1, 4, -1, 8, -1, -1, -1]]
    #                                       places 2 3 4 5 | 1 2 | 1 2 | padding
    assert second.tokens.tolist() == [[12, 13, 14, 0, 21, 0, 31, 32, 0, 0]]
    assert second.targets.tolist() == [[13, 14, 0, 0, 0, 0, 32, 0, 0, 0]]
    assert second.source.tolist() == [[2, 3, -1, -1, -1, -1, 9, -1, -1, -1]]
    packed = first.packed
    assert packed.qkv_format == "thd" and packed.max_seqlen_q == 8
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 8, 12, 16, 20]
    assert first.seq_length == 20 and first.tokens.shape == (1, 10)


def test_routed_tokens_by_hand() -> None:
    """Of lengths 5, 2, 3 the second is left out: 8 tokens, the last of a sequence too, wherever the split puts them."""
    kept = torch.tensor([True, False, True])
    padded = [padded_rows(TOKENS, lengths=LENGTHS, counted=kept, cp_size=2, cp_rank=r, multiple=4) for r in (0, 1)]
    assert padded[0].routed.mask.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]  # places 0 1 6 7
    assert padded[1].routed.mask.int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]  # places 2 3 4 5
    packed = [packed_rows(TOKENS, LENGTHS, counted=kept, cp_size=2, cp_rank=r, multiple=4) for r in (0, 1)]
    assert packed[0].routed.mask.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 0]]
    assert packed[1].routed.mask.int().tolist() == [[1, 1, 1, 0, 0, 0, 1, 1]]
    for rank in (0, 1):
        assert padded[rank].routed.per_row.tolist() == [5, 0, 3]
        assert packed[rank].routed.per_row.tolist() == [8]
    chosen = padded_rows(TOKENS, torch.tensor([2, 1]), lengths=torch.tensor(LENGTHS))
    assert chosen.routed.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert padded_rows(TOKENS).routed.per_row.tolist() == [5, 5, 5]


LAID = [(packed, cp) for packed in (False, True) for cp in (1, 2, 4)]


@pytest.mark.parametrize(("packed", "cp"), LAID)
def test_every_entry_lies_on_one_rank_and_predicts_the_next_token(packed: bool, cp: int) -> None:
    ranks = every_rank(packed, cp, multiple=length_multiple(1, cp, False))
    sources = torch.cat([rows.source.reshape(-1) for rows in ranks])
    wanted = [b * 4 + t for b, length in enumerate(LENGTHS) for t in range(length - 1 if packed else 4)]
    assert sorted(sources[sources >= 0].tolist()) == wanted
    for rows in ranks:
        here = rows.source >= 0
        sample, entry = rows.source[here] // 4, rows.source[here] % 4
        assert torch.equal(rows.tokens[here], TOKENS[sample, entry])
        assert torch.equal(rows.targets[here], TOKENS[sample, entry + 1])
        assert torch.equal(rows.positions[here], entry)


@pytest.mark.parametrize(("packed", "cp"), LAID)
def test_put_undoes_take(packed: bool, cp: int) -> None:
    column = torch.arange(1.0, 13.0).view(3, 4)
    out = torch.full_like(column, -7.0)
    for rows in every_rank(packed, cp, multiple=length_multiple(1, cp, False)):
        taken = rows.take(column, fill=-1.0)
        assert torch.equal(taken == -1.0, rows.source < 0)
        rows.put(taken, out)
    live = torch.arange(4) < torch.tensor(LENGTHS)[:, None] - 1 if packed else torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(out, torch.where(live, column, -7.0))


@pytest.mark.parametrize("packed", [False, True])
def test_the_samples_of_a_micro_batch_keep_their_places_in_the_columns(packed: bool) -> None:
    chosen = torch.tensor([2, 0])
    rows = packed_rows(TOKENS, LENGTHS, chosen) if packed else padded_rows(TOKENS, chosen)
    assert rows.tokens.reshape(-1)[:3].tolist() == [30, 31, 32]
    assert set(rows.source.reshape(-1).tolist()) - {-1} == (
        {8, 9, 0, 1, 2, 3} if packed else {8, 9, 10, 11, 0, 1, 2, 3}
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: padded_rows(TOKENS, multiple=4, seq_length=10), "seq_length: 10 must be a multiple of 4"),
        (lambda: padded_rows(TOKENS, seq_length=4), "at least 5"),
        (lambda: padded_rows(TOKENS, cp_size=2), "sequence length: 5 does not divide by 4"),
        (lambda: padded_rows(TOKENS, lengths=[5, 2, 6]), "lengths: must be 3 numbers within 1..5"),
        (lambda: packed_rows(TOKENS, [5, 2]), "lengths: must be 3 numbers within 1..5"),
        (lambda: packed_rows(TOKENS, [5, 0, 3]), "lengths: must be 3 numbers within 1..5"),
        (lambda: packed_rows(TOKENS, [6, 2, 3]), "lengths: must be 3 numbers within 1..5"),
        (lambda: packed_rows(TOKENS, LENGTHS, multiple=4, seq_length=12), "at least 16"),
    ],
)
def test_rows_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def gather_worker(rank: int, world: int) -> tuple[list[list[float]], list[list[float]]]:
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).add(10 * rank).requires_grad_()
    gathered = gather_rows(own, dist.group.WORLD)
    (gathered * torch.arange(8.0).view(2, 4)).sum().backward()
    return gathered.tolist(), own.grad.tolist()


@pytest.mark.distributed
def test_gathered_rows_are_those_of_all_ranks_and_the_backward_keeps_the_own_part() -> None:
    """Weights 0 1 | 2 3 and 4 5 | 6 7: rank 0's gradient is (0 1, 4 5), rank 1's (2 3, 6 7)."""
    (first, grad_first), (second, grad_second) = distributed.run(gather_worker, 2)
    assert first == second == [[1, 2, 11, 12], [3, 4, 13, 14]]
    assert grad_first == [[0, 1], [4, 5]] and grad_second == [[2, 3], [6, 7]]


HEADS, GROUPS, WIDTH = 4, 2, 3


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """By loops: query [s, heads, d], key and value [s', groups, d], sees [s, s'] -> [s, heads d]."""
    out = torch.zeros(len(query), HEADS, WIDTH)
    for i in range(len(query)):
        for head in range(HEADS):
            group = head * key.shape[1] // HEADS
            scores = torch.stack([query[i, head] @ key[j, group] for j in range(len(key)) if sees[i, j]]) * WIDTH**-0.5
            values = torch.stack([value[j, group] for j in range(len(key)) if sees[i, j]])
            out[i, head] = torch.softmax(scores, 0) @ values
    return out.reshape(len(query), -1)


def draw(length: int, groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, heads, WIDTH, generator=generator) for heads in (HEADS, groups, groups)]


def attention_worker(rank: int, world: int, case: str) -> float:
    """Largest difference of outputs and of the gradients of query, key and value from the plain ones."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    from nemo_fiberpo.megatron.cpu import megatron_on_cpu
    from nemo_fiberpo.megatron.cpu_layers import AllGatherAttention

    torch.set_default_dtype(torch.float64)
    parallel_state.initialize_model_parallel(context_parallel_size=world)
    groups = HEADS if case == "padded" else GROUPS
    options = {"num_layers": 1, "hidden_size": HEADS * WIDTH, "kv_channels": WIDTH, "attention_dropout": 0.0}
    config = TransformerConfig(
        **options, num_attention_heads=HEADS, num_query_groups=groups, context_parallel_size=world
    )
    layer = AllGatherAttention(config, 1)
    spans = [8, 4, 12] if case == "packed" else [16]
    whole = [part.requires_grad_() for part in draw(sum(spans), groups)]
    starts = [sum(spans[:index]) for index in range(len(spans) + 1)]
    mine = torch.cat([zigzag(span, world, rank) + start for span, start in zip(spans, starts, strict=False)])
    sequence = torch.arange(len(spans)).repeat_interleave(torch.tensor(spans))
    sees = torch.ones(sum(spans), sum(spans)).tril().bool() & (sequence[:, None] == sequence)
    expected = plain_attention(*whole, sees)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * weight).sum().backward()
    own = [part.detach()[mine].requires_grad_() for part in whole]
    with megatron_on_cpu():
        if case == "packed":
            packed = SimpleNamespace(cu_seqlens_q=torch.tensor(starts))
            out = layer(*own, None, packed_seq_params=packed).squeeze(1)
        else:
            out = layer(*(part.unsqueeze(1) for part in own), None).squeeze(1)
        (out * weight[mine]).sum().backward()
    differences = [out - expected[mine]] + [a.grad - b.grad[mine] for a, b in zip(own, whole, strict=True)]
    return max(float(difference.abs().max()) for difference in differences)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", ["padded", "grouped", "packed"])
def test_attention_is_plain_softmax_attention_of_the_whole_sequence(case: str, world: int) -> None:
    """grouped: two heads share keys and values; packed: three sequences, none of which sees another, grouped too."""
    assert max(distributed.run(attention_worker, world, case)) < 1e-14


def decoding_worker(rank: int, world: int) -> list[float]:
    """Differences of one-query decoding without a mask, and of the last two queries with the causal one."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_fiberpo.megatron.cpu_layers import AllGatherAttention

    torch.set_default_dtype(torch.float64)
    parallel_state.initialize_model_parallel()
    options = {"num_layers": 1, "hidden_size": HEADS * WIDTH, "kv_channels": WIDTH, "attention_dropout": 0.0}
    layer = AllGatherAttention(TransformerConfig(**options, num_attention_heads=HEADS, num_query_groups=GROUPS), 1)
    query, key, value = draw(7, GROUPS)
    expected = plain_attention(query, key, value, torch.ones(7, 7).tril().bool())
    batch = [part.unsqueeze(1) for part in (query, key, value)]
    last = layer(batch[0][-1:], *batch[1:], None, attn_mask_type=AttnMaskType.no_mask).squeeze(1)
    two = layer(batch[0][-2:], *batch[1:], None, attn_mask_type=AttnMaskType.causal).squeeze(1)
    return [float((last - expected[-1:]).abs().max()), float((two - expected[-2:]).abs().max())]


@pytest.mark.distributed
def test_decoding_sees_all_keys_up_to_its_query() -> None:
    assert max(distributed.run(decoding_worker, 1)[0]) < 1e-14
