"""`openling bench serving`: a server under load, with the field's measures and formulas.

TTFT: from sending a request to its first token. ITL: between two arrivals of one reply, pooled over all replies. TPOT of a reply:
(E2E - TTFT) / (tokens - 1). E2E: from sending to the last token. Rates are over the whole run; output tokens only, unless said.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openling import environment
from openling.bench.stream_client import HttpError, Server, request, stream
from openling.errors import Failure, UserError

PERCENTILES = (50, 90, 95, 99)
_WORDS = "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were"


@dataclass(frozen=True)
class Load:
    """What is sent. Lengths in tokens; `rate` in requests per second (Poisson), None: as fast as `concurrency` allows."""

    requests: int = 100
    concurrency: int | None = None
    rate: float | None = None
    input_len: int = 128
    output_len: int = 64
    shared_prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("requests", 1), ("input_len", 1), ("output_len", 1), ("shared_prefix", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError("too small", where=f"--{name.replace('_', '-')}", value=value, expected=f"{least} or more")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError("too small", where="--concurrency", value=self.concurrency, expected="1 or more")
        if self.rate is not None and not self.rate > 0:
            raise UserError("a rate is positive", where="--rate", value=self.rate, expected="requests per second")


@dataclass
class Reply:
    """One request's outcome: seconds from sending to each arrival, and the server's own counts."""

    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0]

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return self.arrivals[-1]

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def run_load(server: Server, load: Load) -> tuple[list[Reply], float]:
    """All replies and the seconds that the run took. Raises Failure when there is no server that answers."""
    _allow_connections(load.concurrency or load.requests)
    try:
        model = (await request(server, "GET", "/v1/models"))["data"][0]["id"]
        ids = (await request(server, "POST", "/tokenize", {"model": model, "prompt": _WORDS}))["tokens"]
    except (OSError, HttpError, LookupError) as error:
        raise Failure("the server cannot be asked", where=f"{server.host}:{server.port}", value=error) from error
    rng = random.Random(load.seed)
    shared = rng.choices(ids, k=load.shared_prefix)
    free = asyncio.Semaphore(load.concurrency or load.requests)
    tasks = []
    begun = time.perf_counter()
    for _ in range(load.requests):
        prompt = shared + rng.choices(ids, k=load.input_len)
        body = {"model": model, "prompt": prompt, "max_tokens": load.output_len, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        await free.acquire()
        task = asyncio.create_task(_one(server, body))
        task.add_done_callback(lambda _: free.release())
        tasks.append(task)
        if load.rate:
            await asyncio.sleep(rng.expovariate(load.rate))
    replies = list(await asyncio.gather(*tasks))
    return replies, time.perf_counter() - begun


async def _one(server: Server, body: dict[str, Any]) -> Reply:
    reply = Reply()
    begun = time.perf_counter()
    try:
        async for now, chunk in stream(server, "/v1/completions", body):
            usage = chunk.get("usage") or {}
            made = usage.get("completion_tokens", 0) > reply.output_tokens
            if made or (not usage and any(choice.get("text") for choice in chunk["choices"])):
                reply.arrivals.append(now - begun)
            reply.output_tokens = usage.get("completion_tokens", reply.output_tokens)
            reply.prompt_tokens = usage.get("prompt_tokens", reply.prompt_tokens)
            reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or reply.cached_tokens
        if not reply.arrivals:
            reply.error = "no token came"
    except (OSError, HttpError, LookupError, ValueError) as error:
        reply.error = str(error) or type(error).__name__
    return reply


def _allow_connections(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError("too many connections for this system", where="--concurrency", value=count, expected=f"{hard - 64}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest ranks, as NumPy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(replies: list[Reply], seconds: float) -> list[dict[str, Any]]:
    """Rows for a results file: counts, rates, then mean and percentiles of each measure in ms."""
    good = [reply for reply in replies if reply.error is None]
    output = sum(reply.output_tokens for reply in good)
    prompt = sum(reply.prompt_tokens for reply in good)
    rows: list[dict[str, Any]] = [
        {"name": "requests answered", "value": len(good), "unit": "requests", "goal": str(len(replies))},
        {"name": "requests failed", "value": len(replies) - len(good), "unit": "requests", "goal": "0"},
        {"name": "duration", "value": seconds, "unit": "s"},
        {"name": "request rate", "value": len(good) / seconds, "unit": "requests/s"},
        {"name": "output rate", "value": output / seconds, "unit": "tokens/s"},
        {"name": "input and output rate", "value": (output + prompt) / seconds, "unit": "tokens/s"},
        {"name": "prompt tokens from cache", "value": sum(r.cached_tokens for r in good), "unit": "tokens"},
        {"name": "mean concurrency", "value": sum(reply.e2e for reply in good) / seconds, "unit": "requests"},
    ]
    for row in rows[:2]:
        row["met"] = str(row["value"]) == row["goal"]
    measures = {
        "TTFT": [reply.ttft for reply in good],
        "TPOT": [reply.tpot for reply in good if reply.tpot is not None],
        "ITL": [gap for reply in good for gap in reply.gaps],
        "E2E": [reply.e2e for reply in good],
    }
    for name, values in measures.items():
        if values:
            rows.append({"name": f"{name} mean", "value": 1e3 * sum(values) / len(values), "unit": "ms"})
            rows += [{"name": f"{name} p{p}", "value": 1e3 * percentile(values, p), "unit": "ms"} for p in PERCENTILES]
    return rows


def bench_serving(server: Server, load: Load, path: Path | None, command: str) -> int:
    """Run, print, and write `path`; exit code 1 if any request failed."""
    replies, seconds = asyncio.run(run_load(server, load))
    rows = summarise(replies, seconds)
    print("\n".join(lines(rows)))
    errors = [reply.error for reply in replies if reply.error]
    for error in dict.fromkeys(errors):
        print(f"failed {errors.count(error)} times: {error}")
    if path is not None:
        environment.write_results(path, command, rows)
        print(f"written: {path}")
    return 1 if errors else 0


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Counts and rates one to a line, then a measure to a line."""
    width = max(len(row["name"]) for row in rows)
    text = [f"{row['name']:<{width}}  {row['value']:>12,.1f} {row['unit']}" for row in rows if row["unit"] != "ms"]
    columns = ["mean", *(f"p{p}" for p in PERCENTILES)]
    values = {row["name"]: row["value"] for row in rows if row["unit"] == "ms"}
    text.append(f"{'ms':<{width}}" + "".join(f"{column:>12}" for column in columns))
    for measure in dict.fromkeys(name.split()[0] for name in values):
        text.append(f"{measure:<{width}}" + "".join(f"{values[f'{measure} {column}']:>12,.1f}" for column in columns))
    return text
