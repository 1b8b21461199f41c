"""The engine's thread seen from an event loop."""

import asyncio

import pytest
import tiny_engine as tiny

from openling.errors import UserError
from openling.serve.async_engine import AsyncEngine
from openling.serve.engine_config import QueueFull


def with_engine(engine, body):
    async def main():
        served = AsyncEngine(engine)
        served.start()
        try:
            return await asyncio.wait_for(body(served), 60)
        finally:
            await served.stop()
            assert not served.healthy
            engine.check_integrity()

    return asyncio.run(main())


def test_calls_that_wait_when_the_thread_dies_are_told():
    e = tiny.engine(tiny.model())

    def die(engine):
        raise SystemExit("gone")

    async def main():
        served = AsyncEngine(e)
        served.start()
        calls = [asyncio.create_task(served.call(f)) for f in (die, lambda engine: 1)]
        for call in calls:
            with pytest.raises(Exception, match="died"):
                await call

    asyncio.run(asyncio.wait_for(main(), 60))


async def collect(served, request):
    return [output async for output in served.generate(request)]


def test_replies_stream_and_equal_generate():
    m = tiny.model()
    requests = [tiny.request(tiny.prompt(n), max_tokens=6) for n in (5, 90, 70)]

    async def body(served):
        return await asyncio.gather(*(collect(served, r) for r in requests))

    for r, outputs in zip(requests, with_engine(tiny.engine(m), body), strict=True):
        assert len(outputs) == 6
        assert tiny.tokens(outputs) == tiny.expected(m, r.prompt_token_ids, 6)


def test_closing_the_iterator_frees_the_request():
    e = tiny.engine(tiny.model())

    async def body(served):
        stream = served.generate(tiny.request(tiny.prompt(70), max_tokens=900))
        await anext(stream)
        await stream.aclose()
        return await served.call(lambda engine: engine.stats())

    stats = with_engine(e, body)
    assert (stats.running, stats.waiting) == (0, 0)


def test_refusals_come_before_the_first_output():
    e = tiny.engine(tiny.model(), max_waiting=1, max_running=1)

    async def body(served):
        with pytest.raises(UserError, match="fit into the context"):
            await collect(served, tiny.request(tiny.prompt(5), max_tokens=5000))
        first = served.generate(tiny.request(tiny.prompt(5), max_tokens=900))
        await anext(first)
        second = asyncio.create_task(collect(served, tiny.request(tiny.prompt(6))))
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull):
            await collect(served, tiny.request(tiny.prompt(7)))
        await first.aclose()
        assert len(await second) == 8

    with_engine(e, body)


def test_an_idle_engine_that_lost_memory_refuses_to_go_on():
    e = tiny.engine(tiny.model())

    async def main():
        e.scheduler.pages.take()  # nobody's
        served = AsyncEngine(e)
        served.start()
        while served.healthy:
            await asyncio.sleep(0.01)
        with pytest.raises(Exception, match="leaked"):
            await collect(served, tiny.request(tiny.prompt(5)))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_dead_thread_fails_every_stream_and_is_not_healthy():
    e = tiny.engine(tiny.model())
    e.step = lambda: 1 / 0

    async def body(served):
        with pytest.raises(Exception, match="died"):
            await collect(served, tiny.request(tiny.prompt(5)))
        assert not served.healthy
        with pytest.raises(Exception, match="does not run"):
            await collect(served, tiny.request(tiny.prompt(5)))

    async def main():
        served = AsyncEngine(e)
        served.start()
        await asyncio.wait_for(body(served), 60)

    asyncio.run(main())
