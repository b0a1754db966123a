"""Data that arrives at call time: index lists of dynamic sparsity, documents, prefixes.

One class for each kind of slot, with a constructor for every format in use. Entries that name no
block or token of the call (-1, N or more, junk behind a count) are dropped, duplicates count once,
and order is free: an index list is a set. Checks look at shapes, dtypes and devices only, so
nothing here waits for the GPU, except where a docstring says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from maskdsl.errors import SlotDataError

Tensor = torch.Tensor
INTEGERS = (torch.int32, torch.int64)


def check_integers(name: str, value: object, dims: str) -> Tensor:
    """`value` as an int32 or int64 tensor of the dimensions named, or a SlotDataError."""
    rank = dims.count(",") + 1
    if not isinstance(value, torch.Tensor):
        raise SlotDataError(f"{name} of type {type(value).__name__}", "not a torch.Tensor",
                            f"an int32 tensor [{dims}]")
    if value.dtype not in INTEGERS:
        raise SlotDataError(f"{name} of {value.dtype}", "indices are int32 or int64",
                            f"{name}.to(torch.int32)")
    if value.dim() != rank:
        raise SlotDataError(f"{name} {list(value.shape)}", f"{rank} dimensions are needed",
                            f"an int32 tensor [{dims}]")
    return value


def _check_counts(name: str, counts: Tensor | None, index: Tensor) -> None:
    if counts is None:
        return
    if not isinstance(counts, torch.Tensor) or counts.dtype not in INTEGERS or \
            counts.shape != index.shape[:-1] or counts.device != index.device:
        raise SlotDataError(f"{name} with counts {getattr(counts, 'shape', counts)!r}",
                            f"counts must be int32 {list(index.shape[:-1])} on {index.device}, "
                            "one number a list", "counts=None when the lists are padded with -1")


def _check_same(name: str, a: Tensor, b: Tensor, dims: int) -> None:
    if a.shape[:dims] != b.shape[:dims] or a.device != b.device:
        raise SlotDataError(f"{name} of {list(a.shape)} on {a.device} and {list(b.shape)} on "
                            f"{b.device}", "batch, heads or devices differ",
                            "two tensors for the same batch and heads on one device")


def _cut(index: Tensor, counts: Tensor | None) -> Tensor:
    """Entries at and behind the count of their list become -1."""
    if counts is None:
        return index
    place = torch.arange(index.shape[-1], device=index.device)
    return torch.where(place < counts.unsqueeze(-1), index, -1)


def mark(index: Tensor, size: int) -> Tensor:
    """bool[..., size]: True at every entry of `index` [..., n] in [0, size)."""
    inside = torch.where((index >= 0) & (index < size), index, size).long()
    table = torch.zeros(*index.shape[:-1], size + 1, dtype=torch.bool, device=index.device)
    return table.scatter_(-1, inside, True)[..., :size]


@dataclass(frozen=True)
class ListSizes:
    """How long the lists of one slot will be, when there are no lists yet: for a decision before an
    estimator has run. Numbers of entries for each head; what the slot does not have stays 0.

    columns   of `VerticalSlash` and `Columns`
    slashes   of `VerticalSlash`
    blocks    key blocks for each block of rows of `Blocks`, keys for each query of `TokenTopK`
    """

    columns: int = 0
    slashes: int = 0
    blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("columns", "slashes", "blocks"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise SlotDataError(f"ListSizes({name}={size!r})", "a list has 0 entries or more",
                                    f"ListSizes({name}=1000)")


@dataclass(frozen=True, eq=False)
class VSIndices:
    """Vertical and slash indices, for each batch and head.

    vertical  int32 or int64 [B, H, NV], key positions: those columns are live for every query
    slash     int32 or int64 [B, H, NS], distances p - k >= 0: those diagonals are live
    B is the batch size or 1, H the number of query heads, of key/value heads, or 1. -1 and anything
    beyond the call's keys is dropped, duplicates count once.

    Source: MInference, arXiv 2407.02490, section 3.
    """

    vertical: Tensor
    slash: Tensor

    def __post_init__(self) -> None:
        check_integers("vertical", self.vertical, "B, H, NV")
        check_integers("slash", self.slash, "B, H, NS")
        _check_same("vertical and slash", self.vertical, self.slash, 2)

    @property
    def lead(self) -> tuple[int, int]:
        """(batch, heads) of the indices."""
        return self.slash.shape[0], self.slash.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.slash.device


@dataclass(frozen=True, eq=False)
class ColumnIndices:
    """Key columns that every query sees: int32 or int64 [B, H, N]; see `VSIndices` for B and H."""

    index: Tensor

    def __post_init__(self) -> None:
        check_integers("columns", self.index, "B, H, N")

    @property
    def lead(self) -> tuple[int, int]:
        """(batch, heads) of the indices."""
        return self.index.shape[0], self.index.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self.index.device


@dataclass(frozen=True, eq=False)
class BlockIndices:
    """Which key blocks each block of query rows sees. Make one with a `from_` constructor.

    index, row  one of three forms: a boolean mask bool[B, H, Mb, Nb]; a list of key blocks for
                every row of blocks, int[B, H, Mb, K]; pairs of block row and key block, both
                int[B, H, A]
    q_block     query rows of the call in a block (row r of q lies in block r // q_block)
    kv_block    keys in a block
    B is the batch size or 1, H the number of query heads, of key/value heads, or 1.
    """

    index: Tensor
    q_block: int
    kv_block: int
    row: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, q_block: int, kv_block: int) -> BlockIndices:
        """A boolean block mask bool[B, H, Mb, Nb], True = live.

        XAttention, SeerAttention, Block-Sparse-Attention, SpargeAttn's mask_id (its int8 as bool).
        """
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
            raise SlotDataError(f"a mask of {getattr(mask, 'dtype', type(mask).__name__)} "
                                f"{list(getattr(mask, 'shape', ()))}", "not a boolean block mask",
                                "a bool tensor [B, H, Mb, Nb]")
        return cls(mask, q_block, kv_block)

    @classmethod
    def from_topk(cls, index: Tensor, q_block: int, kv_block: int,
                  counts: Tensor | None = None) -> BlockIndices:
        """Lists of key blocks int[B, H, Mb, K], with counts int[B, H, Mb] or sentinels.

        MInference's block-sparse top-k, VSA's q2k_idx and q2k_num, FlashAttention 4's and
        FlexAttention's idx and cnt.
        """
        check_integers("index", index, "B, H, Mb, K")
        _check_counts("index", counts, index)
        return cls(_cut(index, counts), q_block, kv_block)

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor, q_block: int, kv_block: int) -> BlockIndices:
        """Compressed rows: indptr int[B, H, Mb + 1] and indices int[B, H, A]; or int[Mb + 1] and
        int[A], one pattern for all heads (BSR, as scipy and FlashInfer have it)."""
        if isinstance(indptr, torch.Tensor) and indptr.dim() == 1:
            indices = check_integers("indices", indices, "A")[None, None]
            indptr = indptr[None, None]
        check_integers("indptr", indptr, "B, H, Mb + 1")
        check_integers("indices", indices, "B, H, A")
        _check_same("indptr and indices", indptr, indices, 2)
        place = torch.arange(indices.shape[-1], device=indices.device, dtype=indptr.dtype)
        place = place.expand(*indices.shape).contiguous()
        row = torch.searchsorted(indptr.contiguous(), place, right=True) - 1
        # behind the last row's end lies junk: its row is Mb, which no call has
        return cls(indices, q_block, kv_block, row)

    @classmethod
    def from_flat(cls, ids: Tensor, key_blocks: int, q_block: int, kv_block: int,
                  counts: Tensor | None = None) -> BlockIndices:
        """Flattened ids m * key_blocks + n, int[B, H, A], as FlexPrefill makes them."""
        check_integers("ids", ids, "B, H, A")
        _check_counts("ids", counts, ids)
        ids = _cut(ids, counts)
        row = torch.where(ids < 0, -1, torch.div(ids, key_blocks, rounding_mode="floor"))
        return cls(ids % key_blocks, q_block, kv_block, row)

    @classmethod
    def from_block_mask(cls, block_mask: Any) -> tuple[BlockIndices, BlockIndices]:
        """(partial, full) blocks of a FlexAttention `BlockMask`: the union of the two lists, the
        first of which its mask_mod decides. `Blocks("full", ...) | Blocks("part", ...) & Where(fn)`
        is the same mask."""
        q_block, kv_block = block_mask.BLOCK_SIZE
        partial = cls.from_topk(block_mask.kv_indices, q_block, kv_block,
                                block_mask.kv_num_blocks)
        if block_mask.full_kv_num_blocks is None:
            return partial, cls(torch.full_like(block_mask.kv_indices[..., :1], -1), q_block,
                                kv_block)
        return partial, cls.from_topk(block_mask.full_kv_indices, q_block, kv_block,
                                      block_mask.full_kv_num_blocks)

    @classmethod
    def from_nsa(cls, index: Tensor, kv_block: int, counts: Tensor | None = None) -> BlockIndices:
        """NSA's block_indices int[B, L, H, S] (key blocks for every query token and KV head), with
        block_counts int[B, L, H] or any number past the last block as padding."""
        check_integers("index", index, "B, L, H, S")
        _check_counts("index", counts, index)
        return cls(_cut(index, counts).transpose(1, 2), 1, kv_block)

    def __post_init__(self) -> None:
        for name in ("q_block", "kv_block"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise SlotDataError(f"{name}={size!r}", "a block has one token or more",
                                    f"{name}=64")

    @property
    def lead(self) -> tuple[int, int]:
        """(batch, heads) of the indices."""
        return self.index.shape[0], self.index.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.index.device

    def table(self, rows: int, columns: int) -> Tensor:
        """bool[B, H, rows, columns], True at the live blocks."""
        if self.row is not None:
            inside = (self.row >= 0) & (self.row < rows) & (self.index >= 0) & \
                (self.index < columns)
            flat = torch.where(inside, self.row * columns + self.index, -1)
            return mark(flat, rows * columns).view(*self.lead, rows, columns)
        if self.index.dtype == torch.bool:
            return self.index[:, :, :rows, :columns]
        return mark(self.index[:, :, :rows], columns)


class TokenIndices(BlockIndices):
    """Key tokens for every query token: blocks of one token.

    index  int32 or int64 [B, H, Lq, K]; B the batch size or 1, H the number of query heads, of
           key/value heads, or 1
    counts int [B, H, Lq], or None where lists are padded with -1 or any number past the last key
    """

    def __init__(self, index: Tensor, counts: Tensor | None = None) -> None:
        check_integers("index", index, "B, H, Lq, K")
        _check_counts("index", counts, index)
        super().__init__(_cut(index, counts), 1, 1)

    @classmethod
    def from_dsa(cls, index: Tensor, counts: Tensor | None = None) -> TokenIndices:
        """DeepSeek sparse attention's indices int[Lq, H, K] of one sequence, -1 or any number past
        the last key as padding; topk_length int[Lq] as counts."""
        check_integers("index", index, "Lq, H, K")
        counts = None if counts is None else counts[:, None].expand(index.shape[:2])
        _check_counts("index", counts, index)
        return cls(_cut(index, counts).transpose(0, 1)[None])


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the document of every token starts and ends: packed sequences of varying length.

    start, stop  int32 [B, L + 2], keys [start, stop) of position p at place p + 1; one place more
                 at each end for positions outside, which belong to no document
    """

    start: Tensor
    stop: Tensor

    @classmethod
    def from_ids(cls, ids: Tensor, check: bool = True) -> Documents:
        """A document number for every token, int[B, L] or int[L]; negative = padding, which sees
        nothing and is seen by nothing.

        A document is a run of equal numbers. A number that comes back after another one would make
        its document two runs: with check=True (which waits for the GPU once) a SlotDataError.
        """
        if isinstance(ids, torch.Tensor) and ids.dim() == 1:
            ids = ids[None]
        check_integers("ids", ids, "B, L")
        change = torch.ones_like(ids, dtype=torch.bool)
        change[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if check and ids.numel() and _comes_back(ids, change):
            raise SlotDataError("Documents.from_ids(ids)", "the tokens of a document do not follow "
                                "one another", "ids sorted by document, such as [0, 0, 1, 1, 1, 2]")
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        start = torch.where(change, place, 0).cummax(1).values if ids.numel() else place
        after = torch.ones_like(change)
        after[:, :-1] = change[:, 1:]
        ends = torch.where(after, place + 1, ids.shape[1])
        stop = ends.flip(1).cummin(1).values.flip(1) if ids.numel() else place
        padding = ids < 0
        return cls._framed(torch.where(padding, place, start), torch.where(padding, place, stop))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, length: int) -> Documents:
        """Cumulative lengths int[n + 1] from 0 on, as FlashAttention's varlen functions take them;
        tokens from cu_seqlens[-1] to `length` are padding."""
        check_integers("cu_seqlens", cu_seqlens, "n + 1")
        place = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        which = torch.searchsorted(cu_seqlens, place, right=True) - 1
        return cls.from_ids(torch.where(which < cu_seqlens.shape[0] - 1, which, -1)[None],
                            check=False)

    @classmethod
    def _framed(cls, start: Tensor, stop: Tensor) -> Documents:
        length = start.shape[1]
        frame = torch.zeros(start.shape[0], length + 2, dtype=torch.int32, device=start.device)
        frame[:, -1] = length
        edges = frame.clone()
        frame[:, 1:-1], edges[:, 1:-1] = start, stop
        return cls(frame, edges)

    @property
    def lead(self) -> tuple[int, int]:
        """(batch, heads); documents are the same for all heads."""
        return self.start.shape[0], 1

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.start.device

    @property
    def length(self) -> int:
        """Tokens."""
        return self.start.shape[1] - 2


def _comes_back(ids: Tensor, change: Tensor) -> bool:
    """Whether some number starts more than one run (padding may)."""
    runs = torch.where(change & (ids >= 0), ids, -1 - torch.arange(ids.shape[1],
                                                                    device=ids.device))
    ordered = runs.sort(1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


@dataclass(frozen=True, eq=False)
class PrefixLengths:
    """The prefix of every batch entry in tokens: int32 or int64 [B]."""

    lengths: Tensor

    def __post_init__(self) -> None:
        check_integers("lengths", self.lengths, "B")

    @property
    def lead(self) -> tuple[int, int]:
        """(batch, heads); a prefix is the same for all heads."""
        return self.lengths.shape[0], 1

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self.lengths.device
