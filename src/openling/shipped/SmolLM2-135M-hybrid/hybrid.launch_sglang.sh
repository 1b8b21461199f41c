#!/bin/sh
# Serves this folder with SGLang; flags checked against 0.5.23. Written by openling.
# Tensor-parallel sizes that fit: 1, 3.
exec python -m sglang.launch_server \
  --model-path "$(dirname -- "$0")" \
  --host 127.0.0.1 \
  --port 8000 \
  --tp-size 1 \
  --trust-remote-code \
  --mamba-ssm-dtype float32 "$@"
