"""`openling serve --dtype`: the named dtype is computed, and the server says so once."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from safetensors.torch import load as load_tensors
from server_process import ADMIN_KEY, served_nano


def test_a_named_dtype_is_served(tmp_path: Path) -> None:
    with served_nano(tmp_path / "nano", "--dtype", "bfloat16") as server:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
        asked = json.dumps({"prompt": "hello", "max_tokens": 3}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", asked, headers)) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] in (1, 2, 3)
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/weights/lm_head.weight", headers=headers)) as answer:
            assert str(load_tensors(answer.read())["lm_head.weight"].dtype) == "torch.bfloat16"
        said = [line for line in server.log if "computed in bfloat16 (--dtype bfloat16)" in line]
        assert len(said) == 1
