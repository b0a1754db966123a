"""Tile sizes, warps, pipeline stages. A number says where it was measured, or that it was not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from maskdsl.errors import ResourceError

# Live keys per row above which a mask is treated as dense. On an H100 64 query rows are faster for
# about 2000 keys a row, 128 rows for 8000 (docs/benchmarks/sweep.md); the border lies between.
DENSE_WIDTH = 4096

# Bytes of shared memory that one program may use: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"; on AMD the LDS of a compute unit (CDNA 3 and 4 ISA guides)
SHARED_BYTES = {
    "sm_70": 98304, "sm_72": 98304, "sm_75": 65536, "sm_80": 166912, "sm_86": 101376,
    "sm_87": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_103": 232448,
    "sm_120": 101376, "sm_121": 101376, "gfx950": 163840,
}
LEAST_SHARED = {"sm": 101376, "gfx": 65536}  # chips that are not in the table
SLACK = 2048  # bytes: barriers and alignment; at most 1100 were seen
ROW_WORDS = 16  # bytes a row and stage that lists read ahead; two slots took 8 (compiled)


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


def shared_limit(arch: str) -> int:
    """Bytes of shared memory a program may use on a chip; where the chip is not known, those of
    the smallest one known."""
    return SHARED_BYTES.get(arch, LEAST_SHARED["gfx" if arch.startswith("gfx") else "sm"])


def shared_bytes(config: Config, arch: str, head_dim: int, value_dim: int, item_size: int) -> int:
    """An upper bound of the shared memory of the portable kernel, in bytes.

    Read off kernels that Triton 3.6 compiled ahead of time (tests/kernel/test_ahead.py checks it):
    wgmma and tcgen05 read queries and every stage of keys and values from shared memory, and so
    does full float32; the older tensor cores, which sm_12x has too, take one stage into registers,
    but scores pass through on their way to the second product; on AMD queries leave it again.
    """
    d, dv = power_of_two(head_dim), power_of_two(value_dim)
    queries = config.block_m * max(d, dv) * item_size  # or the output, later, in the same place
    keys, values = (config.block_n * dim * item_size for dim in (d, dv))
    scores = config.block_m * config.block_n * item_size
    slack = SLACK + ROW_WORDS * config.block_m * config.stages
    older = config.stages - 1
    if arch.startswith("gfx"):
        return max(queries, max(older * (keys + values), keys, values) + scores) + slack
    if item_size < 4 and (arch.startswith("sm_12") or int(arch[3:]) < 90):
        return queries + max(older, 1) * (keys + values) + scores + slack
    return queries + config.stages * (keys + values) + slack


def power_of_two(n: int) -> int:
    """The smallest power of two that is not smaller than n."""
    return 1 << (n - 1).bit_length()


def fits_chip(config: Config, arch: str, head_dim: int, value_dim: int, item_size: int) -> bool:
    """Whether a config surely fits the chip's shared memory; the interpreter has no limit."""
    return arch == "cpu" or \
        shared_bytes(config, arch, head_dim, value_dim, item_size) <= shared_limit(arch)


def fit_config(config: Config, arch: str, head_dim: int, value_dim: int, item_size: int) -> Config:
    """The config, made smaller until it fits: stages down to two, then keys, then rows, then one
    stage. 16 x 16 tiles of head dimension 256 in float32 fit every chip."""
    while not fits_chip(config, arch, head_dim, value_dim, item_size):
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.block_n > 32:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_m > 64:
            config = replace(config, block_m=config.block_m // 2)
        elif config.stages > 1:
            config = replace(config, stages=1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = replace(config, block_m=config.block_m // 2)
        else:
            raise ResourceError(f"head dimensions {head_dim}/{value_dim} on {arch}",
                                "not even a tile of 16 x 16 fits its shared memory",
                                "smaller head dimensions, or backend='torch'")
    return config


def pick_config(arch: str, head_dim: int, value_dim: int, item_size: int, width: float,
                q_block: int = 0) -> Config:
    """The config for one chip, head size and mask; it fits the chip's shared memory.

    arch       "sm_80", "sm_90", "sm_100", "gfx942", ...; "cpu" for the interpreter
    item_size  bytes of an element
    width      mean live keys per row of a long call
    q_block    query rows that share their lists, where all lists are tables of blocks; else 0
    """
    if arch == "cpu":
        return Config(32, 32, 4, 1)
    return fit_config(_pick(arch, max(head_dim, value_dim), item_size, width, q_block),
                      arch, head_dim, value_dim, item_size)


def _pick(arch: str, size: int, item_size: int, width: float, q_block: int) -> Config:
    """What is fastest as far as known, for the larger head dimension `size`."""
    if arch.startswith("gfx"):
        return _pick_amd(size, item_size)
    if item_size == 4:
        # full float32 runs without tensor cores: the largest tiles that do not spill (compiled)
        return Config(32, 32, 8, 1) if arch == "sm_90" and size > 128 else Config(32, 16, 8, 1)
    if int(arch[3:]) < 90:
        return _pick_ampere(arch, size, width)
    if size > 128:
        # 128 rows spill on both, 64 keys on Blackwell, 4 warps where it has no tcgen05 (compiled)
        if arch == "sm_90":
            return Config(64, 64, 8, 2)
        return Config(64, 32, 8 if arch.startswith("sm_12") else 4, 2)
    if arch.startswith("sm_12"):
        return Config(64, 64, 4, 2 if size <= 64 else 3)  # 128 rows or keys spill (compiled)
    # H100, 32K triangles and 16K dense, bf16 (docs/benchmarks/sweep.md): 427 and 525 TFLOP/s at
    # D = 128, 381 and 459 at D = 64; not measured on Blackwell
    if size <= 64:
        return Config(64, 128, 4, 2) if width >= DENSE_WIDTH else Config(64, 64, 4, 2)
    # Blocks of 128 x 128 on an H100: 472 TFLOP/s with 128 rows, 455 to 465 with 64 (a trial that
    # was not kept)
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


def pick_backward(arch: str, head_dim: int, value_dim: int, item_size: int,
                  more: bool = False, width: float = 0.0,
                  small: bool = False) -> tuple[Config, Config]:
    """The configs of the gradients by query tile and by key tile: large tiles whose loops stay in
    registers (compiled; what is spilled around them costs little); not measured.

    more    lists or kinds of heads take registers of their own
    width   mean live keys per row of a long call
    small   score modifiers, or lists for every row, take even more
    """
    size = max(head_dim, value_dim)
    if arch == "cpu" or not arch.startswith("sm_"):
        return Config(32, 32, 4, 1), Config(32, 32, 4, 1)
    if item_size == 4:
        least = Config(16, 16, 8, 1)
        return (Config(32, 32, 8, 1),) * 2 if size <= 64 else (least, least)
    if size > 128:  # 64 rows spill on sm_90, and 32 take no wgmma
        return Config(32, 32, 8, 1), Config(32, 32, 8, 1)
    if int(arch[3:]) < 90:
        small_keys = more or small or size <= 64
        return Config(32, 64, 8, 2), Config(32, 32, 4, 1) if small_keys else Config(32, 64, 8, 2)
    if arch.startswith("sm_12"):  # 64 rows spill
        return Config(32, 64, 8, 2), Config(32, 64, 8, 1 if more or small else 2)
    if small or (more and arch != "sm_90"):
        return Config(64, 64, 8, 2), Config(32, 64, 8, 1)
    if arch != "sm_90":
        return Config(64, 64, 4, 2), Config(32, 64, 8, 2)
    if more:
        return Config(64, 64, 8, 2), Config(64, 64, 8, 2)
    if width >= DENSE_WIDTH:
        return Config(128, 64, 8, 2), Config(64, 128, 8, 2)
    return Config(64, 64, 4, 2), Config(64, 64, 4, 2)


def score_config(config: Config) -> Config:
    """The config of the kernels for score modifiers' data: no more rows than keys a tile. Small
    tiles do not spill (compiled)."""
    block = min(config.block_n, 32)
    return replace(config, block_m=min(config.block_m, 16), block_n=block, warps=4, stages=1)
