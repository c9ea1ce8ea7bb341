"""The pipelined stream: futures, errors as data, back-pressure, the end."""

from __future__ import annotations

import mmubus
import pytest
from fake_server import fake_server
from mmubus import Op


async def test_many_calls_are_answered_whatever_the_order() -> None:
    async with fake_server() as server, mmubus.connect(server.address) as bus, bus.operations(mm=3) as operations:
        futures = [await operations.submit(Op.MUNMAP, number, 1, thread=number % 3) for number in range(1000)]
        results = [await future for future in futures]
        failed = [result for result in results if result.errno_name]
        assert [result.message for result in failed] == ["no mapping"]  # number 666
        assert all(result.ret == number + 1 for number, result in enumerate(results))
        with pytest.raises(mmubus.MmError):
            failed[0].value()


async def test_submit_waits_while_too_much_is_in_flight() -> None:
    async with fake_server() as server, mmubus.connect(server.address) as bus:
        async with bus.operations(in_flight_max=4) as operations:
            for number in range(50):
                await operations.submit(Op.READ, number)
                assert operations.in_flight <= 4
        assert operations.in_flight == 0


async def test_run_gives_the_value_or_raises() -> None:
    async with fake_server() as server, mmubus.connect(server.address) as bus, bus.operations() as operations:
        assert await operations.run(Op.READ, 5, 6) == 11
        with pytest.raises(mmubus.MmError, match="no mapping"):
            await operations.run(Op.READ, 666)


async def test_whoever_waits_when_the_server_goes_is_told() -> None:
    with pytest.raises(mmubus.MmuBusError):
        async with mmubus.connect("unix:/nonexistent/socket") as bus, bus.operations() as operations:
            await (await operations.submit(Op.READ, 5))


async def test_leaving_with_an_error_does_not_wait() -> None:
    async def leave(bus: mmubus.Bus) -> None:
        async with bus.operations() as operations:
            operations.submit_nowait(Op.READ, 5)
            raise KeyError

    async with fake_server() as server, mmubus.connect(server.address) as bus:
        with pytest.raises(KeyError):
            await leave(bus)
