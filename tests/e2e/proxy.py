"""A TCP proxy that delays: what passes arrives later, in order. For networks in which the kernel can't (netem is rare).

python proxy.py LISTEN_PORT TO_HOST TO_PORT DELAY_S JITTER_S      prints "ready" when it listens
"""

import asyncio
import contextlib
import random
import sys

PIECE_BYTES = 65536
QUEUED_PIECES_MAX = 64


async def carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float, jitter_s: float, dice: random.Random
) -> None:
    """Pass on what is read, each piece delay_s ± jitter_s later, never before the piece ahead of it."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_PIECES_MAX)

    async def read() -> None:
        while True:
            data = await reader.read(PIECE_BYTES)
            await pieces.put((loop.time() + delay_s + dice.uniform(-jitter_s, jitter_s), data))
            if not data:
                return

    reading = asyncio.ensure_future(read())
    try:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
    finally:
        reading.cancel()


async def main(port: int, host: str, to_port: int, delay_s: float, jitter_s: float) -> None:
    """Serve until killed."""
    dice = random.Random(port)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, to_port)
        except OSError:
            writer.close()
            return
        there = carry(reader, far_writer, delay_s, jitter_s, dice)
        back = carry(far_reader, writer, delay_s, jitter_s, dice)
        with contextlib.suppress(OSError):
            await asyncio.gather(there, back)
        for end in (writer, far_writer):
            end.close()

    async with await asyncio.start_server(connected, "127.0.0.1", port):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    _, listen, to_host, to, delay, jitter = sys.argv
    asyncio.run(main(int(listen), to_host, int(to), float(delay), float(jitter)))
