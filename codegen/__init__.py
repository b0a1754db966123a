"""The compiler: spans -> plan -> emitted Triton -> kernel. Imported as `maskdsl.codegen`."""

if __name__ != "maskdsl.codegen":
    raise ImportError(f"import maskdsl.codegen, not {__name__}: the folder is a part of maskdsl")
