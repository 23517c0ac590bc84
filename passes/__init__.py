"""Compile time: graph in, graph out. No streams, no allocation. Imports as `vericache_compile.passes`."""

if __name__ != "vericache_compile.passes":
    raise ImportError(f"import vericache_compile.passes, not {__name__}: this would be a second copy of it")
