"""Random lists of mm operations: what `record_random.py` lets the real kernel do.

A list depends on nothing but (seed, count, pages, profile), so a seed names a trace. The draws of the profiles plain,
anon and file are frozen: recordings of them exist in more places than here. Ranges are drawn from a rough picture of
what is mapped by then; operations that fail are as welcome as those that succeed.
"""

import random
from collections.abc import Iterator

PAGE = 4096
BLOCK = 512
BASE = 0x2000_0000_0000
FILE_PAGES = 128
HUGE_FILE_PAGES = 3 * BLOCK + 100
"""The profile hugeshm: the file of tmpfs has blocks, and an end inside one."""
IN_BLOCKS = ("thp", "shmem", "hugeshm")

Operation = tuple[str | int, ...]
"""Arguments are numbers; of `hostile_operations` also texts that the runner understands."""

PROTECTIONS = (0, 1, 3, 3, 3, 3, 5, 7)
MOSTLY_WRITABLE = (0, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 7)
ADVICE = {
    "NORMAL": 0, "RANDOM": 1, "WILLNEED": 3, "DONTNEED": 4, "FREE": 8, "REMOVE": 9, "DONTFORK": 10, "DOFORK": 11,
    "HUGEPAGE": 14, "NOHUGEPAGE": 15, "WIPEONFORK": 18, "KEEPONFORK": 19, "COLD": 20, "PAGEOUT": 21,
    "POPULATE_READ": 22, "POPULATE_WRITE": 23, "DONTNEED_LOCKED": 24, "COLLAPSE": 25,
}  # fmt: skip
WEIGHTS: dict[str, dict[str, float]] = {
    "plain": {"mmap": 14, "munmap": 10, "mprotect": 12, "madvise": 8, "read": 16, "write": 28},
    "anon": {
        "mmap": 12, "munmap": 6, "mprotect": 10, "madvise": 12, "mremap": 7,
        "read": 14, "write": 26, "fork": 3, "reap": 4,
    },
    "file": {
        "mmap": 14, "munmap": 5, "mprotect": 8, "madvise": 10, "mremap": 5, "read": 18, "write": 20,
        "fork": 2, "reap": 3, "msync": 3, "fsync": 3, "ftruncate": 3, "punch": 4, "remap_file_pages": 2,
    },
    "thp": {
        "mmap": 9, "munmap": 6, "mprotect": 9, "madvise": 26, "mremap": 9,
        "read": 12, "write": 22, "fork": 3, "reap": 4,
    },
    "swap": {
        "mmap": 11, "munmap": 6, "mprotect": 9, "madvise": 24, "mremap": 7,
        "read": 15, "write": 22, "fork": 3, "reap": 4,
    },
    "shmem": {
        "mmap": 9, "munmap": 5, "mprotect": 8, "madvise": 32, "mremap": 8,
        "read": 14, "write": 20, "fork": 2, "reap": 3, "ftruncate": 1, "punch": 2,
    },
    "hugeshm": {
        "mmap": 10, "munmap": 5, "mprotect": 8, "madvise": 24, "mremap": 8,
        "read": 16, "write": 24, "fork": 2, "reap": 3, "ftruncate": 2, "punch": 4,
    },
    "uffd": {
        "mmap": 10, "munmap": 4, "mprotect": 6, "madvise": 8, "mremap": 5, "read": 12, "write": 22,
        "fork": 3, "reap": 4, "uffd_register": 9, "uffd_unregister": 2, "uffd_writeprotect": 5, "uffd_move": 14,
    },
    "hugetlb": {
        "mmap": 14, "munmap": 8, "mprotect": 9, "madvise": 14, "mremap": 8, "read": 14, "write": 22,
        "fork": 4, "reap": 4, "msync": 1, "mlock": 2, "munlock": 1, "ftruncate": 2, "punch": 2,
    },
    "bad": {
        "mmap": 30, "munmap": 7, "mprotect": 13, "madvise": 18, "mremap": 16, "read": 10, "write": 20, "fork": 2,
        "reap": 3, "msync": 5, "fsync": 1, "ftruncate": 4, "punch": 4, "remap_file_pages": 4, "mlock": 2, "mlock2": 3,
        "munlock": 3, "mlockall": 0.5, "munlockall": 0.8, "brk": 4, "setrlimit": 2, "process_madvise": 4,
    },
}  # fmt: skip
WEIGHTS["sealed"] = WEIGHTS["bad"] | {"mseal": 3}
ADVICE_WEIGHTS: dict[str, dict[str, float]] = {
    "plain": {
        "DONTNEED": 8, "FREE": 3, "COLD": 2, "PAGEOUT": 4, "POPULATE_READ": 2, "POPULATE_WRITE": 2, "DONTFORK": 1,
        "DOFORK": 1, "WIPEONFORK": 1, "KEEPONFORK": 1, "REMOVE": 0, "RANDOM": 1, "NORMAL": 1, "WILLNEED": 1,
    },
    "thp": {
        "HUGEPAGE": 14, "NOHUGEPAGE": 3, "COLLAPSE": 6, "DONTNEED": 8, "FREE": 4, "COLD": 3, "PAGEOUT": 4,
        "POPULATE_READ": 2, "POPULATE_WRITE": 2, "DONTFORK": 1, "DOFORK": 1, "WIPEONFORK": 1, "KEEPONFORK": 1,
    },
    "swap": {
        "PAGEOUT": 16, "DONTNEED": 4, "FREE": 4, "COLD": 2, "WILLNEED": 3, "POPULATE_READ": 2, "POPULATE_WRITE": 2,
        "REMOVE": 1, "DONTFORK": 1, "DOFORK": 1, "WIPEONFORK": 1, "KEEPONFORK": 1, "RANDOM": 1, "NORMAL": 1,
    },
    "shmem": {
        "COLLAPSE": 30, "DONTNEED": 6, "REMOVE": 4, "COLD": 4, "PAGEOUT": 5, "HUGEPAGE": 2, "NOHUGEPAGE": 2,
        "POPULATE_READ": 3, "POPULATE_WRITE": 2, "FREE": 1, "DONTFORK": 1, "DOFORK": 1, "WIPEONFORK": 1,
    },
    "hugeshm": {
        "HUGEPAGE": 12, "NOHUGEPAGE": 2, "COLLAPSE": 4, "DONTNEED": 7, "REMOVE": 7, "COLD": 4, "PAGEOUT": 5,
        "POPULATE_READ": 3, "POPULATE_WRITE": 3, "FREE": 1, "DONTFORK": 1, "DOFORK": 1, "WIPEONFORK": 1,
    },
    "hugetlb": {
        "DONTNEED": 10, "DONTNEED_LOCKED": 2, "REMOVE": 4, "FREE": 1, "COLD": 1, "PAGEOUT": 1, "COLLAPSE": 1,
        "POPULATE_READ": 3, "POPULATE_WRITE": 3, "DONTFORK": 1, "DOFORK": 1, "WIPEONFORK": 1, "KEEPONFORK": 1,
        "HUGEPAGE": 1, "NOHUGEPAGE": 1, "RANDOM": 2, "NORMAL": 2, "WILLNEED": 1,
    },
}  # fmt: skip
POLICY_WEIGHTS = {"mbind": 30, "set_mempolicy": 2, "get_mempolicy": 6, "set_mempolicy_home_node": 5, "migrate_pages": 2}
LIKE = {"policy": "file", "policy-thp": "thp", "policy-hugetlb": "hugetlb"}
"""Profiles that are like another, with calls about memory policies among the others."""
for _profile, _other in LIKE.items():
    WEIGHTS[_profile] = WEIGHTS[_other] | POLICY_WEIGHTS
HOSTILE = {"bad": "bad", "sealed": "sealed", "bad-thp": "thp", "bad-hugetlb": "hugetlb"}
"""Profiles of `hostile_operations`, and whose memory they have."""
for _profile in HOSTILE:
    WEIGHTS.setdefault(_profile, WEIGHTS["bad"])
PASSES = {"khugepaged": "hugeshm", "khugepaged-thp": "thp"}
"""Likewise, with passes of khugepaged."""
for _profile, _other in PASSES.items():
    WEIGHTS[_profile] = WEIGHTS[_other] | {"khugepaged_scan": 6}
LIKE |= HOSTILE | PASSES
ADVICE_WEIGHTS["anon"] = ADVICE_WEIGHTS["uffd"] = ADVICE_WEIGHTS["plain"]
ADVICE_WEIGHTS["file"] = ADVICE_WEIGHTS["plain"] | {"REMOVE": 2}

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_POPULATE = 1, 2, 0x10, 0x20, 0x8000
MAP_LOCKED, MAP_NORESERVE, MAP_HUGETLB = 0x2000, 0x4000, 0x40000
SHM_FILE, HUGETLB_FILE, HUGETLB_BLOCKS = 1, 2, 6
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4


class Drawing:
    """One random list in the making: the generator, and the rough picture of what is mapped."""

    def __init__(self, seed: int, pages: int, profile: str) -> None:
        self.random = random.Random(f"{profile}-{seed}")
        self.weights = WEIGHTS[profile]
        self.profile = profile = LIKE.get(profile, profile)
        self.pages = pages
        self.scale = {"thp": 1, "shmem": 1, "hugeshm": 1, "swap": 2}.get(profile, max(1, pages // BLOCK))
        self.protections = PROTECTIONS if profile in ("plain", "anon", "file") else MOSTLY_WRITABLE
        self.populated = 0.3 if profile == "swap" else 0.1
        self.mapped = bytearray(pages)
        self.child = False

    def operations(self, count: int) -> Iterator[Operation]:
        names, weights = zip(*self.weights.items(), strict=True)
        for _ in range(count):
            name = self.random.choices(names, weights)[0]
            first, number = self.blocks_or_range() if self.profile in (*IN_BLOCKS, "hugetlb") else self.range()
            yield from getattr(self, name)(first, number)

    # Ranges, in pages of the arena.

    def length(self, mean: int) -> int:
        return min(self.pages, 1 + int(self.random.expovariate(1 / (mean * self.scale))))

    def range(self) -> tuple[int, int]:
        """Most often inside, or across the end of, what is mapped."""
        draw, number = self.random, self.length(8)
        on = [page for page in range(self.pages) if self.mapped[page]]
        if on and draw.random() < 0.93:
            back = draw.choice(on) - (draw.randint(0, number - 1) if draw.random() < 0.3 else 0)
            first = max(0, min(self.pages - number, back))
            if draw.random() < 0.75:
                number = max(1, self.run(first, number))
            return first, number
        return draw.randint(0, self.pages - number), number

    def run(self, first: int, number: int) -> int:
        """How many of the pages from `first` are mapped without a gap."""
        end = first
        while end < self.pages and end < first + number and self.mapped[end]:
            end += 1
        return end - first

    def blocks_or_range(self) -> tuple[int, int]:
        """Whole blocks of 2 MiB, a few pages of one, or a range whose ends lie in different blocks."""
        draw, blocks = self.random, self.pages // BLOCK
        kind = draw.random()
        hugetlb = self.profile == "hugetlb"
        if kind < (0.8 if hugetlb else 0.35):
            number = min(blocks, 1 + int(draw.expovariate(1 / 0.8)))
            on = [block for block in range(blocks) if self.mapped[block * BLOCK]] if hugetlb else []
            if on and draw.random() < 0.85:
                return min(draw.choice(on), blocks - number) * BLOCK, number * BLOCK
            return draw.randint(0, blocks - number) * BLOCK, number * BLOCK
        if kind < (0.9 if hugetlb else 0.8):
            return self.range()
        number = min(self.pages, 1 + int(draw.expovariate(1 / 600)))
        return draw.randint(0, self.pages - number), number

    def span(self, first: int, number: int) -> tuple[int, int]:
        return BASE + first * PAGE, number * PAGE

    # One method for each operation.

    def mmap(self, first: int, number: int) -> Iterator[Operation]:
        if self.profile == "hugetlb":
            yield from self.mmap_hugetlb()
            return
        draw = self.random
        if self.profile in IN_BLOCKS:
            if draw.random() < (0.6 if self.profile == "thp" else 0.8):
                number = min(self.pages, BLOCK * (1 + int(draw.expovariate(1 / 2))))
                first = draw.randint(0, (self.pages - number) // BLOCK) * BLOCK
        elif draw.random() < 0.7:
            number = self.length(10)
            first = draw.randint(0, self.pages - number)
        at, size = self.span(first, number)
        flags, fd, offset = MAP_FIXED, 9, 0
        if self.profile == "shmem" and draw.random() < 0.15:
            fd = SHM_FILE
            offset = draw.choice([0, 0, 0, draw.randint(0, FILE_PAGES - 1) * PAGE])
            flags |= MAP_SHARED
        elif self.profile == "hugeshm" and draw.random() < 0.45:
            fd = SHM_FILE
            offset = draw.choice([0, 0, BLOCK, 2 * BLOCK, draw.randint(0, HUGE_FILE_PAGES - 1)]) * PAGE
            flags |= draw.choice([MAP_SHARED, MAP_SHARED, MAP_SHARED, MAP_PRIVATE])
        elif self.profile == "file" and draw.random() < 0.75:
            fd, offset = draw.randint(0, 1), draw.randint(0, FILE_PAGES - 1) * PAGE
            flags |= draw.choice([MAP_SHARED, MAP_PRIVATE])
        else:
            shared = self.profile != "thp" and draw.random() < (0.85 if self.profile in ("shmem", "hugeshm") else 0.2)
            flags |= MAP_ANONYMOUS | (MAP_SHARED if shared else MAP_PRIVATE)
        if draw.random() < self.populated:
            flags |= MAP_POPULATE
        skew = draw.choice([1, 512]) if draw.random() < 0.01 else 0
        yield "mmap", at + skew, size, draw.choice(self.protections), flags, fd, offset
        self.mapped[first : first + number] = b"\1" * number
        if self.profile in ("thp", "hugeshm") and draw.random() < 0.6:
            yield "madvise", at, size, ADVICE["HUGEPAGE"]

    def mmap_hugetlb(self) -> Iterator[Operation]:
        """Mostly whole huge pages at their alignment, of nobody's or of the file's; some small pages between them."""
        draw, blocks = self.random, self.pages // BLOCK
        number = min(blocks, 1 + int(draw.expovariate(1 / 1.5)))
        first = draw.randint(0, blocks - number)
        at, size = self.span(first * BLOCK, number * BLOCK)
        flags, fd, offset, kind = MAP_FIXED, 9, 0, draw.random()
        flags |= draw.choice([MAP_SHARED, MAP_PRIVATE, MAP_PRIVATE])
        if kind < 0.2:
            fd, offset = HUGETLB_FILE, draw.randint(0, HUGETLB_BLOCKS - 1) * BLOCK * PAGE
        else:
            flags |= MAP_ANONYMOUS | (MAP_HUGETLB if kind < 0.85 else 0)
        for flag, share in ((MAP_POPULATE, 0.1), (MAP_NORESERVE, 0.15), (MAP_LOCKED, 0.05)):
            flags |= flag if draw.random() < share else 0
        if draw.random() < 0.08:
            at, size, offset = at + draw.choice([0, 8 * PAGE]), size - draw.choice([0, 5 * PAGE]), offset + 3 * PAGE
        yield "mmap", at, size, draw.choice(self.protections), flags, fd, offset
        self.mapped[first * BLOCK : (first + number) * BLOCK] = b"\1" * (number * BLOCK)

    def munmap(self, first: int, number: int) -> Iterator[Operation]:
        yield "munmap", *self.span(first, number)
        self.mapped[first : first + number] = bytes(number)

    def mprotect(self, first: int, number: int) -> Iterator[Operation]:
        yield "mprotect", *self.span(first, number), self.random.choice(self.protections)

    def madvise(self, first: int, number: int) -> Iterator[Operation]:
        names, weights = zip(*ADVICE_WEIGHTS[self.profile].items(), strict=True)
        advice = self.random.choices(names, weights)[0]
        if advice == "COLLAPSE" and self.random.random() < 0.8:
            first, number = first // BLOCK * BLOCK, max(1, number // BLOCK) * BLOCK
        yield "madvise", *self.span(first, number), ADVICE[advice]

    def mremap(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        step = BLOCK if self.profile == "hugetlb" and number % BLOCK == 0 else 1
        kind, new = draw.random(), max(1, number + draw.randint(-4, 6) // (3 if step > 1 else 1) * step)
        at, size = self.span(first, number)
        if kind < 0.35:
            yield "mremap", at, size, new * PAGE, 0, 0
            return
        keep = kind >= 0.85
        new = number if keep or (self.profile in IN_BLOCKS and draw.random() < 0.7) else new
        to = draw.randint(0, max(0, self.pages - new) // step) * step
        if self.profile in IN_BLOCKS and draw.random() < 0.7:
            to += (first - to) % BLOCK  # the same place within a block, so that whole blocks can move
            to -= BLOCK if to + new > self.pages else 0
            to = max(0, to)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if keep else 0)
        yield "mremap", at, size, new * PAGE, flags, BASE + to * PAGE
        if to + new <= first or first + number <= to:
            if not keep:
                self.mapped[first : first + number] = bytes(number)
            self.mapped[to : to + new] = b"\1" * new

    def read(self, first: int, number: int) -> Iterator[Operation]:
        yield self.access("read", first, number)

    def write(self, first: int, number: int) -> Iterator[Operation]:
        yield self.access("write", first, number)

    def access(self, name: str, first: int, number: int) -> Operation:
        at, size = self.span(first, number)
        return name, at, size if self.random.random() < 0.6 else PAGE

    def fork(self, first: int, number: int) -> Iterator[Operation]:
        if not self.child:
            self.child = True
            yield ("fork",)

    def reap(self, first: int, number: int) -> Iterator[Operation]:
        if self.child:
            self.child = False
            yield ("reap",)

    def khugepaged_scan(self, first: int, number: int) -> Iterator[Operation]:
        yield "khugepaged_scan", 0

    def uffd_register(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        mode, uffd = draw.choices([1, 2, 3, 4, 0], [10, 4, 3, 1, 1])[0], draw.choices([1, 2], [4, 1])[0]
        yield "uffd_register", *self.span(first, number), mode, uffd

    def uffd_unregister(self, first: int, number: int) -> Iterator[Operation]:
        yield "uffd_unregister", *self.span(first, number), self.random.choices([1, 2], [4, 1])[0]

    def uffd_writeprotect(self, first: int, number: int) -> Iterator[Operation]:
        yield "uffd_writeprotect", *self.span(first, number), self.random.choice([1, 1, 0]), 1

    def uffd_move(self, first: int, number: int) -> Iterator[Operation]:
        """Half of them to pages that have just been registered, and dropped, so that they can succeed."""
        draw = self.random
        to = draw.randint(0, max(0, self.pages - number))
        uffd = draw.choices([1, 2], [4, 1])[0]
        if draw.random() < 0.6:
            yield "madvise", *self.span(to, number), ADVICE["DONTNEED"]
            yield "uffd_register", *self.span(to, number), 1, uffd
        at, size = self.span(first, number)
        yield "uffd_move", BASE + to * PAGE, at, size, draw.choices([0, 2, 1, 4], [8, 6, 2, 1])[0], uffd

    def policy(self) -> tuple[int, int]:
        """A mode, at times one that is not there, and a mask of nodes that often fits: there is only node 0."""
        draw = self.random
        mode = draw.choices(range(8), [10, 8, 14, 12, 5, 7, 4, 1])[0]
        mask = draw.choice([0, 0, 0, 1]) if mode in (0, 4) else draw.choices([1, 3, 2, 0, 1 << 40], [20, 6, 2, 2, 1])[0]
        if draw.random() < 0.2:
            mode |= draw.choice([1 << 15, 1 << 15, 1 << 14, 1 << 13, 3 << 14])
        return mode, mask

    def mbind(self, first: int, number: int) -> Iterator[Operation]:
        flags = self.random.choices([0, 1, 2, 3, 4, 6, 5, 8], [24, 5, 10, 5, 4, 2, 2, 1])[0]
        skew = self.random.choice([1, 100]) if self.random.random() < 0.02 else 0
        at, size = self.span(first, number)
        mode, mask = self.policy()
        if mode in (0, 4) and self.random.random() < 0.5:
            flags = self.random.choice([2, 2, 3, 6])  # which moves every page
        yield "mbind", at + skew, size, mode, mask, flags

    def set_mempolicy(self, first: int, number: int) -> Iterator[Operation]:
        yield "set_mempolicy", *self.policy()

    def get_mempolicy(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        flags = draw.choices([2, 3, 0, 1, 4, 6, 8], [12, 8, 4, 1, 1, 1, 1])[0]
        yield "get_mempolicy", self.span(first, number)[0] if flags & 2 or draw.random() < 0.1 else 0, flags

    def set_mempolicy_home_node(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        node, flags = draw.choices([0, 1, 1 << 20], [16, 1, 1])[0], draw.choices([0, 1], [20, 1])[0]
        yield "set_mempolicy_home_node", *self.span(first, number), node, flags

    def migrate_pages(self, first: int, number: int) -> Iterator[Operation]:
        yield "migrate_pages", *self.random.choice([(1, 1), (1, 1), (1, 3), (1, 2), (2, 1), (1, 0), (0, 1)])

    def msync(self, first: int, number: int) -> Iterator[Operation]:
        yield "msync", *self.span(first, number), self.random.choice([1, 2, 4])

    def fsync(self, first: int, number: int) -> Iterator[Operation]:
        yield "fsync", self.random.randint(0, 1)

    def mlock(self, first: int, number: int) -> Iterator[Operation]:
        yield "mlock", *self.span(first, number)

    def munlock(self, first: int, number: int) -> Iterator[Operation]:
        yield "munlock", *self.span(first, number)

    def ftruncate(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        if self.profile == "hugetlb":
            skew = draw.choice([0, 0, 0, 0, 0, 5])
            yield "ftruncate", HUGETLB_FILE, (draw.randint(0, HUGETLB_BLOCKS + 1) * BLOCK + skew) * PAGE
            return
        if self.profile == "hugeshm":
            sizes = [HUGE_FILE_PAGES, HUGE_FILE_PAGES, 2 * BLOCK, 3 * BLOCK, draw.randint(1, HUGE_FILE_PAGES)]
            yield "ftruncate", SHM_FILE, draw.choice(sizes) * PAGE + draw.choice([0, 0, 100])
            return
        file, size = (
            SHM_FILE if self.profile == "shmem" else draw.randint(0, 1),
            draw.choice([FILE_PAGES] * 3 + [FILE_PAGES // 2, FILE_PAGES - 3]),
        )
        yield "ftruncate", file, size * PAGE + draw.choice([0, 0, 100])

    def punch(self, first: int, number: int) -> Iterator[Operation]:
        draw = self.random
        if self.profile == "hugetlb":
            at, size = draw.randint(0, HUGETLB_BLOCKS - 1) * BLOCK, draw.randint(1, 3) * BLOCK
            skew = draw.choice([0, 0, 0, 7])
            yield "punch", HUGETLB_FILE, (at + skew) * PAGE, size * PAGE
            return
        if self.profile == "hugeshm":
            at, size = draw.choice(
                [(number, 9), (first % HUGE_FILE_PAGES, number), (first // BLOCK % 3 * BLOCK, BLOCK)]
            )
            yield "punch", SHM_FILE, at % HUGE_FILE_PAGES * PAGE + draw.choice([0, 0, 0, 100]), size * PAGE
            return
        file = SHM_FILE if self.profile == "shmem" else draw.randint(0, 1)
        yield "punch", file, draw.randint(0, FILE_PAGES - 8) * PAGE, draw.randint(1, 8) * PAGE

    def remap_file_pages(self, first: int, number: int) -> Iterator[Operation]:
        yield "remap_file_pages", *self.span(first, number), self.random.randint(0, FILE_PAGES - 1)
