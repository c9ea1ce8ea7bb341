"""Hostile input over the wire: malformed and out-of-order messages on every stream and call.

    python tests/robust/fuzz.py 1000000 [SEED]

Some are random bytes, some are messages of the contract with random fields, some are cut or flipped, all in any order.
Beside them a well-behaved client goes on; at the end the server must be up, and only the offenders may have been cut
off: the bystander's session is the one that it began with, and its rounds have all ended in time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc.aio
import mmubus
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from mmu.v1 import address_space_pb2, device_pb2, inspection_pb2, session_pb2

sys.path.insert(0, str(Path(__file__).resolve().parent))
from processes import server

PAGE, BASE = 4096, 0x7000_0000_0000
FILES = (address_space_pb2, device_pb2, inspection_pb2, session_pb2)
SERVICES: list[ServiceDescriptor] = [one for file in FILES for one in file.DESCRIPTOR.services_by_name.values()]
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    PAGE,
    PAGE - 1,
    BASE,
    BASE + PAGE,
    1 << 31,
    (1 << 32) - 1,
    1 << 47,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
STREAM_MESSAGES = 400
LIMIT_S = 10.0


class Fuzzer:
    """Sends messages and counts them. Args: seed: decides all of them."""

    def __init__(self, address: str, seed: int) -> None:
        self.random = Random(seed)
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.sent = 0
        self.tokens: list[str] = [""]

    def message(self, kind: type[Message], depth: int = 0) -> Message:
        """A message with random fields."""
        made = kind()
        for field in kind.DESCRIPTOR.fields:
            if self.random.random() < 0.4 or depth > 3:
                continue
            if field.is_repeated:
                if field.message_type is not None and field.message_type.GetOptions().map_entry:
                    continue
                for _ in range(self.random.choice((0, 1, 1, 2, 5))):
                    if field.message_type is not None:
                        getattr(made, field.name).append(self.message(GetMessageClass(field.message_type), depth + 1))
                    else:
                        getattr(made, field.name).append(self.value(field))
            elif field.message_type is not None:
                getattr(made, field.name).CopyFrom(self.message(GetMessageClass(field.message_type), depth + 1))
            else:
                setattr(made, field.name, self.value(field))
        return made

    def value(self, field: FieldDescriptor) -> object:
        """A value of a field, mostly of those that break things."""
        random = self.random
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return random.randbytes(random.choice((0, 1, 3, 4096)))
            case FieldDescriptor.CPPTYPE_STRING:
                return random.choice(("", "x", "n" * 300, "\u0000", "é", random.choice(self.tokens)))
            case FieldDescriptor.CPPTYPE_BOOL:
                return random.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE:
                return random.choice((0.0, -1.0, 0.05, 1.0, 1e308, float("nan"), float("inf")))
            case FieldDescriptor.CPPTYPE_ENUM:
                return random.choice((0, 1, 2, 3, 5, 12, 99))
            case FieldDescriptor.CPPTYPE_UINT32:
                return random.choice(NUMBERS) & 0xFFFF_FFFF if random.random() < 0.5 else random.randrange(8)
        return random.choice(NUMBERS) if random.random() < 0.7 else random.randrange(8)

    def data(self, kind: type[Message]) -> bytes:
        """The bytes of a message, or what is left of them."""
        random = self.random
        if random.random() < 0.1:
            return random.randbytes(random.randrange(64))
        data = self.message(kind).SerializeToString()
        if random.random() < 0.15 and data:
            at = random.randrange(len(data))
            return data[:at] if random.random() < 0.5 else data[:at] + random.randbytes(1) + data[at + 1 :]
        return data

    async def once(self) -> None:
        """One call, or one stream with many messages."""
        service = self.random.choice(SERVICES)
        rpc = self.random.choice(service.methods)
        path, kind = f"/{service.full_name}/{rpc.name}", GetMessageClass(rpc.input_type)
        metadata = self.random.choice((None, (("mmubus-session", self.random.choice(self.tokens)),)))
        if rpc.client_streaming:
            await self.stream(path, kind, metadata)
            return
        call = self.channel.unary_unary(path)
        self.sent += 1
        try:
            await call(self.data(kind), timeout=LIMIT_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise AssertionError(f"{path} ended with {error}") from error

    async def stream(self, path: str, kind: type[Message], metadata: object) -> None:
        call = self.channel.stream_stream(path)(metadata=metadata)
        reader = asyncio.create_task(self._read(call))
        try:
            if kind is session_pb2.AttachRequest and self.random.random() < 0.8:
                hello = session_pb2.Hello(name="fuzzer", version=1, features=["findings", "within"])
                await call.write(session_pb2.AttachRequest(hello=hello).SerializeToString())
                self.sent += 1
            for _ in range(STREAM_MESSAGES):
                await call.write(self.data(kind))
                self.sent += 1
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it has been cut off, as it should
        await asyncio.wait([reader], timeout=0.05)
        call.cancel()
        await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        while isinstance(data := await call.read(), bytes):
            if len(self.tokens) < 16 and data:
                try:
                    answer = session_pb2.AttachResponse.FromString(data)
                except Exception:  # another stream's answer
                    continue
                if answer.welcome.token:
                    self.tokens.append(answer.welcome.token)


class Bystander:
    """A driver that does everything right, on the same server."""

    def __init__(self) -> None:
        self.rounds = 0
        self.longest_s = 0.0

    async def live(self, address: str, over: asyncio.Event) -> None:
        async with mmubus.connect(address, name="bystander") as bus:
            for _ in range(24):  # the fuzzers' numbers are small: theirs may be what they like, ours is not for them
                mm = await bus.create_mm("bystander")
            await mm.mmap(BASE, 64 * PAGE, flags=mmubus.MAP_PRIVATE | mmubus.MAP_ANONYMOUS | mmubus.MAP_FIXED)
            mirror = await bus.mirror(mm)
            session = bus.session.id
            while not over.is_set():
                page = BASE + self.rounds % 64 * PAGE
                await mm.store(page, b"ours")
                assert await mirror.read(page, 4) == b"ours"
                began = time.monotonic()
                await mm.madvise(page, PAGE, mmubus.MADV_DONTNEED)
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.rounds += 1
                await asyncio.sleep(0.005)
            assert bus.session.id == session, "it was never cut off"
            assert bus.session.fenced is None


async def fuzz(count: int, seed: int, fuzzers_nr: int = 4) -> tuple[int, Bystander]:
    """Returns: messages that were sent, and how the bystander fared."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/s"
        with server(address, "--frames-nr", "65536", "--grace-s", "0.2", "--address-spaces-max", "512") as process:
            over, bystander = asyncio.Event(), Bystander()
            living = asyncio.create_task(bystander.live(address, over))
            fuzzers = [Fuzzer(address, seed * 1000 + number) for number in range(fuzzers_nr)]

            async def work(fuzzer: Fuzzer) -> None:
                while sum(one.sent for one in fuzzers) < count:
                    await fuzzer.once()

            workers = asyncio.gather(*(work(fuzzer) for fuzzer in fuzzers))
            await asyncio.wait([workers, living], return_when=asyncio.FIRST_COMPLETED)
            over.set()
            await living
            await workers
            for fuzzer in fuzzers:
                await fuzzer.channel.close()
            assert process.poll() is None, "the server is up"
    return sum(fuzzer.sent for fuzzer in fuzzers), bystander


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    began = time.monotonic()
    sent, bystander = asyncio.run(fuzz(count, seed))
    print(f"{sent:,} messages in {time.monotonic() - began:.0f} s; the server is up")
    print(f"the bystander had {bystander.rounds:,} rounds, the longest took {bystander.longest_s * 1e3:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
