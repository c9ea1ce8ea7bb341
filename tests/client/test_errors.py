"""What the server says and what is raised."""

from __future__ import annotations

import errno

import mmubus
import pytest
from fake_server import fake_server
from mmubus import errors
from mmubus.channel import grpc
from mmubus.errors import error_from
from mmubus.stream import _error_of


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        ("INVALID_ARGUMENT", "EINVAL", mmubus.MmError),
        ("FAILED_PRECONDITION", "EFAULT", mmubus.MmError),
        ("RESOURCE_EXHAUSTED", "ENOMEM", mmubus.MmError),
        ("NOT_FOUND", "NO_SUCH_REGISTRATION", mmubus.NotFound),
        ("RESOURCE_EXHAUSTED", "LIMIT_REACHED", mmubus.LimitExceeded),
        ("FAILED_PRECONDITION", "FENCED", mmubus.Fenced),
        ("FAILED_PRECONDITION", "STALE_TRANSLATION", mmubus.StaleTranslation),
        ("UNAVAILABLE", "DRAINING", mmubus.Draining),
        ("UNAVAILABLE", "STOPPING", mmubus.Draining),
        ("UNAVAILABLE", "", mmubus.ConnectionLost),
        ("INTERNAL", "", mmubus.ProtocolError),
        ("UNKNOWN", "", mmubus.ConnectionLost),  # "Stream removed": a connection that was reset at the wrong moment
        ("UNKNOWN", "SOMETHING", mmubus.ProtocolError),
        ("INVALID_ARGUMENT", "PROTOCOL_VIOLATION", mmubus.ProtocolError),
        ("PERMISSION_DENIED", "NO_TOKEN", mmubus.CallFailed),
        ("", "EAGAIN", mmubus.MmError),
        ("SOMETHING_NEW", "", mmubus.CallFailed),
    ],
)
def test_the_table(code: str, reason: str, kind: type[Exception]) -> None:
    error = error_from(code, reason, "because", {"value": "1"})
    assert type(error) is kind
    assert "because" in str(error)
    assert isinstance(error, mmubus.MmuBusError)


def test_an_mm_error_has_python_s_number() -> None:
    error = mmubus.MmError("EINVAL", "addr is not page-aligned")
    assert (error.errno, error.errno_name, error.strerror) == (errno.EINVAL, "EINVAL", "addr is not page-aligned")


def test_a_stale_translation_explains_itself() -> None:
    error = error_from("", "STALE_TRANSLATION", "", {"addr": "0x7000", "operation": "munmap", "round": "4"})
    assert isinstance(error, mmubus.StaleTranslation)
    assert (error.address, error.taken_by, error.round) == (0x7000, "munmap", 4)
    empty = mmubus.StaleTranslation("STALE_TRANSLATION", "")
    assert (empty.address, empty.taken_by, empty.round) == (None, "", None)


def test_a_fence_learned_by_status_says_what_was_lost() -> None:
    error = error_from("", "FENCED", "too slow", {"seq": "7", "round": "3", "waited_s": "2.0", "lost": "1:16 4:2"})
    assert isinstance(error, mmubus.Fenced)
    assert (error.seq, error.round, error.waited_s, error.lost) == (7, 3, 2.0, {1: 16, 4: 2})


def test_every_exception_is_documented_and_exported() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        assert kind.__doc__
        assert kind.__name__ in errors.__all__
        assert kind.__name__ in mmubus.__all__
        if issubclass(kind, mmubus.MmuBusError):
            assert kind.__name__ in (errors.__doc__ or "")


async def test_a_unary_call_s_details_arrive() -> None:
    async with fake_server() as server, mmubus.connect(server.address) as bus:
        await bus.mm(1).munmap(0x1000, 0x1000)
        with pytest.raises(mmubus.MmError, match="not page-aligned") as caught:
            await bus.mm(1).munmap(0x1001, 0x1000)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.metadata == {"addr": "1"}


async def test_nobody_there() -> None:
    async with mmubus.connect("unix:/nonexistent/socket") as bus:
        with pytest.raises(mmubus.ConnectionLost):
            await bus.create_mm("program")


def test_a_status_that_a_write_has_hidden_is_a_broken_stream() -> None:
    """grpc.aio's own INTERNAL, when a write meets the end of a stream: the session is attached again, not given up."""
    hidden = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core"
    )
    assert isinstance(_error_of(hidden), mmubus.ConnectionLost)
