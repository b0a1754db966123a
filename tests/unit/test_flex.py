"""FlexAttention both ways: masks, block masks, and back."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, dynamic_masks, per_head_masks, slot_data
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import masks, shapes
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, noop_mask

from maskdsl import (
    Band,
    Blocks,
    Causal,
    Chunk,
    Columns,
    Dilated,
    Full,
    KeyRange,
    LastQ,
    Mask,
    PerHead,
    PrefixLM,
    Shape,
    Sink,
    Stride,
    Where,
    Window,
    dense,
    errors,
    from_block_mask,
    from_mask_mod,
)
from maskdsl.trace import TracedInt

BLOCKS = st.sampled_from([(16, 16), (32, 16), (16, 32), (24, 8), (128, 128)])


def all_pairs(mask_mod: Any, batch: int, heads: int, q_len: int, kv_len: int) -> torch.Tensor:
    """bool[batch, heads, q_len, kv_len] of a mask_mod."""
    size = (batch, heads, q_len, kv_len)
    places = [torch.arange(n).view([-1 if i == j else 1 for j in range(4)])
              for i, n in enumerate(size)]
    return torch.as_tensor(mask_mod(*places)).broadcast_to(size)


def listed(counts: torch.Tensor, index: torch.Tensor, columns: int) -> torch.Tensor:
    """bool[..., rows, columns] of one list of a BlockMask; no block may be listed twice."""
    table = torch.zeros(*index.shape[:-1], columns, dtype=torch.int32)
    inside = torch.arange(index.shape[-1]) < counts[..., None]
    table.scatter_add_(-1, index.long(), inside.int())
    assert table.max() <= 1 if table.numel() else True
    return table.bool()


def check_block_mask(block_mask: BlockMask, live: torch.Tensor) -> None:
    """Every live pair is in one listed block, full blocks are whole and live throughout."""
    (rows, keys), (q_len, kv_len) = block_mask.BLOCK_SIZE, live.shape[-2:]
    columns = -(-kv_len // keys)
    part = listed(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    assert not (part & full).any()
    padded = torch.nn.functional.pad(live, (0, -kv_len % keys, 0, -q_len % rows))
    tiles = padded.unflatten(-1, (-1, keys)).unflatten(-3, (-1, rows)).transpose(-2, -3)
    assert (~tiles.flatten(-2).any(-1) | part | full).all()
    assert (tiles.flatten(-2).all(-1) | ~full).all()
    assert block_mask.shape[-2:] == live.shape[-2:]


def within(mask: Mask, shape: Shape) -> bool:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    return bool(shape.q_len and shape.kv_len
                and max(shape.q_offset + shape.q_len, shape.kv_len) <= limit)


@given(masks(), shapes(), BLOCKS)
def test_block_masks_of_random_masks(mask: Mask, shape: Shape, block: tuple[int, int]) -> None:
    if not within(mask, shape):
        return
    made = mask.block_mask(shape.q_len, shape.kv_len, q_offset=shape.q_offset, BLOCK_SIZE=block,
                           total_len=shape.total_len)
    live = dense(mask, shape)
    check_block_mask(made, live)
    assert torch.equal(all_pairs(made.mask_mod, 1, 1, shape.q_len, shape.kv_len), live)


@settings(max_examples=40)
@given(st.one_of(dynamic_masks(), per_head_masks()), shapes(max_len=70), BLOCKS, st.data())
def test_block_masks_with_slots_and_heads(mask: Mask, shape: Shape, block: tuple[int, int],
                                          data: st.DataObject) -> None:
    if not within(mask, shape):
        return
    slots = data.draw(slot_data(mask, shape))
    made = mask.block_mask(shape.q_len, shape.kv_len, q_offset=shape.q_offset, BLOCK_SIZE=block,
                           total_len=shape.total_len, batch=BATCH, heads=HEADS, slots=slots)
    live = dense(mask, shape, BATCH, HEADS, slots=slots)
    check_block_mask(made, live)
    pairs = all_pairs(made.mask_mod, BATCH, HEADS, shape.q_len, shape.kv_len)
    assert torch.equal(pairs, live)


@pytest.mark.parametrize("mask", [
    Causal(), Causal() & Window(200), Sink(3) & Causal() | Window(130), Causal() & Chunk(100),
    PrefixLM(150), Causal() & (Sink(8) | Window(300) | LastQ(64)), Full(), KeyRange(100, 400),
    Window(50, 70), Band(130, 200), ~Window(150) & Causal()])
@pytest.mark.parametrize("lengths", [(1024, 1024), (700, 1000)])
def test_the_lists_are_those_of_create_block_mask(mask: Mask, lengths: tuple[int, int]) -> None:
    ours = mask.block_mask(*lengths)
    theirs = create_block_mask(mask.mask_mod(*lengths), None, None, *lengths, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, columns = getattr(theirs, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts), name
        size = columns.shape[-1]
        assert torch.equal(listed(counts, columns, size),
                           listed(counts, getattr(theirs, f"{name}_indices"), size)), name


def test_no_pair_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(atom: type[Mask]) -> None:
        contains = atom.contains

        def checked(self: Mask, p: Any, k: Any, at: Any) -> Any:
            assert isinstance(p, TracedInt), "the mask was evaluated at pairs"
            return contains(self, p, k, at)

        monkeypatch.setattr(atom, "contains", checked)

    for atom in (Sink, Window, LastQ, Causal):
        watch(atom)
    mask = Causal() & (Sink(4) | Window(2048) | LastQ(64))
    assert mask.block_mask(65536).sparsity() > 90
    with pytest.raises(AssertionError, match="evaluated"):
        mask.mask_mod(256)(0, 0, 0, 0)


def test_mask_mods_are_values() -> None:
    mask = Causal() & (Sink(2) | Window(9) | LastQ(4))
    copy = pickle.loads(pickle.dumps(mask.mask_mod(40)))
    assert torch.equal(all_pairs(copy, 1, 1, 40, 40), dense(mask, Shape(40, 40)))
    assert from_mask_mod(copy) == mask


@pytest.mark.parametrize(("call", "error", "told"), [
    (lambda: LastQ(4).mask_mod(), errors.ShapeError, "q_len"),
    (lambda: Causal().block_mask(64, BLOCK_SIZE=0), errors.ShapeError, "BLOCK_SIZE"),
    (lambda: Causal().block_mask(64, BLOCK_SIZE=(1, 2, 3)), errors.ShapeError, "BLOCK_SIZE"),
    (lambda: PerHead([Full(), Causal()]).block_mask(9, heads=3), errors.HeadCountError, "PerHead"),
    (lambda: Columns("c").block_mask(9), errors.MissingSlotError, "ColumnIndices"),
    (lambda: Columns("c").block_mask(9, slots={"c": torch.zeros(1, 2, 3, dtype=torch.int32)}),
     errors.ShapeError, "heads=2"),
    (lambda: from_mask_mod(3), errors.AtomArgumentError, "not a function"),
    (lambda: from_block_mask(Causal().block_mask(300)[:, :, :1]), errors.SlotDataError, "sliced"),
])
def test_mistakes_are_told(call: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        call()


# --- from FlexAttention ---------------------------------------------------------------------------


@pytest.mark.parametrize(("fn", "mask"), [
    (lambda b, h, q, k: q >= k, Causal()),
    (lambda b, h, q, k: (q >= k) & (q - k <= 8), Window(9)),
    (and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q < k + 9), Window(9)),
    (lambda b, h, q, k: (k < 4) | (q >= k), PrefixLM(4)),
    (lambda b, h, q, k: q // 64 == k // 64, Chunk(64)),
    (lambda b, h, q, k: q // 64 != k // 64, ~Chunk(64)),
    (lambda b, h, q, k: (q // 64 >= k // 64), Causal() | Chunk(64)),
    (lambda b, h, q, k: k % 8 == 3, Stride(8, 3)),
    (lambda b, h, q, k: (k >= 5) & (k < 9), KeyRange(5, 9)),
    (lambda b, h, q, k: q - k == 3, Band(3)),
    (lambda b, h, q, k: torch.abs(q - k) <= 3, Window(4, 3)),
    (lambda b, h, q, k: ~(q < k) * (q - k < 9), Window(9)),
    (lambda b, h, q, k: (q >= k) ^ (k < 4), (Causal() | Sink(4)) - (Causal() & Sink(4))),
    (lambda b, h, q, k: (q >> 4) == (k >> 4), Chunk(16)),
    (lambda b, h, q, k: torch.div(q, 9, rounding_mode="floor") == torch.floor_divide(k, 9),
     Chunk(9)),
    (lambda b, h, q, k: torch.clamp(q - k, min=0) < 4, Window(4, 1 << 29)),
    (lambda b, h, q, k: torch.where(k < 4, q >= 0, q >= k), PrefixLM(4)),
    (lambda b, h, q, k: torch.ones_like(q, dtype=torch.bool), Full()),
    (noop_mask, Full()),
])
def test_functions_become_atoms(fn: Any, mask: Mask) -> None:
    assert torch.equal(dense(from_mask_mod(fn), Shape(90, 90)), dense(mask, Shape(90, 90)))
    assert not any(isinstance(node, Where) for node in from_mask_mod(fn).walk())
    assert len(repr(from_mask_mod(fn))) <= len(repr(mask)) + 45, from_mask_mod(fn)


@given(masks(), shapes())
def test_what_is_read_back_is_the_same_set(mask: Mask, shape: Shape) -> None:
    fn = mask.mask_mod(shape.q_len, shape.kv_len, q_offset=0)
    back = from_mask_mod(lambda b, h, q, k: fn(b, h, q, k))
    square = Shape(shape.q_len, shape.kv_len, 0)
    if within(mask, square):
        assert torch.equal(dense(back, square), dense(mask, square))


def test_what_no_atom_says_stays_a_function() -> None:
    documents = torch.tensor([0, 0, 1, 1, 1, 2])

    def same(b: Any, h: Any, q: Any, k: Any) -> Any:
        return documents[q] == documents[k]

    assert from_mask_mod(same) == Where(same)
    odd = lambda b, h, q, k: (q + k) % 3 == 0
    assert from_mask_mod(odd) == Where(odd)
    by_head = lambda b, h, q, k: q - k <= h
    assert from_mask_mod(by_head) == Where(by_head)


@given(masks(3), st.sampled_from([(64, 64), (90, 130)]), st.sampled_from([16, (32, 16)]))
def test_block_masks_come_back(mask: Mask, lengths: tuple[int, int], block: Any) -> None:
    shape = Shape(*lengths, 0)
    if not within(mask, shape):
        return
    theirs = create_block_mask(mask.mask_mod(*lengths, q_offset=0), None, None, *lengths,
                               device="cpu", BLOCK_SIZE=block)
    back = from_block_mask(theirs)
    assert torch.equal(dense(back.mask, shape, slots=back.slots), dense(mask, shape))


def test_lists_and_function_both_count() -> None:
    """Full blocks are live whatever the function says; a block in no list is dead."""
    index = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    counts = torch.tensor([[[1, 1]]], dtype=torch.int32)
    nothing, everything = counts * 0, counts
    theirs = BlockMask.from_kv_blocks(everything, index, nothing, index, 16,
                                      lambda b, h, q, k: k % 2 == 0)
    mask, slots = from_block_mask(theirs)
    live = dense(mask, Shape(32, 32, 0), slots=slots)[0, 0]
    assert live[0].tolist() == [False] * 16 + [True, False] * 8
    assert live[16].tolist() == [True, False] * 8 + [False] * 16
    assert mask == Blocks("flex_full", 16, 16) | Blocks("flex_part", 16, 16) & Stride(2)


ATTN_GYM = {
    "causal": (lambda m: m.causal_mask, Causal()),
    "window": (lambda m: m.generate_sliding_window(8), Window(9)),
    "prefix_lm": (lambda m: m.generate_prefix_lm_mask(5), PrefixLM(5)),
    "dilated": (lambda m: m.generate_dilated_sliding_window(8, 2), None),
    "natten": (lambda m: m.generate_natten(8, 8, 3, 3), None),
    "tiled_natten": (lambda m: m.generate_tiled_natten(8, 8, 3, 3, 4, 4), None),
    "sta_2d": (lambda m: m.generate_sta_mask_mod_2d((8, 8), (4, 4), (2, 2), 6), None),
    "sta_3d": (lambda m: m.generate_sta_mask_mod_3d((4, 4, 4), (2, 2, 2), (2, 2, 2), 3), None),
    "spatial": (lambda m: m.generate_spatial_head_mask_mod(6, 4, 12, 1), None),
    "temporal": (lambda m: m.generate_temporal_head_mask_mod(6, 4, 12, 1), None),
    "block_diffusion": (lambda m: m.generate_block_diffusion_mask(32, 4), None),
}


@pytest.mark.parametrize("name", ATTN_GYM)
def test_the_masks_of_attention_gym(name: str) -> None:
    """All but those that read tensors are compiled; `None`: no atom says it."""
    from maskdsl.tiles import rasterise

    make, atoms = ATTN_GYM[name]
    fn = make(pytest.importorskip("attn_gym.masks"))
    mask = from_mask_mod(fn)
    if atoms is not None:
        assert mask == atoms
    shape = Shape(64, 64)
    expected = all_pairs(fn, 1, 1, 64, 64)
    assert torch.equal(dense(mask, shape), expected)
    assert (rasterise(mask, shape) == expected[0, 0].numpy()).all()


def test_attention_gym_masks_that_read_tensors() -> None:
    gym = pytest.importorskip("attn_gym.masks")
    offsets = torch.tensor([0, 10, 30, 64])
    doc = gym.generate_doc_mask_mod(gym.causal_mask, offsets)
    far = gym.generate_global_sliding_window(5, torch.arange(64) % 16 == 0)
    for fn in (doc, far):
        mask = from_mask_mod(fn)
        assert mask == Where(fn)
        assert torch.equal(dense(mask, Shape(64, 64)), all_pairs(fn, 1, 1, 64, 64))


def test_dilated_windows_have_an_atom_on_one_side() -> None:
    fn = lambda b, h, q, k: (q >= k) & ((q - k) % 4 == 0) & (q - k < 32)
    expected = dense(Dilated(8, 4), Shape(90, 90))
    assert torch.equal(dense(from_mask_mod(fn), Shape(90, 90)), expected)
