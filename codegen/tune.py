"""Tile sizes, warps, pipeline stages. A number says where it was measured, or that it was not."""

from __future__ import annotations

from dataclasses import dataclass

from maskdsl.errors import ResourceError

# Live keys per row above which a mask is treated as dense. On an H100 64 query rows are faster for
# about 2000 keys a row, 128 rows for 8000 (docs/benchmarks/sweep.md); the border lies between.
DENSE_WIDTH = 4096


@dataclass(frozen=True, slots=True)
class Config:
    """How one kernel is cut: tile sizes in tokens, warps per program, software pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def check(self) -> Config:
        """This config, or a ResourceError when a tile size is not one Triton can take."""
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 16 or size > 256 or size & (size - 1):
                raise ResourceError(f"tile with {name}={size!r}", "a power of two in 16..256 is "
                                    "needed", "tile=(64, 64)")
        if self.warps not in (1, 2, 4, 8) or not 1 <= self.stages <= 8:
            raise ResourceError(f"warps={self.warps}, stages={self.stages}",
                                "warps must be 1, 2, 4 or 8, and stages 1..8", "warps=4, stages=3")
        return self


def pick_config(arch: str, head_dim: int, value_dim: int, item_size: int, width: float,
                q_block: int = 0) -> Config:
    """The config for one chip, head size and mask.

    arch       "sm_80", "sm_90", "sm_100", "gfx942", ...; "cpu" for the interpreter
    item_size  bytes of an element
    width      mean live keys per row of a long call
    q_block    query rows that share their lists, where all lists are tables of blocks; else 0
    """
    if arch == "cpu":
        return Config(32, 32, 4, 1)
    size = max(head_dim, value_dim)
    if arch.startswith("gfx"):
        return _pick_amd(size, item_size)
    if item_size == 4:
        # full float32 runs without tensor cores: the largest tiles that do not spill (compiled)
        return Config(32, 32, 8, 1) if arch == "sm_90" and size > 128 else Config(32, 16, 8, 1)
    if int(arch[3:]) < 90:
        return _pick_ampere(arch, size, width)
    if size > 128:
        # 128 rows spill on both, 64 keys on Blackwell (compiled)
        return Config(64, 64, 8, 2) if arch == "sm_90" else Config(64, 32, 4, 2)
    # H100, 32K triangles and 16K dense, bf16 (docs/benchmarks/sweep.md): 427 and 525 TFLOP/s at
    # D = 128, 381 and 459 at D = 64; not measured on Blackwell
    if size <= 64:
        return Config(64, 128, 4, 2) if width >= DENSE_WIDTH else Config(64, 64, 4, 2)
    # Blocks of 128 x 128 on an H100: 472 TFLOP/s with 128 rows, 455 to 465 with 64
    tall = width >= DENSE_WIDTH or (q_block and q_block % 128 == 0)
    return Config(128, 64, 8, 3) if tall else Config(64, 64, 4, 3)


def _pick_ampere(arch: str, size: int, width: float) -> Config:
    """The largest tiles that do not spill (compiled); 99 KB of shared memory beyond sm_80."""
    if size > 128:
        return Config(64, 32, 8, 2)
    stages = 3 if arch == "sm_80" else 2
    if width >= DENSE_WIDTH and size & (size - 1) == 0:
        return Config(128, 64, 8, stages)
    return Config(64, 32, 4, stages)


def _pick_amd(size: int, item_size: int) -> Config:
    """64 KB of shared memory: K and V once, no deep pipeline; no spills (compiled)."""
    if size > 128 or item_size == 4:
        return Config(32, 32, 4, 1)
    return Config(64, 64, 4, 1)


def config_for_tile(tile: tuple[int, int]) -> Config:
    """The config of a tile the user chose; 4 warps for up to 64 rows, 8 beyond."""
    try:
        block_m, block_n = tile
    except (TypeError, ValueError):
        raise ResourceError(f"tile={tile!r}", "not a pair (queries, keys)",
                            "tile=(64, 64)") from None
    warps = 8 if isinstance(block_m, int) and block_m > 64 else 4
    return Config(block_m, block_n, warps, 2).check()


def pick_backward(arch: str, head_dim: int, value_dim: int,
                  item_size: int) -> tuple[Config, Config]:
    """The configs of the gradients by query tile and by key tile: large tiles that do not spill
    (compiled for sm_80 and sm_90); not measured."""
    size = max(head_dim, value_dim)
    if arch == "cpu" or not arch.startswith("sm_"):
        return Config(32, 32, 4, 1), Config(32, 32, 4, 1)
    if item_size == 4:
        small = Config(16, 16, 8, 1)
        return (Config(32, 32, 8, 1),) * 2 if size <= 64 else (small, small)
    if size > 128:  # 64 rows spill on sm_90, and 32 take no wgmma
        return Config(32, 32, 8, 1), Config(32, 32, 8, 1)
    if int(arch[3:]) < 90:
        return Config(32, 64, 8, 2), Config(32, 32, 4, 1) if size <= 64 else Config(32, 64, 8, 2)
    # a second stage of the walk by key tile spills on sm_90: dK, dV, P and dS fill the registers
    return Config(64, 64, 4, 2), Config(32, 64, 4 if size <= 64 else 8, 1)
