"""The model: its configuration, the one model file, the cache, and the counting of parameters, bytes and FLOPs."""
