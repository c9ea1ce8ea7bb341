"""The one table from notices to bytes, and from acknowledgements to the notifier core's.

A notice goes to many sessions, so it is encoded once: the bytes of one element of NoticeBatch.notices, tag and length
included, are kept on the notice. A session's batch is then its own few header bytes and a join:

    AttachResponse   notices = 5, length
      NoticeBatch      first_seq = 1 | targets = 2 (packed) | target_counts = 3 (packed)     this session's
                       notices = 4, length, body | notices = 4, length, body | ...           everybody's
                       late_seq = 5                                                          this session's

Notices that several sessions get and that differ in their ranges only are not even that: their ranges are three arrays,
made once, and a session's message is a few header bytes and those arrays:

    AttachResponse   run = 12, length
      NoticeRun        first_seq = 1 | targets = 2 (packed)                                  this session's
                       op = 3 | mm = 4 | ... | starts = 9 | ends = 10 | rounds = 11          everybody's

The bytes are exactly those that the generated classes would write.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

from mmu.v1 import session_pb2 as pb
from mmu.v1 import types_pb2

from mmubusd.mm.notification import Reason
from mmubusd.notify.notice import Ack, Batch, Notice, Op, Result, Seq, Share
from mmubusd.rpc.tally import Tally

__all__ = ["REASONS", "acknowledgement", "batch_messages", "through_of", "varint"]

REASONS: dict[Reason | None, types_pb2.Reason.ValueType] = {
    None: types_pb2.REASON_UNSPECIFIED,
    Reason.UNMAP: types_pb2.REASON_UNMAP,
    Reason.CLEAR: types_pb2.REASON_CLEAR,
    Reason.PROTECTION_VMA: types_pb2.REASON_PROTECTION_VMA,
    Reason.PROTECTION_PAGE: types_pb2.REASON_PROTECTION_PAGE,
    Reason.SOFT_DIRTY: types_pb2.REASON_SOFT_DIRTY,
    Reason.RELEASE: types_pb2.REASON_RELEASE,
    Reason.MIGRATE: types_pb2.REASON_MIGRATE,
    Reason.EXCLUSIVE: types_pb2.REASON_EXCLUSIVE,
}

# Tags: field number << 3 | wire type (0 varint, 1 eight bytes, 2 bytes).
RESPONSE_NOTICES = b"\x2a"
RESPONSE_RUN = b"\x62"
BATCH_FIRST_SEQ = b"\x08"
BATCH_TARGETS = b"\x12"
BATCH_TARGET_COUNTS = b"\x1a"
BATCH_NOTICE = b"\x22"
BATCH_LATE_SEQ = b"\x28"

RUN_OP = b"\x18"  # its first two are a batch's
RUN_MM = b"\x20"
RUN_REASON = b"\x28"
RUN_LOCK = b"\x30\x01"
RUN_NONBLOCK = b"\x38\x01"
RUN_OWNER = b"\x40"
RUN_STARTS = b"\x4a"
RUN_ENDS = b"\x52"
RUN_ROUNDS = b"\x5a"
RUN_MIN = 4
"""Fewer notices are as short one by one."""

NOTICE_MM = b"\x10"
NOTICE_START = b"\x19"
NOTICE_END = b"\x21"
NOTICE_PAGES = b"\x2a"
NOTICE_OWNER = b"\x50"
NOTICE_ROUND = b"\x58"
NOTICE_TRACEPARENT = b"\x62"
FIXED64 = struct.Struct("<Q").pack
# Whole fields, where there are few values.
NOTICE_LOCK = b"\x38\x01"
NOTICE_NONBLOCK = b"\x40\x01"
NOTICE_MUST_EVICT = b"\x48\x01"
NOTICE_OP = {op: bytes((0x08, op)) for op in Op}
NOTICE_REASON = {reason: bytes((0x30, number)) if number else b"" for reason, number in REASONS.items()}

SMALL = tuple(bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7]) for n in range(1024))


def varint(n: int) -> bytes:
    """Encode an unsigned number, seven bits a byte, the low ones first."""
    if n < 1024:
        return SMALL[n]
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def batch_messages(batch: Batch, bytes_max: int, tally: Tally, runs: bool = False) -> Iterator[bytes]:
    """Encode a batch as AttachResponse messages: one, or as few as fit the limit.

    Args:
        bytes_max: of one message. A notice that alone is longer is sent as FLUSH_ALL, which is always legal.
        tally: where those are counted.
        runs: the client takes runs, which are sent where they are shorter.
    """
    at = 0
    for share in batch.shares if runs else ():
        shared = _run(batch, share)
        if shared and len(shared) + 10 * len(batch.targets[share.begin]) + 24 <= bytes_max:
            if at < share.begin:
                yield from _single_notices(_part_of(batch, at, share.begin), bytes_max, tally)
            yield _run_message(batch.first_seq + share.begin, batch.targets[share.begin], shared)
            at = share.end
    if at == 0:
        yield from _single_notices(batch, bytes_max, tally)
    elif at < len(batch.notices) or batch.late_seq:
        yield from _single_notices(_part_of(batch, at, len(batch.notices)), bytes_max, tally)


def _part_of(batch: Batch, begin: int, end: int) -> Batch:
    late_seq = batch.late_seq if end == len(batch.notices) else 0
    return Batch(Seq(batch.first_seq + begin), batch.notices[begin:end], batch.targets[begin:end], late_seq)


def _single_notices(batch: Batch, bytes_max: int, tally: Tally) -> Iterator[bytes]:
    pieces = [notice.encoded or _encode(notice) for notice in batch.notices]
    if sum(map(len, pieces)) + 10 * (sum(map(len, batch.targets)) + len(pieces)) + 24 <= bytes_max:
        yield _message(batch.first_seq, batch.targets, pieces, batch.late_seq)
    else:
        yield from _several_messages(batch, bytes_max, tally)


def _run(batch: Batch, share: Share) -> bytes:
    """What all sessions get of a run; b"" when its notices differ in more than their ranges, or are too few."""
    log = share.log
    if share.whole and log.encoded is not None:
        return log.encoded
    encoded = _encode_run(batch.notices[share.begin : share.end])
    if share.whole:
        log.encoded = encoded
    return encoded


def _encode_run(notices: list[Notice]) -> bytes:
    words = {(one.op, one.mm, one.reason, one.lock, one.nonblock, one.owner) for one in notices}
    if len(notices) < RUN_MIN or len(words) > 1 or any(one.origin and one.origin.traceparent for one in notices):
        return b""
    ((op, mm, reason, lock, nonblock, owner),) = words
    parts = [RUN_OP, varint(op), RUN_MM, varint(mm), RUN_REASON, varint(REASONS[reason])]
    if lock:
        parts.append(RUN_LOCK)
    if nonblock:
        parts.append(RUN_NONBLOCK)
    if owner:
        parts += RUN_OWNER, varint(owner)
    array = struct.Struct(f"<{len(notices)}Q")
    size = varint(array.size)
    parts += RUN_STARTS, size, array.pack(*[one.start for one in notices])
    parts += RUN_ENDS, size, array.pack(*[one.end for one in notices])
    parts += RUN_ROUNDS, size, array.pack(*[one.round for one in notices])
    return b"".join(parts)


def _run_message(first_seq: int, targets: Sequence[int], shared: bytes) -> bytes:
    whom = b"".join(map(varint, targets))
    head = b"".join((BATCH_FIRST_SEQ, varint(first_seq), BATCH_TARGETS, varint(len(whom)), whom))
    return b"".join((RESPONSE_RUN, varint(len(head) + len(shared)), head, shared))


def _several_messages(batch: Batch, bytes_max: int, tally: Tally) -> Iterator[bytes]:
    pieces: list[bytes] = []
    first = size = 0
    for at, notice in enumerate(batch.notices):
        piece = notice.encoded or _encode(notice)
        # 24: the header's fixed part; 10 a target and its count.
        room = len(piece) + 10 * (len(batch.targets[at]) + 1)
        if room + 24 > bytes_max:
            piece = _flush_instead(notice)
            tally.oversized += 1
            room = len(piece) + 10 * (len(batch.targets[at]) + 1)
        if pieces and size + room + 24 > bytes_max:
            yield _message(batch.first_seq + first, batch.targets[first:at], pieces, 0)
            pieces, first, size = [], at, 0
        pieces.append(piece)
        size += room
    yield _message(batch.first_seq + first, batch.targets[first:], pieces, batch.late_seq)


def _message(first_seq: int, targets: Sequence[Sequence[int]], pieces: list[bytes], late_seq: int) -> bytes:
    parts = [BATCH_FIRST_SEQ, varint(first_seq)] if first_seq else []
    if pieces:
        same = targets[0]
        if targets.count(same) == len(targets):  # what concerns everything goes to the same ones each time
            whom = b"".join(map(varint, same)) * len(targets)
            counts = varint(len(same)) * len(targets)
        else:
            whom = b"".join([varint(target) for each in targets for target in each])
            counts = b"".join([varint(len(each)) for each in targets])
        if whom:
            parts += BATCH_TARGETS, varint(len(whom)), whom
        parts += BATCH_TARGET_COUNTS, varint(len(counts)), counts
        parts += pieces
    if late_seq:
        parts += BATCH_LATE_SEQ, varint(late_seq)
    body = b"".join(parts)
    return b"".join((RESPONSE_NOTICES, varint(len(body)), body))


def _encode(notice: Notice) -> bytes:
    """The bytes of one notice, written by hand: a third of the time that building the message takes."""
    parts = [NOTICE_OP[notice.op]]
    if notice.mm:
        parts += NOTICE_MM, varint(notice.mm)
    if notice.start:
        parts += NOTICE_START, FIXED64(notice.start)
    if notice.end:
        parts += NOTICE_END, FIXED64(notice.end)
    if notice.pages:
        pages = b"".join(map(varint, notice.pages))
        parts += NOTICE_PAGES, varint(len(pages)), pages
    parts.append(NOTICE_REASON[notice.reason])
    if notice.lock:
        parts.append(NOTICE_LOCK)
    if notice.nonblock:
        parts.append(NOTICE_NONBLOCK)
    if notice.must_evict:
        parts.append(NOTICE_MUST_EVICT)
    if notice.owner:
        parts += NOTICE_OWNER, varint(notice.owner)
    if notice.round:
        parts += NOTICE_ROUND, varint(notice.round)
    if notice.origin is not None and notice.origin.traceparent:
        parent = notice.origin.traceparent.encode()
        parts += NOTICE_TRACEPARENT, varint(len(parent)), parent
    body = b"".join(parts)
    notice.encoded = b"".join((BATCH_NOTICE, varint(len(body)), body))
    return notice.encoded


def _flush_instead(notice: Notice) -> bytes:
    body = pb.Notice(
        op=int(Op.FLUSH_ALL),  # type: ignore[arg-type]
        mm=notice.mm,
        round=notice.round,
        must_evict=notice.must_evict,
    ).SerializeToString()
    return b"".join((BATCH_NOTICE, varint(len(body)), body))


def through_of(data: bytes) -> int:
    """The seq of an AttachRequest that says Acknowledge.through and nothing else, which most do.

    Returns: 0 for every other message; the generated classes are to read it then.
    """
    # acknowledge = 6, length | through = 1, of at most nine bytes, which are 63 bits
    if len(data) < 4 or data[0] != 0x32 or data[1] != len(data) - 2 or data[2] != 0x08 or len(data) > 12:
        return 0
    through = shift = 0
    for byte in data[3:-1]:
        if byte < 128:
            return 0  # it ends early: something follows
        through |= (byte & 127) << shift
        shift += 7
    last = data[-1]
    return through | last << shift if last < 128 else 0


def acknowledgement(message: pb.Acknowledge) -> Ack:
    """What a client acknowledged, as the core takes it."""
    if not message.results:
        return Ack(message.through, tuple(message.also) if message.also else ())
    return Ack(message.through, tuple(message.also), tuple(_results(message.results)))


def _results(results: Iterable[pb.NoticeResult]) -> Iterator[Result]:
    for result in results:
        yield Result(
            seq=result.seq,
            young=tuple(result.young),
            dirty=tuple(result.dirty),
            refused=result.refused,
            refused_pages=tuple(result.refused_pages),
            busy=result.busy,
            failed=result.failed,
            slept=result.slept,
        )
