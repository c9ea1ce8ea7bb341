"""A driver that is a process, as the conformance kit asks one; by the library's own mirror.

With --deaf it does not hear that pages go: it keeps the bytes that it has read.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import mmubus


class Tester:
    def __init__(self, *, deaf: bool) -> None:
        self.stack = AsyncExitStack()
        self.kept: dict[tuple[int, int], bytes] | None = {} if deaf else None

    async def attach(self, address: str, mm: int, name: str, chaos: str) -> dict[str, Any]:
        connected = mmubus.connect(address, name=name, chaos=chaos, reattach=True)
        self.mirror = await (await self.stack.enter_async_context(connected)).mirror(mm)
        return {}

    async def read(self, address: int, length: int) -> dict[str, Any]:
        if self.kept is not None and (address, length) in self.kept:
            return {"data": self.kept[address, length].hex()}
        data = await self.mirror.read(address, length)
        if self.kept is not None:
            self.kept[address, length] = data
        return {"data": data.hex()}

    async def write(self, address: int, data: str) -> dict[str, Any]:
        await self.mirror.write(address, bytes.fromhex(data))
        return {}

    async def leave(self) -> dict[str, Any]:
        await self.stack.aclose()
        return {}


async def answer(tester: Tester, question: dict[str, Any]) -> None:
    number, what = question.pop("n"), question.pop("do")
    try:
        said = await getattr(tester, what)(**question)
    except mmubus.MmuBusError as error:
        said = {"error": str(error)}
    print(json.dumps({"n": number, **said}), flush=True)


async def main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tester = Tester(deaf="--deaf" in sys.argv)
    asked = set()
    while line := await reader.readline():
        question = json.loads(line)
        task = asyncio.create_task(answer(tester, question))
        asked.add(task)
        task.add_done_callback(asked.discard)
        if json.loads(line)["do"] == "leave":
            break
    await asyncio.gather(*asked)


asyncio.run(main())
