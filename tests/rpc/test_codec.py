"""The codec writes exactly what the generated classes would write."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from mmu.v1 import session_pb2 as pb
from mmubusd.mm.notification import Reason
from mmubusd.notify import Ack, Batch, Notice, Op, Result
from mmubusd.notify.log import Log
from mmubusd.notify.notice import RoundId, Seq, Share
from mmubusd.rpc.codec import REASONS, acknowledgement, batch_messages, through_of, varint
from mmubusd.rpc.tally import Tally

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
notices = st.builds(
    lambda op, round_id, **rest: Notice(op, RoundId(round_id), None, 0.0, **rest),
    st.sampled_from(Op),
    u64,
    mm=u64,
    start=u64,
    end=u64,
    pages=st.lists(u64, max_size=5).map(tuple),
    reason=st.sampled_from([None, *Reason]),
    lock=st.booleans(),
    nonblock=st.booleans(),
    must_evict=st.booleans(),
    owner=u64,
)
entries = st.lists(st.tuples(notices, st.lists(u32, max_size=4).map(tuple)), max_size=20)


def built(first_seq: int, entries: list[tuple[Notice, tuple[int, ...]]], late_seq: int) -> pb.AttachResponse:
    """The same batch, built from the generated classes."""
    batch = pb.NoticeBatch(first_seq=first_seq, late_seq=late_seq)
    for notice, targets in entries:
        batch.targets.extend(targets)
        batch.target_counts.append(len(targets))
        batch.notices.add(
            op=int(notice.op),
            mm=notice.mm,
            start=notice.start,
            end=notice.end,
            pages=notice.pages,
            reason=REASONS[notice.reason],
            lock=notice.lock,
            nonblock=notice.nonblock,
            must_evict=notice.must_evict,
            owner=notice.owner,
            round=notice.round,
        )
    return pb.AttachResponse(notices=batch)


@given(st.integers(0, 2**64 - 1))
def test_varint_is_protobufs(n: int) -> None:
    assert b"\x08" + varint(n) == (pb.AttachResponse(request=n).SerializeToString() or b"\x08\x00")


@given(u64, entries, u64)
def test_bytes_are_the_generated_classes_bytes(first_seq: int, entries: list, late_seq: int) -> None:
    batch = Batch(Seq(first_seq), [notice for notice, _ in entries], [targets for _, targets in entries], late_seq)
    for _ in range(2):  # the second time from the notices' kept bytes
        (message,) = batch_messages(batch, 1 << 20, Tally())
        assert message == built(first_seq, entries, late_seq).SerializeToString()
        assert pb.AttachResponse.FromString(message) == built(first_seq, entries, late_seq)


def shared(batch: Batch) -> Batch:
    """The same batch, which is all of a log."""
    return batch._replace(shares=[Share(0, len(batch.notices), a_log(), True)])


def a_log() -> Log:
    log = object.__new__(Log)  # nobody's
    log.encoded = None
    return log


@given(u64, u64, st.lists(st.tuples(u64, u64, u64), min_size=4, max_size=20), st.sampled_from(Reason), st.booleans())
def test_a_run_is_what_the_generated_class_writes(
    first_seq: int, mm: int, ranges: list[tuple[int, int, int]], reason: Reason, lock: bool
) -> None:
    notices = [
        Notice(Op.INVALIDATE_RANGE, RoundId(number), None, 0.0, mm=mm, start=start, end=end, reason=reason, lock=lock)
        for start, end, number in ranges
    ]
    starts, ends, rounds = zip(*ranges, strict=True)
    run = pb.NoticeRun(
        first_seq=first_seq, targets=[9, 300], op=int(Op.INVALIDATE_RANGE), mm=mm, reason=REASONS[reason], lock=lock,
        starts=starts, ends=ends, rounds=rounds,
    )  # fmt: skip
    batch = shared(Batch(Seq(first_seq), notices, [(9, 300)] * len(notices)))
    for _ in range(2):  # the second time from the log's kept bytes
        (message,) = batch_messages(batch, 1 << 20, Tally(), runs=True)
        assert pb.AttachResponse.FromString(message) == pb.AttachResponse(run=run)
    (message,) = batch_messages(batch, 1 << 20, Tally())
    assert len(pb.AttachResponse.FromString(message).notices.notices) == len(notices), "who takes no runs gets none"


def test_a_batch_is_divided_around_its_runs() -> None:
    notices = [
        Notice(Op.INVALIDATE_RANGE, RoundId(n), None, 0.0, mm=1, start=n, end=n + 1, reason=Reason.UNMAP)
        for n in range(12)
    ]
    batch = Batch(Seq(5), notices, [(1,)] * 12, late_seq=5)
    batch = batch._replace(shares=[Share(2, 8, a_log(), False), Share(8, 10, a_log(), True)])
    parsed = [pb.AttachResponse.FromString(message) for message in batch_messages(batch, 1 << 20, Tally(), runs=True)]
    assert [(one.notices.first_seq, len(one.notices.notices), one.notices.late_seq) for one in parsed] == [
        (5, 2, 0),
        (0, 0, 0),
        (13, 4, 5),
    ], "two notices are too few for a run"
    assert (parsed[1].run.first_seq, list(parsed[1].run.rounds)) == (7, [2, 3, 4, 5, 6, 7])


def test_what_differs_in_more_than_its_range_is_no_run() -> None:
    notices = [
        Notice(Op.INVALIDATE_RANGE, RoundId(n), None, 0.0, mm=1, start=n, end=n + 1, reason=reason)
        for n, reason in enumerate([Reason.UNMAP] * 4 + [Reason.CLEAR])
    ]
    batch = shared(Batch(Seq(1), notices, [(1,)] * 5))
    (message,) = batch_messages(batch, 1 << 20, Tally(), runs=True)
    assert len(pb.AttachResponse.FromString(message).notices.notices) == 5


def test_every_reason_has_a_number() -> None:
    assert set(REASONS) == {None, *Reason}
    assert len(set(REASONS.values())) == len(REASONS)


def test_a_long_batch_is_split_without_a_gap() -> None:
    count = 500
    batch = Batch(
        Seq(7),
        [Notice(Op.INVALIDATE_RANGE, RoundId(n), None, 0.0, mm=1, start=n, end=n + 1) for n in range(count)],
        [(n, n + 1) for n in range(count)],
        late_seq=9,
    )
    messages = list(batch_messages(batch, 2048, Tally()))
    assert len(messages) > 5
    assert all(len(message) <= 2048 for message in messages)
    parsed = [pb.AttachResponse.FromString(message).notices for message in messages]
    seq = 7
    for part in parsed:
        assert part.first_seq == seq
        assert len(part.targets) == sum(part.target_counts)
        assert len(part.target_counts) == len(part.notices)
        seq += len(part.notices)
    assert [notice.round for part in parsed for notice in part.notices] == list(range(count))
    assert [part.late_seq for part in parsed] == [0] * (len(parsed) - 1) + [9]


def test_a_notice_that_fits_no_message_becomes_a_flush() -> None:
    huge = Notice(Op.INVALIDATE_PAGE, RoundId(3), None, 0.0, mm=1, pages=range(1 << 40, (1 << 40) + 1000))
    small = Notice(Op.RELEASE, RoundId(4), None, 0.0, mm=1)
    messages = list(batch_messages(Batch(Seq(1), [small, huge, small], [(1,), (1,), (1,)]), 1024, tally := Tally()))
    assert tally.oversized == 1
    got = [(n.op, n.round) for m in messages for n in pb.AttachResponse.FromString(m).notices.notices]
    assert got == [(Op.RELEASE, 4), (Op.FLUSH_ALL, 3), (Op.RELEASE, 4)]
    assert all(len(message) <= 1024 for message in messages)


def test_acknowledgement() -> None:
    plain = pb.Acknowledge(through=5)
    assert acknowledgement(plain) == Ack(5)
    full = pb.Acknowledge(
        through=5,
        also=[8, 9],
        results=[
            pb.NoticeResult(seq=6, young=[4096], dirty=[8192], refused=True, refused_pages=[3], busy=True, failed="no")
        ],
    )
    assert acknowledgement(full) == Ack(
        5,
        (8, 9),
        (Result(6, young=(4096,), dirty=(8192,), refused=True, refused_pages=(3,), busy=True, failed="no"),),
    )


@given(st.integers(1, 2**63 - 1))
def test_a_bare_acknowledgement_is_read_without_the_generated_classes(through: int) -> None:
    assert through_of(pb.AttachRequest(acknowledge=pb.Acknowledge(through=through)).SerializeToString()) == through


@given(st.one_of(st.binary(max_size=16), st.binary(max_size=12).map(lambda rest: b"\x32" + rest)))
def test_whatever_is_not_a_bare_acknowledgement_is_left_to_them(data: bytes) -> None:
    through = through_of(data)
    if through:
        message = pb.AttachRequest.FromString(data)
        assert message == pb.AttachRequest(acknowledge=pb.Acknowledge(through=through))


def test_acknowledgements_that_say_more_are_left_to_them() -> None:
    for acknowledge in (
        pb.Acknowledge(through=7, also=[9]),
        pb.Acknowledge(through=7, results=[pb.NoticeResult(seq=8, busy=True)]),
        pb.Acknowledge(also=[9]),
        pb.Acknowledge(),
    ):
        assert through_of(pb.AttachRequest(acknowledge=acknowledge).SerializeToString()) == 0
    assert through_of(pb.AttachRequest(request=1, acknowledge=pb.Acknowledge(through=7)).SerializeToString()) == 0
    assert through_of(pb.AttachRequest(heartbeat=pb.Heartbeat()).SerializeToString()) == 0
