"""Sets of bits and lists made from call-time data, against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskdsl import BlockIndices, Shape, VerticalSlash, VSIndices
from maskdsl.binding import widen_slashes
from maskdsl.codegen.kernel import interpreting
from maskdsl.codegen.listing import Lists
from maskdsl.codegen.tables import (
    CallPlan,
    Tables,
    list_members,
    make_bits,
    make_table,
    rank,
    widen,
)

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")


def bits_of(words: torch.Tensor, size: int) -> torch.Tensor:
    place = torch.arange(size)
    return ((words[..., place // 32] >> (place % 32)) & 1).bool()


@settings(max_examples=30)
@given(st.integers(1, 200), st.lists(st.integers(-3, 210), max_size=40))
def test_sets_ranks_and_lists(limit: int, numbers: list[int]) -> None:
    index = torch.tensor(numbers, dtype=torch.int32).reshape(1, 1, -1)
    words = make_bits(index, limit)[..., 0, :]
    members = sorted({x for x in numbers if 0 <= x < limit})
    assert bits_of(words[0, 0], limit).nonzero().flatten().tolist() == members
    before, last = rank(words, with_last=True)
    for w in range(words.shape[-1]):
        assert before[0, 0, w] == sum(x < 32 * w for x in members)
        lower = [x for x in members if x < 32 * w + 32]
        assert last[0, 0, w] == (max(lower) if lower else -(1 << 30))
    assert list_members(words, before, len(members), 5)[0, 0, :len(members)].tolist() == \
        [x - 5 for x in members]


@settings(max_examples=20)
@given(st.integers(1, 300), st.lists(st.integers(0, 310), max_size=30),
       st.sampled_from([(16, 16), (64, 64), (32, 128)]))
def test_slashes_are_covered_by_as_few_tiles_as_a_greedy_choice(
        length: int, slashes: list[int], tile: tuple[int, int]) -> None:
    index = torch.tensor(slashes, dtype=torch.int32).reshape(1, 1, -1)
    atom = VerticalSlash("vs")
    lists = Lists((atom,), (), (atom,), (atom,))
    tables = Tables(CallPlan(lists, Shape(length, length), 1, 1, tile, False),
                    {"vs": VSIndices(index[..., :0], index)})
    wanted = {o for s in set(slashes) if s < length for o in range(s - tile[0] + 1, s + 1)}
    expected = []
    while wanted:
        expected.append(max(wanted))
        wanted -= set(range(expected[-1] - tile[1] + 1, expected[-1] + 1))
    marks = tables.arguments["union_slash_marks"][0, 0]
    found = bits_of(marks, 32 * len(marks)).nonzero().flatten() - (tile[0] - 1)
    assert found.tolist() == expected[::-1]
    assert tables.arguments["union_slash_list"][0, 0, :len(found)].tolist() == expected[::-1]
    covered = tables.arguments["union_slash_covered"][0, 0]
    held = bits_of(covered, 32 * len(covered)).nonzero().flatten() - sum(tile)
    assert held.tolist() == sorted(o for d in expected for o in range(d - tile[1] + 1, d + 1))


@pytest.mark.parametrize("shape", [Shape(200, 200), Shape(130, 300), Shape(64, 64)])
def test_supersets_follow_the_rule(shape: Shape) -> None:
    generator = torch.Generator().manual_seed(shape.q_len)
    slash = torch.randint(-1, 350, (2, 2, 30), generator=generator)
    assert torch.equal(bits_of(widen(slash, shape), shape.kv_len), widen_slashes(slash, shape))


def all_forms() -> list[BlockIndices]:
    live = torch.rand(1, 2, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    lists = torch.where(live, torch.arange(7), -1)
    counts = live.sum(-1)
    packed = live.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    junk = torch.where(torch.arange(7) < counts[..., None], packed, 3)
    flat = torch.where(live, torch.arange(35).view(5, 7), -1).flatten(-2)
    indptr = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    indices = torch.full((1, 2, 35), 2)
    for h in range(2):
        found = live[0, h].nonzero()[:, 1]
        indices[0, h, :len(found)] = found
    return [BlockIndices.from_mask(live, 8, 8), BlockIndices.from_topk(lists, 8, 8),
            BlockIndices.from_topk(junk, 8, 8, counts), BlockIndices.from_flat(flat, 7, 8, 8),
            BlockIndices.from_csr(indptr, indices, 8, 8)]


def test_every_format_makes_the_same_table() -> None:
    forms = all_forms()
    for form in forms:
        assert torch.equal(form.table(5, 7), forms[0].table(5, 7))
        words = make_table(form, 5, 7)
        assert torch.equal(bits_of(words, 7), forms[0].table(5, 7))
        assert torch.equal(form.table(4, 6), forms[0].table(4, 6))
