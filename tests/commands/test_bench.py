"""`openling bench kernels` on small made-up cases: goals, the table, the results file, failures, choosing operations."""

from __future__ import annotations

import json
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from openling.bench import kernels, timing
from openling.bench.case import Case, Floor, Goal, Rates
from openling.cli import main

OPS = ("sleep", "wait", "broken", "add", "slow")
FAST = timing.Effort(rounds=2, warmup_ms=1, cuda_ms=1, cpu_ms=2, cpu_calls=2)


def sleeping(ms: float) -> Callable[[], None]:
    return lambda: time.sleep(ms * 1e-3)


def failing() -> None:
    raise ValueError("the state has the wrong shape\nsecond line")


def two_cases(quick: bool) -> Iterator[Case]:
    floor = Floor(bytes=1_000_000, flops=2_000)
    yield Case("sleep", f"1 ms, quick {quick}", sleeping(1), sleeping(40), "longer sleep", floor, Goal(ratio=2, us=50_000))
    yield Case("wait", "2 ms", sleeping(2), None, None, floor, Goal(us=1), note="sleep cannot be shorter")


def one_broken(quick: bool) -> Iterator[Case]:
    yield Case("broken", "any", failing, sleeping(1), "sleep", Floor(8), Goal(ratio=1))
    yield from two_cases(quick)
    raise RuntimeError("no more memory")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, object]]]:
    """Runs the verb on the given modules' cases; returns exit code and results."""
    monkeypatch.setattr(kernels, "machine_rates", lambda *_: Rates(copy=1e10, matmul=1e11))
    monkeypatch.setattr(kernels, "FULL", FAST)
    monkeypatch.setattr(kernels, "QUICK", FAST)

    def run(*words: str, **modules: Callable[[bool], Iterator[Case]]) -> tuple[int, dict[str, object]]:
        for name, cases in modules.items():
            module = ModuleType(name)
            module.cases = cases  # type: ignore[attr-defined]
            module.OPS = OPS  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, f"openling.bench.{name}", module)
        monkeypatch.setattr(kernels, "MODULES", dict.fromkeys(modules, "cpu"))
        path = tmp_path / "new folder" / "results.json"
        code = main(["bench", "kernels", "--json", str(path), *words])
        return code, json.loads(path.read_text()) if path.exists() else {}

    return run


@pytest.mark.parametrize(
    ("goal", "peer_us", "met"),
    [
        (Goal(ratio=2.5), 250.0, True),
        (Goal(ratio=2.5), 249.0, False),
        (Goal(ratio=2.5), None, None),
        (Goal(fraction=0.85), None, False),
        (Goal(fraction=0.75), None, True),
        (Goal(us=100), None, True),
        (Goal(us=99), None, False),
        (Goal(ratio=2, us=100), 200.0, True),
        (Goal(ratio=2, us=99), 200.0, False),
        (Goal(ratio=2, us=99), None, False),  # missed whatever the peer would have taken
        (Goal(ratio=2, fraction=0.1), None, None),
    ],
)
def test_goals(goal: Goal, peer_us: float | None, met: bool | None) -> None:
    assert goal.met(us=100.0, peer_us=peer_us, floor_us=80.0) is met


def test_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    rates = Rates(copy=4e12, matmul=8e14)
    assert Floor(bytes=4_000_000).us(rates) == pytest.approx(1.0)
    assert Floor(bytes=4_000_000, flops=8_000_000_000).us(rates) == pytest.approx(10.0)


def test_table_and_results(bench: Callable[..., tuple[int, dict[str, object]]], capsys: pytest.CaptureFixture[str]) -> None:
    code, results = bench("--quick", cases_one=two_cases)
    out = capsys.readouterr().out
    assert code == 0
    assert max(map(len, out.splitlines()[-6:-1])) <= 120
    assert "1 of 2 goals met" in out
    assert "missed: wait, 2 ms: ≤ 1 µs (sleep cannot be shorter)" in out
    assert str(results["command"]).startswith("openling bench kernels --json ")
    assert results["rates"] == {"cpu": {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}}
    first, second = results["rows"]  # type: ignore[misc]
    assert first["name"] == "sleep, 1 ms, quick True, eager"
    assert 1000 < first["value"] < first["peer_value"]
    assert first["unit"] == "us"
    assert first["ratio"] == pytest.approx(first["peer_value"] / first["value"])
    assert first["floor_us"] == pytest.approx(100.0)
    assert first["fraction"] == pytest.approx(100.0 / first["value"])
    assert (first["peer"], first["goal"], first["met"]) == ("longer sleep", "≥ 2x peer, ≤ 50,000 µs", True)
    assert (len(first["rounds"]), len(first["peer_rounds"])) == (2, 2)
    assert (second["peer"], second["ratio"], second["met"], second["why"]) == (None, None, False, "sleep cannot be shorter")


def test_failures_are_rows_and_the_others_go_on(
    bench: Callable[..., tuple[int, dict[str, object]]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = bench(cases_one=one_broken, cases_two=two_cases)
    out = capsys.readouterr().out
    assert code == 1
    assert "Traceback" not in out
    names = [row["name"].split(",")[0] for row in results["rows"]]  # type: ignore[attr-defined]
    assert names == ["broken", "sleep", "wait", "sleep", "wait"]
    row = results["rows"][0]  # type: ignore[index]
    assert (row["value"], row["met"], row["why"]) == (None, False, "ValueError: the state has the wrong shape")
    assert results["broken"] == ["cases_one: RuntimeError: no more memory"]
    assert out.count("failed: broken, any: ValueError: the state has the wrong shape") == 1
    assert "2 of 5 goals met" in out


def test_choosing_operations(
    bench: Callable[..., tuple[int, dict[str, object]]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, results = bench("--op", "Slee", cases_one=two_cases)
    assert code == 0
    assert len(results["rows"]) == 1  # type: ignore[arg-type]
    (tmp_path / "new folder" / "results.json").unlink()
    capsys.readouterr()
    assert bench("--op", "slep", cases_one=two_cases) == (2, {})
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("no operation", "slep", ", ".join(OPS), "nearest:  sleep"):
        assert part in captured.err


def test_what_is_not_asked_for_is_not_built(bench: Callable[..., tuple[int, dict[str, object]]]) -> None:
    def costly(quick: bool) -> Iterator[Case]:
        pytest.fail("built")
        yield from two_cases(quick)

    assert bench("--op", "nothing like it", cases_one=costly)[0] == 2


def test_a_case_that_its_module_does_not_name_is_said(bench: Callable[..., tuple[int, dict[str, object]]]) -> None:
    def unnamed(quick: bool) -> Iterator[Case]:
        yield Case("other", "any", sleeping(1), None, None, Floor(1))

    code, results = bench(cases_one=unnamed)
    assert (code, results["broken"]) == (1, ["cases_one: AssertionError: other is missing in cases_one.OPS"])


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "kernels", "--json", str(tmp_path)]) == 2
    assert "--json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exited:
        main(["bench", "kernel"])
    assert exited.value.code == 2


def test_a_case_is_freed_before_the_next_is_built(bench: Callable[..., tuple[int, dict[str, object]]]) -> None:
    alive: list[bool] = []

    def cases(quick: bool) -> Iterator[Case]:
        previous: weakref.ref[torch.Tensor] | None = None
        for i in range(3):
            alive.append(previous is not None and previous() is not None)
            x = torch.ones(4)
            previous = weakref.ref(x)
            yield Case("add", str(i), lambda x=x: x + 1, None, None, Floor(32))  # type: ignore[misc]
            del x

    assert bench(cases_one=cases)[0] == 0
    assert alive == [False, False, False]


def test_quick_stops_in_time(
    bench: Callable[..., tuple[int, dict[str, object]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "QUICK_SECONDS", 0.02)

    def slow(quick: bool) -> Iterator[Case]:
        for i in range(3):
            yield Case("slow", str(i), sleeping(15), None, None, Floor(1))

    code, results = bench("--quick", cases_one=slow, cases_two=two_cases)
    assert code == 0
    assert len(results["rows"]) == 1  # type: ignore[arg-type]
    assert results["left_out"] == ["cases_one from slow, 1", "cases_two"]
    assert "not reached" in capsys.readouterr().out


def test_rates_of_this_machine() -> None:
    """No CPU copies a terabyte or multiplies at a petaflop per second; none is below a tenth of a gigabyte or gigaflop."""
    rates = timing.machine_rates("cpu", FAST)
    assert 1e8 < rates.copy < 1e12
    assert 1e8 < rates.matmul < 1e15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_and_eager_agree_on_a_long_call() -> None:
    x = torch.ones(2**28, device="cuda")
    times = [
        timing.measure(Case("add", "1 GiB", lambda: x.add_(1), None, None, Floor(2**31), mode=mode), "cuda", FAST).ours_us
        for mode in ("eager", "graph")
    ]
    assert 0.8 < times[0] / times[1] < 1.25


@pytest.mark.parametrize("where", ["file/below.json", "."])
def test_where_nothing_can_be_written_is_said_before_measuring(where, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(kernels, "_run_module", lambda *_: pytest.fail("measured"))
    assert main(["bench", "kernels", "--json", str(tmp_path / where)]) == 2
    assert "--json" in capsys.readouterr().err
