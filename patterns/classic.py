"""Attention patterns of published models, as pure functions that return mask expressions.

All arguments are in tokens unless a docstring says blocks. p is the absolute query position, k the
key index. "causal=True" and "causal=False" name the argument of `maskdsl.compile` to use; its
default, True, intersects the mask with `Causal()`. Pictures show what is left after that, so those
of causal patterns are drawn under `& Causal()` where the expression itself reaches ahead.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from maskdsl.atoms import Causal, Chunk, FirstQ, LastQ, PrefixLM, Sink, Window
from maskdsl.errors import AtomArgumentError
from maskdsl.expr import Mask
from maskdsl.periodic import Dilated, RandomBlocks, Stride

# How far back "every earlier token" reaches where the atom needs a number, in tokens. Not 2**31:
# kernels compute positions in int32, and p - reach as well as k + reach must stay inside it.
REACH = 2**30


def _size(pattern: str, name: str, value: object, least: int) -> int:
    """`value` as an int; for arguments that a pattern calculates with before an atom sees them."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise AtomArgumentError(f"{pattern}({name}={value!r})",
                                f"{name} must be an integer >= {least}",
                                f"{pattern}({name}={max(least, 4)})")
    return number


def _sizes(pattern: str, name: str, values: Iterable[int]) -> tuple[int, ...]:
    """`values` as a tuple of ints >= 1."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise AtomArgumentError(f"{pattern}({name}={values!r})",
                                f"{name} must be a list of integers",
                                f"{pattern}({name}=[4, 8])")
    return tuple(_size(pattern, f"{name}[{i}]", value, 1) for i, value in enumerate(values))


def sliding_window(window: int) -> Mask:
    """{(p, k) : 0 <= p - k < window}; min(p + 1, window) keys, the query's own among them.

    window  tokens; 4096 in Mistral 7B v0.1, 512 to 4096 in the local layers of Gemma 2 and 3
    Compile with causal=True.

    Mistral's text says "between i - W and i", which is W + 1 keys; the implementations keep W, as
    here.

    Source: Mistral 7B, arXiv 2310.06825, section 2; Gemma 2, arXiv 2408.00118, section 2.

    >>> print(sliding_window(2).picture(4))
    #···
    ##··
    ·##·
    ··##
    """
    return Window(window)


def dilated_window(window: int, step: int) -> Mask:
    """{(p, k) : 0 <= p - k < window * step, (p - k) % step == 0}; `window` keys, `step` apart.

    window  keys a row; they reach window * step tokens back
    step    tokens from one key to the next; 1 is `sliding_window(window)`
    Compile with causal=True: the keys all lie behind the query.

    Source: Longformer, arXiv 2004.05150, section 3.1 (figure 2c), its causal half.

    >>> print(dilated_window(2, 2).picture(5))
    #····
    ·#···
    #·#··
    ·#·#·
    ··#·#
    """
    return Dilated(window, step)


def chunked(size: int = 8192) -> Mask:
    """{(p, k) : p // size == k // size, k <= p}; p % size + 1 keys.

    size  tokens a chunk
    Compile with causal=True; without it every query sees its whole chunk, size keys.

    Source: Llama 4's local layers (`attention_chunk_size` 8192 in its configuration); there is no
    paper.

    >>> print((chunked(2) & Causal()).picture(4))
    #···
    ##··
    ··#·
    ··##
    """
    return Chunk(size)


def prefix_lm(n: int) -> Mask:
    """{(p, k) : k < n or k <= p}; max(n, p + 1) keys.

    n  tokens of the prefix, which sees itself in both directions
    Compile with causal=False; the default would cut the prefix back to causal.

    Source: T5, arXiv 1910.10683, section 3.2.1 (figure 4, right).

    >>> print(prefix_lm(2).picture(4))
    ##··
    ##··
    ###·
    ####
    """
    return PrefixLM(n)


def streaming_llm(n_sink: int = 4, window: int = 2044) -> Mask:
    """{(p, k) : k < n_sink or p - k < window}, causal; min(p + 1, n_sink + window) keys.

    n_sink  tokens at the start that every query keeps
    window  most recent tokens, the query's own among them
    Compile with causal=True. n_sink + window is the paper's cache size: "4+2044" is 2048.

    The mask is the paper's set of keys. StreamingLLM also numbers positions within its cache, which
    is up to the model's position encoding.

    Source: StreamingLLM, arXiv 2309.17453, section 3.2.

    >>> print((streaming_llm(1, 2) & Causal()).picture(5))
    #····
    ##···
    ###··
    #·##·
    #··##
    """
    return Sink(n_sink) | Window(window)


def tri_shape(n_init: int = 128, n_local: int = 3968, n_last: int = 100) -> Mask:
    """{(p, k) : k < n_init or p - k < n_local or p >= total_len - n_last}, causal.

    At most n_init + n_local keys a row; p + 1 keys for the last n_last rows of the prompt. All
    three in tokens; the defaults are MInference's. Compile with causal=True. In chunked prefill
    give `total_len` to the call, or every chunk takes itself for the last.

    The shape of `triangle`, with other sizes and in every layer.

    Source: SCBench, arXiv 2412.10319, section 3.

    >>> print((tri_shape(1, 2, 1) & Causal()).picture(5))
    #····
    ##···
    ###··
    #·##·
    #####
    """
    return Sink(n_init) | Window(n_local) | LastQ(n_last)


def longformer(window: int, n_global: int = 1, *, causal: bool = False) -> Mask:
    """{(p, k) : |p - k| <= window / 2 or k < n_global or p < n_global}.

    window + 1 + n_global keys a row at most, as the paper's window has window / 2 keys on each side
    of the query's own; every key for the first n_global rows.

    window    tokens; even, unless causal
    n_global  tokens at the start that see all and are seen by all; the paper's choice for
              classification is one, [CLS]
    causal    False: the encoder; compile with causal=False.
              True: {(p, k) : 0 <= p - k < window or k < n_global, k <= p}; compile with
              causal=True. The whole window lies behind the query, and global rows need no
              `FirstQ`: all they may see is global.

    Source: Longformer, arXiv 2004.05150, section 3.1.

    >>> print(longformer(2, 1).picture(6))
    ######
    ###···
    ####··
    #·###·
    #··###
    #···##
    """
    width = _size("longformer", "window", window, 0)
    if causal:
        return Sink(n_global) | Window(width)
    if width % 2:
        raise AtomArgumentError(f"longformer(window={width})",
                                "half the window lies on each side, so its size must be even",
                                f"longformer(window={width + 1})")
    return Sink(n_global) | FirstQ(n_global) | Window(width // 2 + 1, width // 2)


def bigbird(block: int = 64, n_window: int = 3, n_global: int = 2, n_random: int = 3,
            seed: int = 0) -> Mask:
    """{(p, k) : |p - k| <= n_window * block // 2, or k or p < n_global * block, or random}.

    About (n_window + n_global + n_random) * block keys a row; every key for the first
    n_global * block rows.

    block     tokens a block
    n_window  width of the sliding window, in blocks; the query's own key comes on top
    n_global  blocks at the start that see all and are seen by all
    n_random  key blocks drawn for every block of queries, 0 to 64
    seed      of the draw; see `RandomBlocks`
    Compile with causal=False: BigBird is an encoder.

    Where this differs from the released code: the window is centred on the token, as in the paper's
    formula A(i, i - w/2 : i + w/2), not on its block; the global blocks are the first ones, not the
    first and the last (the paper leaves the choice open); a random block may fall on a global
    block, on the window, or on another random one.

    Source: BigBird, arXiv 2007.14062, section 2 (BigBird-ITC) and figure 1.

    >>> print(bigbird(2, 1, 1, 1).picture(8))
    ########
    ########
    ####····
    #####···
    ##·###··
    ##··###·
    ##··####
    ##··####
    """
    tokens = _size("bigbird", "block", block, 1)
    half = _size("bigbird", "n_window", n_window, 1) * tokens // 2
    always = _size("bigbird", "n_global", n_global, 0) * tokens
    mask = Sink(always) | FirstQ(always) | Window(half + 1, half)
    if _size("bigbird", "n_random", n_random, 0) == 0:
        return mask
    return mask | RandomBlocks(tokens, n_random, seed)


def sparse_transformer_strided(stride: int) -> Mask:
    """{(p, k) : p - k < stride or (p - k) % stride == 0}, causal; stride + p // stride keys.

    Rows with p < stride see all p + 1 keys.

    stride  tokens; the paper chooses it near the square root of the length
    Compile with causal=True.

    The union of the paper's two factorized heads ("merged head"), A1 = {p - stride, ..., p} and
    A2 = {k : (p - k) mod stride = 0}; the key at p - stride is in both. A2 reaches back about 2**30
    tokens here, as `Dilated` wants an end.

    Source: Sparse Transformer, arXiv 1904.10509, section 4.3 (figure 3b).

    >>> print((sparse_transformer_strided(3) & Causal()).picture(8))
    #·······
    ##······
    ###·····
    ####····
    ·####···
    ··####··
    #··####·
    ·#··####
    """
    step = _size("sparse_transformer_strided", "stride", stride, 1)
    return Window(step) | Dilated(REACH // step, step)


def sparse_transformer_fixed(stride: int, c: int = 1) -> Mask:
    """{(p, k) : p // stride == k // stride or k % stride >= stride - c}, causal.

    p % stride + 1 keys of the query's own chunk, and c of every earlier chunk.

    stride  tokens a chunk; 128 or 256 in the paper
    c       columns at the end of every chunk that all later queries see; 8, 16 or 32 in the paper
    Compile with causal=True.

    The union of the paper's two factorized heads. The formula there, k mod l in {t, ..., l} with
    t = l - c, has c members, as k mod l is never l. A large c makes a slow mask: c atoms.

    Source: Sparse Transformer, arXiv 1904.10509, section 4.3 (figure 3c).

    >>> print((sparse_transformer_fixed(3, 1) & Causal()).picture(8))
    #·······
    ##······
    ###·····
    ··##····
    ··###···
    ··####··
    ··#··##·
    ··#··###
    """
    step = _size("sparse_transformer_fixed", "stride", stride, 1)
    columns = _size("sparse_transformer_fixed", "c", c, 1)
    if columns > step:
        raise AtomArgumentError(f"sparse_transformer_fixed(stride={step}, c={columns})",
                                f"a chunk of {step} tokens has no {columns} columns",
                                f"sparse_transformer_fixed(stride={step}, c={step}) or less")
    return _unite([Chunk(step), *(Stride(step, step - i) for i in range(1, columns + 1))])


def longnet(segments: Iterable[int] = (2048, 4096, 8192, 16384, 32768),
            dilations: Iterable[int] = (1, 2, 4, 6, 12)) -> Mask:
    """{(p, k) : p // w == k // w, (p - k) % r == 0 for one pair (w, r)}, causal.

    At most the sum of ceil(w / r) keys a row, over the pairs.

    segments   segment lengths w, in tokens
    dilations  one dilation rate r for each of them, in tokens
    Compile with causal=True: the expression is causal by itself.

    In the paper a head with offset s attends, in the branch (w, r), from rows s, s + r, s + 2r, ...
    of a segment to the same rows' keys: a row keeps its residue class modulo r. Here every row does
    that, which is the union over the offsets s = 0 .. r - 1 that the paper deals out to its heads.
    One softmax runs over the union of the branches; in the paper's sum of branches, weighted by
    their softmax denominators, a key that is in two branches counts twice.

    Source: LongNet, arXiv 2307.02486, section 3.2 (dilated attention, multi-head offsets).

    >>> print(longnet((2, 8), (1, 2)).picture(8))
    #·······
    ##······
    #·#·····
    ·###····
    #·#·#···
    ·#·###··
    #·#·#·#·
    ·#·#·###
    """
    lengths = _sizes("longnet", "segments", segments)
    rates = _sizes("longnet", "dilations", dilations)
    if not 0 < len(lengths) == len(rates):
        raise AtomArgumentError(f"longnet({segments!r}, {dilations!r})",
                                "needs one dilation for each segment length, and at least one pair",
                                "longnet((2048, 4096), (1, 2))")
    return _unite([_longnet_branch(w, r) for w, r in zip(lengths, rates, strict=True)])


def _longnet_branch(segment: int, dilation: int) -> Mask:
    """One pair (w, r): every r-th key back from the query, inside its segment."""
    if dilation == 1:  # the same set without a remainder to test, so its tiles can be free of masks
        return Chunk(segment) & Causal()
    return Chunk(segment) & Dilated(-(-segment // dilation), dilation)


def _unite(masks: list[Mask]) -> Mask:
    result = masks[0]
    for mask in masks[1:]:
        result = result | mask
    return result
