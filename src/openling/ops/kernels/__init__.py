"""Triton kernels, reached only through `openling.ops`. Each matches a plain twin, named in its docstring, and is tested against it."""
