"""Random messages on every call and stream: the server answers or ends the offender, and never breaks.

Messages are drawn from the contract's own descriptors, so a new field is attacked without a change here. A seed that
fails is in the test's name.
"""

from __future__ import annotations

import asyncio
import random

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from mmu.v1 import address_space_pb2, device_pb2, inspection_pb2, session_pb2
from patience import LIMIT_S

PAGE = 4096
BASE = 0x7000_0000_0000
FILES = (address_space_pb2, device_pb2, inspection_pb2, session_pb2)
SERVICES = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
BROKEN = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
F = FieldDescriptor


class Attacker:
    """Draws messages: mostly near what makes sense, sometimes far from it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def message(self, kind: Descriptor, depth: int = 0) -> Message:
        made = GetMessageClass(kind)()
        for field in kind.fields:
            if self.rng.random() < 0.2 or depth > 4:
                continue
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                continue
            if field.is_repeated:
                values = [self.value(field, depth) for _ in range(self.rng.choice([0, 1, 2, 3, 6]))]
                getattr(made, field.name).extend(values)
            elif field.message_type is not None:
                getattr(made, field.name).CopyFrom(self.value(field, depth))
            else:
                setattr(made, field.name, self.value(field, depth))
        return made

    def value(self, field: FieldDescriptor, depth: int) -> object:
        rng = self.rng
        if field.type == F.TYPE_MESSAGE:
            return self.message(field.message_type, depth + 1)
        if field.type == F.TYPE_ENUM:
            return rng.choice([*(value.number for value in field.enum_type.values), 77])
        if field.type == F.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type == F.TYPE_STRING:
            return rng.choice(["", "a", "rw-p", "\0\n", "x" * 300])
        if field.type == F.TYPE_BYTES:
            return rng.randbytes(rng.choice([0, 1, 100, 5000]))
        if field.type == F.TYPE_DOUBLE:
            return rng.choice([0.0, 0.01, -1.0, 1e300, float("nan"), float("inf")])
        bits = 32 if field.type in (F.TYPE_UINT32, F.TYPE_INT32) else 64
        far = [2**bits - 1, 2 ** (bits - 1), rng.randrange(2**bits), 5, PAGE + 1]
        near = [0, 1, 2, 3, PAGE, 4 * PAGE]
        if bits == 64:
            near += [BASE + page * PAGE for page in range(3)] * 2
        value = rng.choice(rng.choice([near, near, near, far]))
        return value - 2**32 if field.type == F.TYPE_INT32 and value >= 2**31 else value

    def data(self, kind: Descriptor) -> bytes:
        """A message's bytes, sometimes spoilt."""
        data = self.message(kind).SerializeToString()
        roll = self.rng.random()
        if roll < 0.05:
            return self.rng.randbytes(self.rng.randrange(40))
        if roll < 0.1:
            return data[: self.rng.randrange(len(data) + 1)]
        return data


async def unary(peer, path: str, data: bytes, metadata: tuple) -> None:
    call = peer.channel.unary_unary(path)(data, timeout=LIMIT_S, metadata=metadata)
    assert await call.code() not in BROKEN, (path, data, await call.details())


async def stream(peer, path: str, messages: list[bytes], metadata: tuple) -> None:
    call = peer.channel.stream_stream(path)(metadata=metadata)
    try:
        for data in messages:
            await call.write(data)
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # a write after the end hides the status that the server gave; grpc calls it INTERNAL


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"ack_budget_s": 0.05, "grace_s": 0.05, "lease_s": 1.0, "fault_wait_s": 0.02}])
async def test_random_messages(peer, server, seed: int) -> None:
    attacker = Attacker(seed)
    await peer.space(4, touch=True)
    attached = peer.attach()
    await attached.hello("bystander", ack_budget_s=20, lease_s=300)
    hello = session_pb2.AttachRequest(hello=session_pb2.Hello(version=1, name="attacker")).SerializeToString()
    attacks = []
    for _ in range(8):
        for service in SERVICES:
            for rpc in service.methods:
                path = f"/{service.full_name}/{rpc.name}"
                metadata = attached.metadata if attacker.rng.random() < 0.9 else ()
                if rpc.client_streaming:
                    messages = [attacker.data(rpc.input_type) for _ in range(5)]
                    first = [hello] if rpc.name == "Attach" else []
                    attacks.append(stream(peer, path, first + messages, metadata))
                else:
                    attacks.append(unary(peer, path, attacker.data(rpc.input_type), metadata))
    attacker.rng.shuffle(attacks)
    for at in range(0, len(attacks), 40):
        async with asyncio.timeout(2 * LIMIT_S):
            await asyncio.gather(*attacks[at : at + 40])
        broken = server.server.alarm.broken
        assert not broken.done(), broken.result()
    assert server.server.bus.counters.freed_before_ack == 0
    assert await peer.alive()
    state = {session.name: session.state for session in server.server.bus.sessions.values()}
    assert state["bystander"] == "live"
