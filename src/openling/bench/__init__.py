"""Benchmarks: each fast operation against a peer in the same run and against the machine's own limits."""
