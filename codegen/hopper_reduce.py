# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Adding shared memory to global memory by TMA, which Triton 3.6 can build and Gluon does not name.

The only place that reaches behind Gluon's own names. Emitted files import it; the import goes well
with any Triton, so that kernels which do not add are not concerned.
"""

from __future__ import annotations

from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language._core import builtin

from maskdsl.errors import BackendError

KIND = getattr(getattr(ir, "DESCRIPTOR_REDUCE_KIND", None), "ADD", None)
METHOD = "create_async_tma_reduce"


def refuse_adding() -> str:
    """Why TMA cannot add with the Triton that is installed; "" where it can."""
    if KIND is None or not hasattr(getattr(gluon_ir, "GluonOpBuilder", None), METHOD):
        return f"this Triton cannot add by TMA (its Gluon builder has no {METHOD})"
    return ""


@builtin
def async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """As `tma.async_copy_shared_to_global`, but adds; `tma.store_wait` waits for it, too."""
    if refuse_adding():
        raise BackendError("backward='atomic'", refuse_adding(), "backward=True")
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    getattr(_semantic.builder, METHOD)(KIND, tensor_desc.handle, coord, src.handle)
