"""The books, on operations whose figures are worked out by hand."""

from mmubus.trace.compare import Books, Outcome, missing_bytes, union
from mmubus.trace.format import Notified, Operation, VmaLine

PAGE = 4096


def notified(first: int, last: int, call: str = "invalidate_range") -> Notified:
    """Pages [first, last)."""
    return Notified(call, first * PAGE, last * PAGE)


def operation(number: int, *notify: Notified, op: str = "munmap", **more: object) -> Operation:
    """A random recording's operation, unless more says otherwise."""
    options = {"ret": 0, "vmas": (), "present": ()} | more
    return Operation(number, 1, op, (0, PAGE), notify=tuple(notify), **options)


def outcome(*notify: Notified, **more: object) -> Outcome:
    return Outcome(**{"ret": 0, "notify": tuple(notify), "vmas": (), "present": ()} | more)


def test_equal_operations_cost_nothing():
    books = Books()
    books.enter(operation(0, notified(1, 3)), outcome(notified(1, 3)))
    books.finish()
    assert books.operations == 1
    assert not any(books.mismatched.values())
    assert books.notifications() == {
        "kernel": 1,
        "kernel_bytes": 2 * PAGE,
        "bus": 1,
        "bus_bytes": 2 * PAGE,
        "missed": 0,
        "missed_bytes": 0,
        "excess_bytes": 0,
        "unknowable": 0,
    }


def test_missed_counts_notifications_and_its_bytes():
    """Of [0, 4) and [8, 9) the bus covers pages 0, 1 and 3: one whole notification and one page of the other miss."""
    books = Books()
    books.enter(operation(0, notified(0, 4), notified(8, 9)), outcome(notified(0, 2), notified(3, 4)))
    books.finish()
    assert (books.missed, books.missed_bytes, books.excess_bytes) == (2, 2 * PAGE, 0)
    assert books.mismatched["notify"] == 1


def test_split_or_repeated_ranges_cover_as_well():
    """A different list is a mismatch of notify; what is covered is not missed."""
    books = Books()
    books.enter(operation(0, notified(0, 4)), outcome(notified(2, 4), notified(0, 2), notified(0, 2)))
    books.finish()
    assert (books.missed, books.excess_bytes, books.mismatched["notify"]) == (0, 0, 1)
    assert (books.bus, books.bus_bytes) == (3, 6 * PAGE)


def test_excess_is_what_the_kernel_did_not_invalidate():
    books = Books()
    books.enter(operation(0, notified(4, 6)), outcome(notified(2, 8), notified(7, 9)))
    books.finish()
    assert (books.missed, books.excess_bytes) == (0, 5 * PAGE)  # pages 2, 3, 6, 7, 8


def test_nothing_carries_over_to_the_next_operation():
    books = Books()
    books.enter(operation(0), outcome(notified(0, 4)))
    books.enter(operation(1, notified(0, 4)), outcome())
    books.finish()
    assert (books.missed, books.excess_bytes) == (1, 4 * PAGE)


def test_young_bits_take_nothing_away():
    books = Books()
    books.enter(operation(0, notified(0, 4, "test_young")), outcome())
    books.finish()
    assert (books.kernel, books.missed, books.mismatched["notify"]) == (1, 0, 1)


def test_state_is_compared_part_by_part():
    vma = VmaLine(0, PAGE, "rw-p", None, None)
    books = Books()
    books.enter(operation(0, err="ENOMEM", ret=None), outcome())
    books.enter(operation(1, ret=7), outcome())
    books.enter(operation(2, vmas=(vma,)), outcome())
    books.enter(operation(3, present=((0, 1),)), outcome(present=((0, 2),)))
    books.finish()
    assert books.mismatched == {"err": 1, "ret": 1, "vmas": 1, "present": 1, "notify": 0}
    assert books.state_mismatched == 4
    shown = [mismatch.as_json() for mismatch in books.mismatches]
    assert [one["differs"] for one in shown] == ["err", "ret", "vmas", "present"]
    assert shown[2]["expected"] == [[0, PAGE, "rw-p", None, None]]
    assert shown[2]["came"] == []


def test_what_a_recording_has_not_is_not_counted():
    books = Books()
    books.enter(operation(0), outcome(swapped=((0, 1),), huge=((0, 512),)))
    assert set(books.mismatched) == {"err", "ret", "vmas", "present", "notify"}
    books.enter(operation(1, swapped=((0, 1),)), outcome(swapped=((0, 1),), huge=((0, 512),)))
    books.enter(operation(2, huge=((0, 512),)), outcome(swapped=((0, 1),), huge=()))
    assert (books.mismatched["swapped"], books.mismatched["huge"]) == (0, 1)
    assert books.state_mismatched == 1
    assert books.mismatches[0].as_json()["expected"] == [[0, 512]]


def test_the_first_ten_mismatches_are_kept():
    books = Books()
    for number in range(50):
        books.enter(operation(number, ret=1), outcome())
    books.finish()
    assert books.mismatched["ret"] == 50
    assert [mismatch.operation.number for mismatch in books.mismatches] == list(range(10))


def test_untold_is_unknowable_and_not_missed():
    books = Books()
    books.enter(operation(0, notified(1, 2), notified(5, 6)), outcome(), lambda one: one.start == PAGE)
    books.finish()
    assert (books.missed, books.missed_bytes, books.unknowable) == (1, PAGE, 1)


def test_untold_but_covered_is_neither():
    books = Books()
    books.enter(operation(0, notified(1, 2)), outcome(notified(1, 2)), lambda one: True)
    books.finish()
    assert (books.missed, books.unknowable) == (0, 0)


def program(number: int, op: str, *notify: Notified, pid: int = 1, during: str | None = None) -> Operation:
    return Operation(number, pid, op, (0, PAGE), notify=tuple(notify), during=during)


def seen(*notify: Notified) -> Outcome:
    return Outcome(notify=tuple(notify))


def test_a_fault_inside_of_a_call_is_held_against_the_call():
    """The recorder writes a copy that the kernel makes inside of fork into fork's line."""
    books = Books()
    books.enter(program(0, "fork", notified(0, 8), notified(3, 4)), seen(notified(0, 8)))
    books.enter(program(1, "write", pid=2), seen())
    books.enter(program(2, "write", during="fork"), seen(notified(3, 4)))
    books.finish()
    assert (books.missed, books.excess_bytes, books.mismatched["notify"]) == (0, 0, 0)


def test_a_fault_inside_of_another_process_s_call_is_not():
    books = Books()
    books.enter(program(0, "fork", notified(3, 4)), seen())
    books.enter(program(1, "write", during="fork", pid=2), seen(notified(3, 4)))
    books.finish()
    assert (books.missed, books.excess_bytes) == (1, PAGE)


def test_nothing_to_replay_is_missed_where_the_kernel_notified():
    books = Books()
    books.enter(program(0, "kernel", notified(3, 4)), None, lambda one: True)
    books.enter(program(1, "thread", notified(3, 4)), None)
    books.finish()
    assert (books.unknowable, books.missed, books.kernel) == (1, 1, 2)


def test_a_recorder_that_could_not_see_notifications_compares_none():
    books = Books(notify_told=False)
    books.enter(program(0, "munmap"), seen(notified(0, 4)))
    books.finish()
    assert (books.missed, books.excess_bytes, books.mismatched["notify"], books.bus) == (0, 0, 0, 1)


def test_spans():
    assert union([(4, 6), (0, 2), (2, 3), (5, 9), (7, 7)]) == [(0, 3), (4, 9)]
    assert missing_bytes((0, 10), [(0, 3), (4, 9)]) == 2
    assert missing_bytes((0, 10), []) == 10
