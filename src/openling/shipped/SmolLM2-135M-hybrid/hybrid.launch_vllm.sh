#!/bin/sh
# Serves this folder with vLLM; flags checked against 0.33.0. Written by openling.
# Tensor-parallel sizes that fit: 1, 3.
exec vllm serve "$(dirname -- "$0")" \
  --host 127.0.0.1 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --trust-remote-code \
  --mamba-cache-dtype float32 "$@"
