"""The Triangle pattern of TriangleMix."""

from __future__ import annotations

from maskdsl.atoms import LastQ, Sink, Window
from maskdsl.expr import Mask


def triangle(sink: int = 8, window: int = 512, last: int = 128) -> Mask:
    """{(p, k) : k < sink or p - k < window or p >= total_len - last}, causal.

    At most sink + window keys a row; p + 1 keys for the last `last` rows of the prompt. All three
    in tokens; the defaults are those of the paper and of MInference's code. Compile it with
    causal=True, the default. In chunked prefill give `total_len` to the call.

    `window` counts the query's own key, as MInference's code does; the paper's formula,
    i - j <= window, would keep one key more. TriangleMix uses this pattern in some layers and full
    causal attention in the others, so which layers get it is for the model to say.

    Source: TriangleMix, arXiv 2507.21526, section 3.

    >>> from maskdsl.atoms import Causal
    >>> print((triangle(1, 2, 2) & Causal()).picture(7))
    #······
    ##·····
    ###····
    #·##···
    #··##··
    ######·
    #######
    """
    return Sink(sink) | Window(window) | LastQ(last)
