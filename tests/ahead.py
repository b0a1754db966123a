"""Compile emitted kernels for chips that are not here, and read what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskdsl.atoms import Causal
from maskdsl.codegen.backward import GradientKernels, TritonBackward
from maskdsl.codegen.backward_run import backward_constants, row_constants
from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit import emit_kernels, emit_lister, merge_lists
from maskdsl.codegen.emit_backward import key_parameters, query_parameters
from maskdsl.codegen.emit_rows import row_parameters
from maskdsl.codegen.emit_scores import score_parameters
from maskdsl.codegen.kernel import kernel_constants
from maskdsl.codegen.lists import group_heads, parameters
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan, mean_row_width
from maskdsl.codegen.tune import Config, pick_config, score_config
from maskdsl.expr import Mask
from maskdsl.scores import ScoreMod
from maskdsl.simplify import simplify

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448,
                "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}  # bytes
COPIES_TILES = ("sm_90", "sm_100", "sm_120")  # chips with TMA
WALKS = ("query_gradients", "key_gradients", "column_gradients")
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What a chip's compiler made of a kernel."""

    shared: int  # bytes
    spills: int  # bytes (NVIDIA) or registers (AMD) spilled
    text: str  # PTX or AMD assembly
    in_loops: int = 0  # `local_accesses`, where they were counted


def compile_for(chip: str, mask: Mask, dtype: torch.dtype, head_dim: int, value_dim: int = 0, *,
                causal: bool = True, config: Config | None = None,
                scores: tuple[ScoreMod, ...] = (), tma: bool = True) -> Compiled:
    """Compile the forward kernel of a mask for one chip, in its default config or another;
    tma=False: as for tensors whose tiles the hardware cannot copy."""
    value_dim = value_dim or head_dim
    whole = simplify(Causal() & mask if causal else mask)
    config = config or pick_config(chip, head_dim, value_dim, dtype.itemsize, mean_row_width(whole))
    plans = [replace(make_plan(one, config.block_m, config.block_n), scores=scores)
             for _, one in group_heads(whole)]
    heads = tuple(len(heads) for heads, _ in group_heads(whole) if heads)
    forward = load_module(emit_kernels(tuple(plans), heads)).forward
    use_tma = tma and chip in COPIES_TILES
    constants = kernel_constants(config, dtype, head_dim, value_dim, 16, use_tma, True)
    source = ASTSource(forward, *signature_of(forward, dtype, constants, pointers_of(plans)))
    kernel = triton.compile(source, target=TARGETS[chip],
                            options={"num_warps": config.warps, "num_stages": config.stages})
    text = kernel.asm["ptx" if chip.startswith("sm") else "amdgcn"]
    # several kinds of heads: ptxas serialises the products of their branches (known, not cured)
    return Compiled(kernel.metadata.shared, count_spills(chip, text, bool(heads)), text)


def compile_backward(chip: str, mask: Mask, dtype: torch.dtype, head_dim: int, value_dim: int, *,
                     causal: bool = True, configs: tuple[Config, Config] | None = None,
                     scores: tuple[ScoreMod, ...] = (), tma: bool = True) -> dict[str, Compiled]:
    """Compile the gradients' kernels of a mask for one chip, in their default configs; tma as in
    `compile_for`."""
    backward = TritonBackward(simplify(Causal() & mask if causal else mask), None, scores)
    by_query, by_key = configs or backward.configs(chip, head_dim, value_dim, dtype.itemsize)
    kernels = backward.kernels(by_query, by_key)
    found = {}
    names = ["sum_rows", "query_gradients", "key_gradients", "column_gradients",
             *(f"{what}_gradients{i}" for i in range(len(scores)) for what in ("bias", "table"))]
    for name in names:
        if not hasattr(kernels.module, name):
            continue
        config = {"sum_rows": Config(32, 32, 4, 1), "query_gradients": by_query}.get(name, by_key)
        if name[-1].isdigit():
            config = score_config(by_key)
        constants = row_constants(value_dim, 16, True) if name == "sum_rows" else \
            backward_constants(config, dtype, head_dim, value_dim, 16)
        if name in WALKS:
            constants["USE_TMA"] = tma and chip in COPIES_TILES and config.stages > 1 and \
                name != "column_gradients" and not (scores and name == "key_gradients")
        found[name] = compile_kernel(chip, getattr(kernels.module, name), dtype, constants, config,
                                     kernels, bool(kernels.heads))
    for i, lister in enumerate(kernels.listers):
        if lister is not None:
            constants = {"BLOCK_M": by_key.block_m, "BLOCK_N": by_key.block_n, "CHUNK": 256}
            found[f"list_rows{i}"] = compile_kernel(chip, lister, dtype, constants,
                                                    Config(16, 16, 4, 3), kernels, False)
    return found


def compile_kernel(chip: str, kernel_of: Any, dtype: torch.dtype, constants: dict[str, Any],
                   config: Config, kernels: GradientKernels, serial: bool) -> Compiled:
    """Compile one of the gradients' kernels."""
    plans = tuple(one.plan for one in kernels.by_key)
    found = [*query_parameters(kernels.query.plans, kernels.heads),
             *key_parameters(plans, kernels.heads), *row_parameters(merge_lists(plans))]
    pointers = {p.name for p in found if p.is_pointer} | {"head_order", "head_kinds"}
    source = ASTSource(kernel_of, *signature_of(kernel_of, dtype, constants, pointers))
    kernel = triton.compile(source, target=TARGETS[chip],
                            options={"num_warps": config.warps, "num_stages": config.stages})
    text = kernel.asm["ptx"]
    return Compiled(kernel.metadata.shared, count_spills(chip, text, serial), text,
                    local_accesses(kernel.asm["cubin"]))


def pointers_of(plans: list[Plan]) -> set[str]:
    """The arguments that point to call-time data."""
    found = [*parameters(merge_lists(tuple(plans))), *score_parameters(plans[0].scores)]
    return {p.name for p in found if p.is_pointer} | {"head_order"}


def compile_lister(chip: str, mask: Mask, config: Config) -> Compiled:
    """Compile the kernel that lists a mask's tiles."""
    plan = make_plan(simplify(Causal() & mask), config.block_m, config.block_n)
    lister = load_module(emit_lister(plan)).list_tiles
    constants = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "CHUNK": 256}
    source = ASTSource(lister, *signature_of(lister, torch.bfloat16, constants,
                                             pointers_of([plan])))
    kernel = triton.compile(source, target=TARGETS[chip], options={"num_warps": 4})
    text = kernel.asm["ptx" if chip.startswith("sm") else "amdgcn"]
    return Compiled(kernel.metadata.shared, count_spills(chip, text), text)


def signature_of(forward: Any, dtype: torch.dtype, constants: dict[str, Any],
                 pointers: set[str]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constexprs and attributes as the launcher would specialise them."""
    name = NAMES[dtype]
    types = {"q_ptr": f"*{name}", "k_base": f"*{name}", "v_base": f"*{name}",
             "out_ptr": f"*{name}", "lse_ptr": "*fp32", "scale": "fp32",
             "scale_log2": "fp32", "delta_ptr": "*fp32", "lse_grad_ptr": "*fp32"}
    types |= {f"{which}_ptr": f"*{name}" for which in ("grad", "dq", "dk", "dv")}
    types |= {f"{which}_parts": "*fp32" for which in ("dq", "dk", "dv")}
    types |= {p: "*fp32" if p.startswith(("score", "column_d")) else "*i32" for p in pointers}
    types["data_grad_ptr"] = "*fp32"
    types |= {"union_key_rows": f"*{name}", "union_value_rows": f"*{name}"}
    if constants.get("USE_TMA") and "column_dk" not in forward.arg_names and \
            "dk_ptr" not in forward.arg_names:
        for arg, block in (("k_base", "QK_BLOCK"), ("v_base", "V_BLOCK")):
            types[arg] = f"tensordesc<{name}[1, 1, {constants['BLOCK_N']}, {constants[block]}]>"
    elif constants.get("USE_TMA"):  # of the walk by key tile
        for arg, block in (("q_ptr", "QK_BLOCK"), ("grad_ptr", "V_BLOCK")):
            types[arg] = f"tensordesc<{name}[1, 1, {constants['BLOCK_M']}, {constants[block]}]>"
        for arg in ("lse_ptr", "delta_ptr"):
            types[arg] = f"tensordesc<fp32[1, {constants['BLOCK_M']}]>"
    signature, attributes = {}, {}
    for i, arg in enumerate(forward.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        else:
            signature[arg] = types.get(arg, "i64" if "stride" in arg else "i32")
        if signature[arg].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(forward.arg_names.index(arg),): value for arg, value in constants.items()}
    return signature, places, attributes


def count_spills(chip: str, text: str, serial: bool = False) -> int:
    """Bytes ptxas spills, or registers the AMD compiler does; `serial` allows tensor core products
    that ptxas could not keep in flight."""
    if chip.startswith("gfx"):
        found = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)  # scalar spills go to lanes
        return sum(map(int, found))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        suffix = "a" if chip in COPIES_TILES else ""
        knob = knobs.nvidia.ptxas_blackwell if chip in ("sm_100", "sm_120") else knobs.nvidia.ptxas
        command = [knob.path, "-v", f"--gpu-name={chip}{suffix}", str(path), "-o",
                   str(Path(folder) / "out")]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert serial or "C75" not in run.stderr, run.stderr  # "wgmma serialized" and its kin
    return sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))


def compile_hopper(mask: Mask, dtype: torch.dtype, head_dim: int, value_dim: int, group: int,
                   *, causal: bool = True) -> tuple[Compiled, list[list[str]]]:
    """Compile the Hopper kernel of a mask for `group` query heads a key/value head; also the
    machine instructions of its loops (`loops_of`)."""
    from maskdsl.codegen.hopper import HopperForward, constants_of, pick_hopper

    whole = simplify(Causal() & mask if causal else mask)
    config = pick_hopper(whole, group, head_dim, value_dim)
    _, forward = HopperForward(whole).kernel(config)
    return compile_gluon(forward, dtype, hopper_boxes(config, head_dim, value_dim),
                         constants_of(config, head_dim, value_dim, with_lse=True))


def compile_listed(mask: Mask, dtype: torch.dtype, head_dim: int, value_dim: int, packed: int,
                   *, causal: bool = True) -> tuple[Compiled, list[list[str]]]:
    """Compile the Hopper kernel of a mask with call-time data, `packed` query heads an item."""
    from maskdsl.codegen.emit_hopper_lists import kernel_parameters
    from maskdsl.codegen.hopper import HopperForward, constants_of
    from maskdsl.codegen.hopper_lists import pick_listed

    whole = simplify(Causal() & mask if causal else mask)
    config = pick_listed(whole, packed, packed, head_dim)
    (plan,), forward = HopperForward(whole).kernel(config)
    pointers = {p.name for p in kernel_parameters(plan) if p.is_pointer}
    return compile_gluon(forward, dtype, hopper_boxes(config, head_dim, value_dim),
                         constants_of(config, head_dim, value_dim, with_lse=True), pointers)


def hopper_boxes(config: Any, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
    """The boxes of the forward kernel's descriptors, by name."""
    from maskdsl.codegen.hopper import blocks_of

    q, k, v, k_grain, v_grain, out = blocks_of(config, head_dim, value_dim)
    return {"q_desc": q, "k_desc": k, "v_desc": v, "k_grain_desc": k_grain,
            "v_grain_desc": v_grain, "k_column_desc": k_grain, "v_column_desc": v_grain,
            "out_desc": out}


def compile_hopper_backward(mask: Mask, dtype: torch.dtype, head_dim: int, share: int,
                            by_key: bool, *,
                            causal: bool = True) -> tuple[Compiled, list[list[str]]]:
    """Compile one side of the Hopper backward for `share` query heads a key/value head."""
    from maskdsl.codegen.hopper_backward import blocks_of, constants_of, kernel_of
    from maskdsl.codegen.hopper_backward_cut import KeySide, QuerySide

    whole = simplify(Causal() & mask if causal else mask)
    side = KeySide(whole, share) if by_key else QuerySide(whole, share)
    kernel = kernel_of(side)
    boxes = dict(zip((name for name in kernel.arg_names if name.endswith("desc")),
                     blocks_of(side, head_dim), strict=True))
    return compile_gluon(kernel, dtype, boxes, constants_of(side, head_dim))


def compile_one_pass(mask: Mask, dtype: torch.dtype) -> tuple[Compiled, list[list[str]]]:
    """Compile the one-pass Hopper backward."""
    from maskdsl.codegen.hopper_onepass import OnePass, blocks_of, kernel_of

    side = OnePass(simplify(mask))
    kernel = kernel_of(side)
    boxes = dict(zip((name for name in kernel.arg_names if name.endswith("desc")),
                     blocks_of(), strict=True))
    return compile_gluon(kernel, dtype, boxes, side.constants, frozenset({"counters"}))


def compile_gluon(forward: Any, dtype: torch.dtype, blocks: dict[str, tuple[int, ...]],
                  constants: dict[str, Any],
                  pointers: AbstractSet[str] = frozenset()) -> tuple[Compiled, list[list[str]]]:
    """Compile one Gluon kernel as the launcher would specialise it; blocks: the boxes of its
    descriptors."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    signature, places, attributes = {}, {}, {}
    for i, arg in enumerate(forward.arg_names):
        if arg in blocks:
            layout = gl.NVMMASharedLayout.get_default_for(list(blocks[arg]), element)
            signature[arg] = f"tensordesc<{NAMES[dtype]}{list(blocks[arg])},{layout!r}>"
        elif arg in constants:
            signature[arg], places[(i,)] = "constexpr", constants[arg]
        elif arg.endswith("_ptr") or arg in {"queue", "own_table"} or arg in pointers:
            signature[arg] = "*fp32" if arg.endswith("_ptr") else "*i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[arg] = "fp32" if arg.startswith("scale") else "i32"
    options = {name: constants[name] for name in ("num_warps", "maxnreg")}
    kernel = triton.compile(GluonASTSource(forward, signature, places, attributes),
                            target=TARGETS["sm_90"], options=options)
    text = kernel.asm["ptx"]
    # Triton numbers the barriers of its own warp groups from 0; ours begin at 4
    written = {int(n) for n in re.findall(r"\b(?:bar|barrier)\.sync\s+(\d+)", text)}
    assert written <= {0, 1, 2, 3}, f"hardware barriers {written}"
    return (Compiled(kernel.metadata.shared, count_spills("sm_90", text), text),
            loops_of(kernel.asm["cubin"]))


def loops_of(cubin: bytes) -> list[list[str]]:
    """The innermost loops with tensor core products, each a list of opcodes."""
    found = machine_code(cubin)
    bodies = [[op.split()[0] for place, op in found if start <= place <= stop]
              for start, stop in back_branches(found)]
    return [body for body in bodies if count_products(body) in range(1, 33)]


def local_accesses(cubin: bytes) -> int:
    """The most loads and stores of local memory, where spilled registers go, in one loop with
    tensor core products that holds no other such loop."""
    found = machine_code(cubin)
    spans = [(start, stop) for start, stop in back_branches(found)
             if count_products([op for place, op in found if start <= place <= stop])]
    inner = [a for a in spans if not any(a[0] < b[0] and b[1] < a[1] for b in spans)]
    return max((sum(op.startswith(("LDL", "STL")) for place, op in found if start <= place <= stop)
                for start, stop in inner), default=0)


def machine_code(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction without its predicate) of all instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", str(path)],
                             capture_output=True, text=True, check=True)
    return [(int(at, 16), text) for at, text in
            re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\d+ +)?([^;]+);", run.stdout)]


def back_branches(found: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last address) of all loops."""
    marks = [(re.search(r"^BRA.*0x([0-9a-f]+)", text), at) for at, text in found]
    return [(int(m[1], 16), at) for m, at in marks if m and int(m[1], 16) < at]


def count_products(body: list[str]) -> int:
    """Tensor core instructions."""
    return sum(op.startswith(("HGMMA", "HMMA")) for op in body)
