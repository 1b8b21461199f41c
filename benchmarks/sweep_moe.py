"""Times every form and tile of the experts' products at the goal's shape, then the rest of the layer and decoding.

    python benchmarks/sweep_moe.py [--seconds 85] [--only gate_up,d_act,...] [--all]

Prints, per product, microseconds and TFLOP/s of each candidate, best first, beside torch's grouped_mm on copies that exist
already, and how far the first result of a form is from the portable one. Compiling takes most of the time. Write the winners into
`FORMS` (kernels/moe_ops.py), `TILES` (moe_gemm.py), `RINGS` (moe_hopper_parts.py), `GATE_UP` and `DOWN` (moe_decode.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from statistics import median

import torch

from openling.bench.cases_moe import CHOICE, Layer, Work, make_layer, make_work, products
from openling.ops import kernels
from openling.ops.kernels import (
    moe_decode,
    moe_gemm,
    moe_hopper,
    moe_hopper_back,
    moe_hopper_parts,
    moe_hopper_router,
    moe_ops,
    moe_route,
    moe_sort,
)
from openling.ops.moe import moe

SPEC = moe_route.RouteSpec(score_function="sigmoid", norm_topk_prob=True, **CHOICE)
TOTAL = ("gate_up", "down", "d_act", "d_x", "d_down", "d_gate_up")


def microseconds(call: Callable[[], object], runs: int = 5) -> float:
    """Median of single runs after two to warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return median(times)


def in_graph(call: Callable[[], object], calls: int = 32) -> float:
    """Microseconds per call, captured in one CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return microseconds(graph.replay) / calls


def forms(name: str, *, every: bool) -> Iterator[tuple[str, Callable[..., object]]]:
    """The chosen ring and tile of each form, then, where every candidate is wanted, the others."""
    hopper = getattr(moe_hopper, name, None) or getattr(moe_hopper_back, name)
    portable = getattr(moe_gemm, name)
    yield f"hopper {moe_hopper_parts.RINGS[name]}", hopper
    yield f"portable {moe_gemm.TILES[name]}", portable
    if every:
        for ring in moe_hopper_parts.candidates():
            yield f"hopper {ring}", lambda *a, ring=ring, **k: hopper(*a, **k, ring=ring)
        for tile in moe_gemm.candidates(name):
            yield f"portable {tile}", lambda *a, tile=tile, **k: portable(*a, **k, tile=tile)


def first_tensors(result: object) -> list[torch.Tensor]:
    """The results as a list."""
    return [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]


def sweep_product(name: str, layer: Layer, work: Work, clock: Callable[[], bool], *, every: bool) -> float:
    """Prints all candidates of a product; the best time in µs."""
    call, peer, flops = products(layer, work)[name]
    rows = int(work.s.start_E[-1])
    expected = [t.float() for t in first_tensors(call(getattr(moe_gemm, name)))]
    print(f"\n{name}: grouped_mm {report(microseconds(peer), flops)}", flush=True)
    found: list[tuple[float, str]] = []
    seen = set()
    for label, form in forms(name, every=every):
        if clock():
            print("  (time is up)")
            break
        try:
            if (kind := label.split()[0]) not in seen:
                seen.add(kind)
                worst = 0.0
                for a, b in zip(first_tensors(call(form)), expected, strict=True):
                    if a.shape == b.shape and a.dtype != torch.float32:
                        part = slice(rows) if a.shape[0] == work.s.entry_R.numel() else slice(None)
                        worst = max(worst, ((a[part].float() - b[part]).norm() / b[part].norm()).item())
                print(f"  {kind}: off by {worst:.1e} from the portable form", flush=True)
            found.append((microseconds(partial(call, form)), label))
        except Exception as error:
            print(f"  {label}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
    for us, label in sorted(found):
        print(f"  {report(us, flops)}  {label}", flush=True)
    return min(us for us, _ in found)


def report(us: float, flops: int) -> str:
    """Time and rate."""
    return f"{us:8.0f} us {flops / us * 1e-6:5.0f} TFLOP/s"


def rest_of_layer(layer: Layer) -> dict[str, float]:
    """Router, sorting and sums, in µs."""
    x, router = layer.x, layer.router
    tokens = x.shape[0]
    spec = SPEC
    terms = moe_route.weight_terms(router, x.dtype)
    logits = moe_route.route_logits(x, terms)
    weight, index = moe_route.choose(logits, layer.bias, spec)
    s = moe_sort.sort_tokens(index, router.shape[0])
    rows = torch.randn(s.entry_R.numel(), x.shape[1], device=x.device, dtype=x.dtype)
    dlogits = moe_route.route_dlogits(weight, logits, index, spec, x.dtype)
    half = router.to(x.dtype)
    timed = {
        "terms": lambda: moe_route.weight_terms(router, x.dtype),
        "sort": lambda: moe_sort.sort_tokens(index, router.shape[0]),
        "sum_rows": lambda: moe_sort.sum_rows(rows, s.row_P, tokens, weight),
        "dlogits": lambda: moe_route.route_dlogits(weight, logits, index, spec, x.dtype),
        "dweight": lambda: moe_route.route_dweight(dlogits, x, torch.float32),
        "gather_sum": lambda: moe_sort.gather_sum(rows.new_zeros(2, rows.shape[0], dtype=torch.float32), s.row_P, weight.shape),
    }
    times = {name: in_graph(call, 4) for name, call in timed.items()}  # eager, the small ones would show the host
    variants: dict[str, tuple[object, dict]] = {
        "logits": (
            f"hopper {moe_hopper_router.LOGITS}",
            {t: lambda t=t: moe_route.route_logits(x, terms, t) for t in moe_route.logits_candidates()},
        ),
        "choose": (
            moe_route.CHOOSE,
            {t: lambda t=t: moe_route.choose(logits, layer.bias, spec, t) for t in ((2048, 4), (1024, 1), (512, 1), (4096, 4))},
        ),
        "sum_rows_routed": (
            moe_sort.SumTile(),
            {t: lambda t=t: moe_sort.sum_rows_routed(rows, s.row_P, dlogits[0], half, t) for t in moe_sort.sum_candidates()},
        ),
    }
    for ring in (moe_hopper_router.LOGITS, moe_hopper_parts.Ring(4, 0), moe_hopper_parts.Ring(3, 0)):
        variants["logits"][1][f"hopper {ring}"] = lambda ring=ring: moe_hopper_router.route_logits(x, terms, ring)
    for ring in (moe_hopper_router.DWEIGHT, moe_hopper_parts.Ring(4, 0), moe_hopper_parts.Ring(3, 0)):
        variants.setdefault("dweight", (f"hopper {moe_hopper_router.DWEIGHT}", {"portable": timed["dweight"]}))
        variants["dweight"][1][f"hopper {ring}"] = lambda ring=ring: moe_hopper_router.route_dweight(
            dlogits, x, torch.float32, ring
        )
    for name, (chosen, calls) in variants.items():
        found = {tile: in_graph(call, 4) for tile, call in calls.items()}
        for tile, us in found.items():
            print(f"  {name} {us:7.0f} us  {tile}{' (chosen)' if tile == chosen else ''}", flush=True)
        times[name] = min(found.values())
    print(
        "  " + ", ".join(f"{name} {us:.0f}" for name, us in times.items()) + f" us: {sum(times.values()):.0f} in all", flush=True
    )
    return times


def sweep_decode(layer: Layer, clock: Callable[[], bool]) -> None:
    """Streams of weights for 1, 8 and 32 tokens: the whole in a graph, then each product with each tile."""
    weights = (layer.gate, layer.up, layer.down)
    for tokens in (1, 8, 32):
        batches = [layer.x[i * tokens : (i + 1) * tokens] for i in range(max(2, 64 // tokens))]
        lists = [moe_decode.route_few(x, layer.router, layer.bias, SPEC) for x in batches]
        hit = sum(listed.index_Nk.unique().numel() for listed in lists) / len(lists)
        of_all = 3 * hit * layer.gate[0].nbytes

        def timed(call: Callable[..., object], items: list) -> float:
            turn = cycle(items)
            return in_graph(lambda: call(next(turn)))

        us = timed(lambda x: moe(x, *layer.tensors[1:], **CHOICE), batches)
        print(f"  {tokens} tokens, {hit:.0f} experts: {us:.1f} us, {of_all / us * 1e-6:.2f} TB/s", flush=True)
        us = timed(lambda x: moe_decode.route_few(x, layer.router, layer.bias, SPEC), batches)
        print(f"    router and plan {us:.1f} us", flush=True)
        pairs = [*zip(batches, lists, strict=True)]
        for tile in moe_decode.candidates():
            if clock():
                return
            both = [
                timed(lambda p, tiles=tiles: moe_decode.experts_few(p[0], p[1], *weights, tiles=tiles), pairs)
                for tiles in ((tile, moe_decode.DOWN), (moe_decode.GATE_UP, tile))
            ]
            print(f"    as gate_up {both[0]:6.1f} us, as down {both[1]:6.1f} us  {tile}", flush=True)


def main() -> None:
    """Sweep what was asked for, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--only", default=",".join((*TOTAL, "rest", "decode")))
    parser.add_argument("--all", action="store_true", help="every ring and tile of the products, not only the chosen ones")
    args = parser.parse_args()
    chosen = args.only.split(",")
    started = time.monotonic()

    def over() -> bool:
        return time.monotonic() - started > args.seconds

    torch.manual_seed(0)
    layer = make_layer(32768, 2048, 512, 256)
    print(f"{torch.cuda.get_device_name()}, {layer.name()}; kernels: {kernels.__name__}")
    wanted = dict(moe_ops.FORMS)
    moe_ops.FORMS.update(dict.fromkeys(TOTAL, "portable"))  # the inputs must not come from what is to be judged
    work = make_work(layer)
    moe_ops.FORMS.update(wanted)
    total = sum(sweep_product(name, layer, work, over, every=args.all) for name in TOTAL if name in chosen and not over())
    del work
    if "rest" in chosen and not over():
        print("\nrest of the layer")
        total += sum(rest_of_layer(layer).values())
    if set(chosen) >= {*TOTAL, "rest"} and not over():
        print(f"\nsum of the best {total:.0f} us: {3 * layer.flops / total * 1e-6:.0f} TFLOP/s (goal 517)")
    if "decode" in chosen and not over():
        print("\ndecoding")
        sweep_decode(layer, over)
    print(f"\n{time.monotonic() - started:.0f} s; products run as {moe_ops.FORMS}")


if __name__ == "__main__":
    main()
