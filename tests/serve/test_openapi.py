"""The OpenAPI document: every route is there, every reference resolves, and what it says of bodies is what the server does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import live
from scripted_engine import says, scripted_service

from openling.config.serve import LimitsConfig, TimeoutsConfig
from openling.serve.auth import Keys
from openling.serve.server import endpoints


@pytest.fixture(scope="module")
def server():
    with live(scripted_service(says("ok")), keys=Keys((), ("admin",))) as running:
        running.client.headers["Authorization"] = "Bearer admin"
        yield running


@pytest.fixture(scope="module")
def document(server):
    return server.client.get("/openapi.json").json


def test_every_route_is_described(document):
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(e.method, e.path.replace(":path}", "}")) for e in endpoints()}
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert {"200", "400", "401", "404", "429", "500", "503"} <= set(operation["responses"])
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_every_reference_resolves(document):
    references = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references
    assert references <= set(document["components"]["schemas"])


def test_required_fields_are_required_and_unknown_ones_refused(server, document):
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if content is None:
            continue
        schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        if schema.get("required"):
            assert server.client.post(path, {}).status == 400, path
        if schema.get("additionalProperties") is False:
            answer = server.client.post(path, {"no_such_parameter": 1})
            assert answer.status == 400, path
            assert "no_such_parameter" in answer.body.decode() or "required" in answer.body.decode()


def test_importing_openling_needs_no_server_package_and_serve_says_what_to_install():
    """Modules of the extra are made impossible to import, as on a machine without it."""
    program = """
import sys
from pathlib import Path
ABSENT = ("starlette", "uvicorn", "prometheus_client", "llguidance")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ABSENT else find(name, package)
import openling, openling.serve.engine
from openling.cli import main
sys.exit(main(["serve", "nowhere"]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "starlette, uvicorn, prometheus_client, llguidance" in run.stderr
    assert "pip install 'openling[serve]'" in run.stderr


def test_the_documentation_names_every_route_and_every_bound():
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [
        e.path for e in endpoints() if f"`{e.path.replace(':path}', '}')}`" not in text.replace("POST ", "").replace("GET ", "")
    ]
    for model in (LimitsConfig, TimeoutsConfig):
        for name, field in model.model_fields.items():
            default = f"{field.default:g}" if isinstance(field.default, float) else f"{field.default:,}"
            if f"| `{name}` | {default} | {field.description} |" not in text:
                missing.append(name)
    assert missing == []
