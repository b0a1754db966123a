"""Runtime slots: what they mean, in plain Python, and what a user is told."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import maskdsl
from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    ColumnIndices,
    Columns,
    Document,
    Documents,
    Full,
    Mask,
    PerHead,
    Prefix,
    PrefixLengths,
    Shape,
    Sink,
    TokenIndices,
    TokenTopK,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
    dense,
    from_json,
    simplify,
)
from maskdsl.errors import (
    AtomArgumentError,
    HeadCountError,
    MissingSlotError,
    SlotDataError,
    UnknownSlotError,
)

N, HEADS = 24, 2
V = [[3, 3, -1, 20, 99], [0, 5, 6, 7, 23]]
S = [[0, 2, 9, -1, 40], [1, 1, 4, 8, 23]]
B = [[[0, 2], [1, -1], [9, 0]], [[2, 2], [-1, -1], [0, 1]]]  # head, row of 8 queries: blocks of 8
T = [[[(3 * r) % 30, r, -1] for r in range(N)], [[30, -1, 0] for _ in range(N)]]
IDS = [0] * 5 + [2] * 9 + [-1] * 3 + [5] * 7

MEANINGS: dict[str, tuple[Mask, Any, Callable[[int, int, int], bool]]] = {
    "VerticalSlash": (VerticalSlash("x"), VSIndices(torch.tensor([V]), torch.tensor([S])),
                      lambda h, p, k: k in V[h] or (p >= k and p - k in S[h])),
    "Columns": (Columns("x"), ColumnIndices(torch.tensor([V])), lambda h, p, k: k in V[h]),
    "Blocks": (Blocks("x", 8, 8), BlockIndices.from_topk(torch.tensor([B]), 8, 8),
               lambda h, p, k: k // 8 in B[h][p // 8]),
    "TokenTopK": (TokenTopK("x"), TokenIndices(torch.tensor([T])), lambda h, p, k: k in T[h][p]),
    "Document": (Document("x"), Documents.from_ids(torch.tensor(IDS)),
                 lambda h, p, k: IDS[p] == IDS[k] >= 0),
    "Prefix": (Prefix("x"), PrefixLengths(torch.tensor([7])), lambda h, p, k: k < 7 or k <= p),
    "PerHead": (PerHead([Window(3), Sink(4)]), None,
                lambda h, p, k: 0 <= p - k < 3 if h == 0 else k < 4),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_meaning(name: str) -> None:
    mask, data, meaning = MEANINGS[name]
    live = dense(mask, Shape(N, N), 1, HEADS, slots={} if data is None else {"x": data})
    for h in range(HEADS):
        for p in range(N):
            for k in range(N):
                assert bool(live[0, h, p, k]) == meaning(h, p, k), (h, p, k)


@pytest.mark.parametrize("mask", [mask for mask, _, _ in MEANINGS.values()]
                         + [VerticalSlash("vs", "block64"),
                            PerHead([Sink(1) | Columns("c"), Full()])])
def test_round_trips(mask: Mask) -> None:
    names = {name: getattr(maskdsl, name) for name in maskdsl.__all__}
    assert eval(repr(mask), names) == mask
    assert from_json(mask.to_json()) == mask and pickle.loads(pickle.dumps(mask)) == mask
    assert hash(eval(repr(mask), names)) == hash(mask)


def test_laws_know_that_data_can_be_anything() -> None:
    vs = VerticalSlash("vs")
    assert simplify(vs | Full()) == Full() and simplify(vs & Full()) == vs
    assert simplify(vs | Sink(4)) == vs | Sink(4)
    assert simplify(vs & Window(4)) == vs & Window(4)


def test_documents_from_cu_seqlens() -> None:
    same = Documents.from_cu_seqlens(torch.tensor([0, 5, 14, 14, 20]), 24)
    ids = Documents.from_ids(torch.tensor([0] * 5 + [1] * 9 + [2] * 6 + [-1] * 4))
    assert torch.equal(same.start, ids.start) and torch.equal(same.stop, ids.stop)


def test_documents_that_come_back_are_told() -> None:
    with pytest.raises(SlotDataError, match="follow one another"):
        Documents.from_ids(torch.tensor([0, 1, 0]))
    Documents.from_ids(torch.tensor([-1, 0, 0, -1, 1, -1]))  # padding may


def test_a_block_mask_is_adopted() -> None:
    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k < 40)

    table = create_block_mask(near, 1, 1, 96, 96, device="cpu", BLOCK_SIZE=16)
    partial, full = BlockIndices.from_block_mask(table)
    mask = Blocks("full", 16, 16) | Blocks("part", 16, 16) & Where(near)
    live = dense(mask, Shape(96, 96), slots={"full": full, "part": partial})
    assert torch.equal(live, dense(Causal() & Window(40), Shape(96, 96)))


def test_nsa_and_dsa_formats() -> None:
    blocks = BlockIndices.from_nsa(torch.tensor([[[[0, 3]], [[1, 9]]]]), 4)  # B 1, L 2, H 1
    assert blocks.table(2, 3).tolist() == [[[[True, False, False], [False, True, False]]]]
    tokens = TokenIndices.from_dsa(torch.tensor([[[2, 0]], [[1, 1]]]), torch.tensor([1, 2]))
    assert tokens.table(2, 3).tolist() == [[[[False, False, True], [False, True, False]]]]


Q = torch.zeros(2, 4, N, 16)
K = torch.zeros(2, 2, N, 16)
GOOD = VSIndices(torch.zeros(1, 4, 1, dtype=torch.int32), torch.zeros(1, 4, 1, dtype=torch.int32))


def call(mask: Mask, **slots: Any) -> torch.Tensor:
    return maskdsl.compile(mask, backend="torch")(Q, K, K, **slots)


@pytest.mark.parametrize(("act", "error", "words"), [
    (lambda: call(VerticalSlash("vs")), MissingSlotError, "vs=VSIndices"),
    (lambda: call(VerticalSlash("vs"), vs=GOOD, blk=GOOD), UnknownSlotError, "its slots are vs"),
    (lambda: call(Sink(3), vs=GOOD), UnknownSlotError, "it has no slots"),
    (lambda: call(VerticalSlash("vs"), vs=torch.zeros(3)), SlotDataError, "takes VSIndices"),
    (lambda: call(Columns("c"), c=torch.zeros(1, 3, 2, dtype=torch.long)), SlotDataError,
     "4, 2 or 1 heads"),
    (lambda: call(Columns("c"), c=torch.zeros(3, 1, 2, dtype=torch.long)), SlotDataError,
     "batch of 3"),
    (lambda: call(Columns("c"), c=torch.zeros(1, 1, 2)), SlotDataError, "int32 or int64"),
    (lambda: call(Columns("c"), c=torch.zeros(2, dtype=torch.long)), SlotDataError, "dimensions"),
    (lambda: call(Blocks("b", 8, 8), b=BlockIndices.from_topk(
        torch.zeros(1, 1, 3, 1, dtype=torch.long), 16, 8)), SlotDataError, "16 x 8"),
    (lambda: call(Blocks("b", 8, 8), b=BlockIndices.from_topk(
        torch.zeros(1, 1, 2, 1, dtype=torch.long), 8, 8)), SlotDataError, "3 rows of blocks"),
    (lambda: call(Document("d"), d=Documents.from_ids(torch.zeros(5, dtype=torch.long))),
     SlotDataError, "a document for every key"),
    (lambda: call(PerHead([Sink(1), Full()])), HeadCountError, "4 masks"),
    (lambda: call(Columns("x") | VerticalSlash("x")), SlotDataError, "another name"),
    (lambda: VerticalSlash("q"), AtomArgumentError, "argument of the call"),
    (lambda: VerticalSlash("vs", "wide"), AtomArgumentError, "block64"),
    (lambda: Blocks("b", 64, 48), AtomArgumentError, "power of two"),
    (lambda: PerHead([]), AtomArgumentError, "one for every query head"),
    (lambda: PerHead([PerHead([Full()])]), AtomArgumentError, "chosen by head once"),
    (lambda: VSIndices(torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 2, 2).int()),
     SlotDataError, "differ"),
    (lambda: BlockIndices.from_mask(torch.zeros(1, 1, 2, 2), 8, 8), SlotDataError, "boolean"),
    (lambda: dense(VerticalSlash("vs"), Shape(4, 4)), MissingSlotError, "VSIndices"),
])
def test_mistakes_are_told(act: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        act()


def test_explain_says_what_it_does_not_know() -> None:
    text = str(maskdsl.compile(Sink(4) | VerticalSlash("vs"), backend="torch").explain(1000))
    assert "3,994 of" in text and "VerticalSlash('vs'): not counted" in text
    assert "mask: its data" in text
