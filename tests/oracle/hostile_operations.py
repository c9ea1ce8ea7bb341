"""Random lists of calls that a careful program does not make: what the kernel refuses, and what it lets pass.

Half of the calls are valid, so that there is something to collide with; the others have one argument or two that are
odd: misaligned, empty, wrapping around, beyond the address space, flags that exclude each other or do not exist.

A call must not reach what the recorder itself has mapped: lengths that succeed end in the arena or in the gap behind
it, all others fail whatever is mapped. Addresses that only the kernel knows are texts: `nX` is X bytes above the first
program break, `@X` above what the kernel has chosen for the last mmap, `tX` and `wX` that much more than the recorder
has mapped at the start, of all and of data.
"""

from collections.abc import Iterator

from random_operations import (
    ADVICE,
    BASE,
    BLOCK,
    FILE_PAGES,
    HUGETLB_BLOCKS,
    HUGETLB_FILE,
    PAGE,
    Drawing,
    Operation,
)

TASK_SIZE = (1 << 47) - PAGE
TOP = 1 << 64
GAP = 1 << 45
"""From the arena on: nothing else is mapped there."""

NOWHERE = (0, PAGE, 0xF000, TASK_SIZE, TASK_SIZE + PAGE, 1 << 47, 1 << 63, TOP - PAGE, 0xFFFF_FFFF_FF60_0000)
TYPES = (*[1] * 9, *[2] * 15, *[3] * 3, 0, 4, 15)
"""MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, and none."""
MAP_FLAGS = {
    "32BIT": 0x40, "GROWSDOWN": 0x100, "DENYWRITE": 0x800, "EXECUTABLE": 0x1000, "LOCKED": 0x2000, "NORESERVE": 0x4000,
    "POPULATE": 0x8000, "NONBLOCK": 0x10000, "STACK": 0x20000, "HUGETLB": 0x40000, "SYNC": 0x80000,
    "UNINITIALIZED": 0x400_0000, "UNKNOWN": 0x20_0000, "HIGH": 1 << 40,
}  # fmt: skip
MAP_FIXED, MAP_ANONYMOUS, MAP_HUGETLB, MAP_FIXED_NOREPLACE, MREMAP_FIXED = 0x10, 0x20, 0x4_0000, 0x10_0000, 2
ALL_ADVICE = (*ADVICE.values(), 2, 12, 13, 16, 17, *ADVICE.values())
NO_ADVICE = (5, 6, 7, 26, 99, 200, 0xFFFF_FFFF, TOP - 1, 1 << 31)
INFINITY = TOP - 1
RLIMIT_DATA, RLIMIT_MEMLOCK, RLIMIT_AS = 2, 8, 9
MEMLOCK_MAX = 8 << 20
"""What the recorder can set it to without privileges."""


class Hostile(Drawing):
    """Draws one list; `one_in(n)` is how often something odd happens."""

    def __init__(self, seed: int, pages: int, profile: str) -> None:
        super().__init__(seed, pages, profile)
        self.chosen = False  # the kernel has chosen an address at least once

    def one_in(self, number: float) -> bool:
        return self.random.random() < 1 / number

    def small_or_huge(self, first: int, number: int) -> tuple[int, int, int]:
        """Where an mmap goes: pages, and flags that ask for huge ones."""
        draw = self.random
        if self.profile not in ("thp", "hugetlb") or draw.random() < 0.3:
            number = self.length(9) if draw.random() < 0.6 else number
            return draw.randint(0, self.pages - number), number, 0
        number = min(self.pages, (1 + int(draw.expovariate(0.8))) * BLOCK)
        first = draw.randint(0, (self.pages - number) // BLOCK) * BLOCK
        return first, number, MAP_FIXED | MAP_HUGETLB if self.profile == "hugetlb" else 0

    # Ranges in bytes.

    def odd_span(self, first: int, number: int, too_long: tuple[int, ...] = ()) -> tuple[int, int]:
        """A range of the arena, or what is left of it. Args: too_long: lengths with which this call fails."""
        draw = self.random
        at, size = self.span(first, number)
        kind = draw.random()
        if kind < 0.7:
            return at, size
        if kind < 0.74:
            return at + draw.choice([1, 8, 0x800, PAGE - 1]), size
        if kind < 0.87:
            return at, size - draw.choice([1, 0x800, PAGE - 1]) + draw.choice([0, 0, PAGE])
        if kind < 0.9:
            return at, 0
        if kind < 0.94 and too_long:
            return at, draw.choice(too_long)
        if kind < 0.97:
            return draw.choice(NOWHERE), draw.choice([PAGE, 1, 0, 3 * PAGE])
        return at, size + draw.choice([PAGE, 7 * PAGE, self.pages * PAGE])

    @staticmethod
    def wrapping(at: int) -> tuple[int, ...]:
        """Lengths with which a range from here on has no end, or whose rounding up is 0."""
        return TOP - 1, TOP - PAGE, TOP - PAGE + 1, TOP - at, TOP - at + PAGE, TOP - at + 5

    @staticmethod
    def beyond(at: int) -> tuple[int, ...]:
        """Lengths with which a range from here on ends behind the address space."""
        return TASK_SIZE - at + 1, TASK_SIZE - at + PAGE, 1 << 47, 1 << 63, TOP - at - PAGE, TOP - at - 1

    def place(self, number: int) -> int:
        """Where something of so many pages is to go."""
        draw = self.random
        at = BASE + draw.randint(0, max(0, self.pages - number)) * PAGE
        if self.one_in(12):
            return at + draw.choice([1, 0x800, PAGE - 1])
        return draw.choice(NOWHERE) if self.one_in(14) else at

    # The calls.

    def mmap(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        first, number, huge = self.small_or_huge(first, number)
        kind, flags, fd, offset = draw.random(), draw.choice(TYPES), 9, 0
        too_long = self.beyond(BASE + first * PAGE) + self.wrapping(BASE + first * PAGE)
        at, size = self.odd_span(first, number, too_long if kind < 0.74 else (*too_long, 1 << 46))
        kind = min(kind, 0.7) if huge else kind
        flags |= MAP_FIXED if kind < 0.62 else MAP_FIXED_NOREPLACE if kind < 0.74 else 0
        if kind > 0.87:
            at = draw.choice([0, 0, 0, 1, PAGE, TASK_SIZE - PAGE, 1 << 47, TOP - PAGE])
            size = draw.choice([size, size, 2 << 20, 4 << 20, (2 << 20) + PAGE, (6 << 20) - 1])
        if draw.random() < 0.45:
            flags |= MAP_ANONYMOUS
            fd = draw.choice([9, 9, 9, 0, 1])
        else:
            fd = draw.choice([0, 0, 0, 0, 1, 1, 1, 1, 9])
        if fd != 9 or self.one_in(9):
            offset = draw.randint(0, FILE_PAGES + 8) * PAGE
        if huge:
            flags |= MAP_ANONYMOUS | huge
            fd = HUGETLB_FILE
            if self.one_in(3):
                flags &= ~(MAP_ANONYMOUS | MAP_HUGETLB)
                offset = draw.randint(0, HUGETLB_BLOCKS) * BLOCK * PAGE + (PAGE if self.one_in(9) else 0)
        if self.one_in(12):
            offset = draw.choice([1, 0x800, 1 << 63, TOP - PAGE, (1 << 44) - PAGE, 1 << 44, (1 << 63) - PAGE, 1 << 52])
        for name, bit in MAP_FLAGS.items():
            often = 9 if name == "POPULATE" else 25 if name in ("NORESERVE", "LOCKED", "GROWSDOWN") else 90
            flags |= bit if self.one_in(often) else 0
        protection = draw.choice((0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 7))
        protection |= draw.choice([8, 0x10, 0x100_0000, 0x200_0000, 1 << 31, 1 << 40]) if self.one_in(15) else 0
        if size < GAP and not flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) and not BASE <= at < BASE + self.pages * PAGE:
            self.chosen = True
        yield "mmap", at, size, protection, flags, fd, offset
        if self.profile == "thp" and self.one_in(2):
            yield "madvise", at, number * PAGE, ADVICE["HUGEPAGE"]
        if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) and 0 < size < GAP and at == BASE + first * PAGE and flags & 3:
            self.mapped[first : first + number] = b"\1" * number

    def or_chosen(self, at: int, size: int) -> tuple[int | str, int]:
        """The range, or now and then one page that the kernel has chosen an address for: what is next is another's."""
        if not self.chosen or not self.one_in(14):
            return at, size
        return self.random.choice(["@0", "@0", "@0", "@1"]), PAGE

    def munmap(self, first: int, number: int) -> Iterator[Operation]:
        at, size = self.odd_span(first, number, self.beyond(BASE + first * PAGE) + self.wrapping(BASE + first * PAGE))
        if size < GAP and self.one_in(2):
            size = min(size, 3 * PAGE)
        yield "munmap", *self.or_chosen(at, size)
        if size < GAP and at == BASE + first * PAGE:
            self.mapped[first : first + -(-size // PAGE)] = bytes(min(-(-size // PAGE), self.pages - first))

    def mprotect(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        at, size = self.odd_span(first, number, (*self.wrapping(BASE + first * PAGE), GAP, 1 << 47))
        protection = draw.choice((0, 1, 2, 3, 3, 3, 3, 4, 5, 7))
        if self.one_in(8):
            protection |= draw.choice([8, 0x100_0000, 0x100_0000, 0x200_0000, 0x300_0000, 0x10, 1 << 31, 1 << 40])
        yield "mprotect", *self.or_chosen(at, size), protection

    def madvise(self, first: int, number: int) -> Iterator[Operation]:
        at, size = self.odd_span(first, number, (*self.wrapping(BASE + first * PAGE), GAP))
        advice = self.random.choice(ALL_ADVICE)
        if self.one_in(14):
            advice = self.random.choice(NO_ADVICE)
        elif self.one_in(25):
            advice += 1 << 32
        yield "madvise", *self.or_chosen(at, size), advice

    def process_madvise(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        advice = draw.choice([3, 20, 21, 21, 25, draw.choice(ALL_ADVICE), draw.choice(NO_ADVICE)])
        ranges: list[int] = []
        for _ in range(draw.choice([1, 1, 2])):
            first, number = self.range()
            ranges += self.odd_span(first, number, self.wrapping(BASE + first * PAGE))
        yield "process_madvise", advice, 1 if self.one_in(12) else 0, *ranges

    def mremap(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        at, old = self.odd_span(first, number, (TOP - 1, TOP - PAGE, TOP - PAGE + 1, 1 << 47, 1 << 63, GAP))
        flags = draw.choice([0, 0, 0, 1, 1, 1, 1, *[3] * 8, 5, 5, 5, 7, 7, 7, 2, 4, 6])
        if self.one_in(25):
            flags |= draw.choice([8, 0x10, 1 << 31])
        old = 0 if self.one_in(14) else old
        new = max(0, old + draw.choice([0, 0, 0, 0, PAGE, 3 * PAGE, -PAGE, -3 * PAGE, 9 * PAGE, 1, -1]))
        if old >= GAP:
            new = draw.choice([number * PAGE, PAGE, old % TOP])
        if self.one_in(14):
            new = draw.choice([0, 1, TOP - 1, TOP - PAGE, 1 << 47, TASK_SIZE + PAGE, 1 << 63])
            if not flags & MREMAP_FIXED and self.one_in(3):
                new = draw.choice([1 << 46, TASK_SIZE])
        to = (
            self.place(number)
            if self.one_in(1.5)
            else at + draw.choice([0, PAGE, -PAGE, number * PAGE, -number * PAGE])
        )
        source, size = self.or_chosen(at, old)
        yield "mremap", source, size, new % TOP, flags, to % TOP
        place = (to - BASE) // PAGE
        if source == at and flags & 3 == 3 and 0 <= place < self.pages and new < GAP:
            if not flags & 4 and first + number <= place:
                self.mapped[first : first + number] = bytes(number)
            self.mapped[place : place + new // PAGE] = b"\1" * min(new // PAGE, self.pages - place)

    def access(self, name: str, first: int, number: int) -> Operation:
        if self.one_in(30):
            return name, self.random.choice([0, PAGE, TASK_SIZE, TASK_SIZE + PAGE, TOP - 2 * PAGE]), PAGE
        return super().access(name, first, number)

    def msync(self, first: int, number: int) -> Iterator[Operation]:
        at, size = self.odd_span(first, number, (*self.wrapping(BASE + first * PAGE), GAP))
        yield "msync", at, size, self.random.choice([*range(9), 4, 4, 4, 2, 1 << 31, 4 + (1 << 32)])

    def mlock(self, first: int, number: int) -> Iterator[Operation]:
        at, size = self.odd_span(first, number, (*self.wrapping(BASE + first * PAGE), GAP, 1 << 47))
        yield "mlock", at, size

    def mlock2(self, first: int, number: int) -> Iterator[Operation]:
        at, size = self.odd_span(first, number, (*self.wrapping(BASE + first * PAGE), GAP, 1 << 47))
        yield "mlock2", at, size, self.random.choice([0, 1, 1, 1, 2, 3, 1 + (1 << 32)])

    def munlock(self, first: int, number: int) -> Iterator[Operation]:
        at, size = self.odd_span(first, number, (*self.wrapping(BASE + first * PAGE), GAP, 1 << 47))
        yield "munlock", at, size

    def mlockall(self, first: int, number: int) -> Iterator[Operation]:
        yield "mlockall", self.random.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 1])

    def munlockall(self, first: int, number: int) -> Iterator[Operation]:
        yield ("munlockall",)

    def mseal(self, first: int, number: int) -> Iterator[Operation]:
        at, size = self.odd_span(first, min(number, 3), (*self.wrapping(BASE + first * PAGE), GAP))
        yield "mseal", at, min(size, 3 * PAGE) if size < GAP else size, 1 if self.one_in(8) else 0

    def brk(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        if self.one_in(3):
            yield "brk", draw.choice([0, 1, PAGE, 0x1000_0000, TASK_SIZE, TASK_SIZE + PAGE, 1 << 47, 1 << 63, TOP - 1])
            return
        yield "brk", f"n{draw.choice([0, 1, PAGE, 2 * PAGE, 8 * PAGE, 100 * PAGE, 0x800, PAGE - 1, 3 * PAGE + 1]):x}"

    def setrlimit(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        resource = draw.choice([RLIMIT_DATA, RLIMIT_MEMLOCK, RLIMIT_AS])
        few = draw.choice([0, PAGE, 20 * PAGE + 100, 60 * PAGE, 150 * PAGE, 300 * PAGE])
        size = few if resource == RLIMIT_MEMLOCK else f"{'t' if resource == RLIMIT_AS else 'w'}{few:x}"
        most = MEMLOCK_MAX if resource == RLIMIT_MEMLOCK else INFINITY
        yield "setrlimit", resource, most if self.one_in(1.5) else size

    def remap_file_pages(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        at, size = self.odd_span(first, number, self.wrapping(BASE + first * PAGE))
        page = draw.choice([TOP - 1, 1 << 52, 1 << 51, 1 << 32]) if self.one_in(9) else draw.randint(0, FILE_PAGES + 3)
        flags = draw.choice([0, 0x10000, 0x10000, 1, 0x2000, 0x10, 1 << 40]) if self.one_in(3) else 0
        yield "remap_file_pages", at, size, draw.choice([1, 3, 8]) if self.one_in(9) else 0, page, flags

    def ftruncate(self, first: int, number: int) -> Iterator[Operation]:
        if self.one_in(4):
            sizes = (1 << 63, TOP - 1, 1 << 44, (1 << 44) - PAGE, (1 << 44) - PAGE + 1, 1 << 50)
            yield "ftruncate", 0, self.random.choice(sizes)
            return
        sizes = (FILE_PAGES, FILE_PAGES, FILE_PAGES, FILE_PAGES // 2, 9, 0)
        yield "ftruncate", self.random.randint(0, 1), self.random.choice(sizes) * PAGE + self.random.choice([0, 0, 100])

    def punch(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        at, size = draw.randint(0, FILE_PAGES + 4) * PAGE, draw.randint(1, 8) * PAGE
        if self.one_in(2):
            at, size = at + draw.choice([0, 100, PAGE - 1]), size - draw.choice([0, 1, 100])
        if self.one_in(4):
            size = draw.choice([0, TOP - 1, 1 << 63, (1 << 63) - 1, 1 << 44])
        if self.one_in(8):
            at = draw.choice([1 << 63, TOP - PAGE, 1 << 44, (1 << 63) - PAGE])
        yield "punch", draw.randint(0, 1), at, size
