"""Run time: tensors, streams, the loop. Knows no FX pass. Imports as `vericache_compile.runtime`."""

if __name__ != "vericache_compile.runtime":
    raise ImportError(f"import vericache_compile.runtime, not {__name__}: this would be a second copy of it")
