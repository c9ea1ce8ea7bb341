"""A driver with its own table, without asyncio: the handler drops what the program takes away."""

import mmubus.sync


class Driver(mmubus.Notifier):
    table: dict[int, tuple[int, int, int]] = {}  # address -> pfn, generation, rights

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        self.table = {at: entry for at, entry in self.table.items() if not start <= at < end}

    def commit(self, granted: mmubus.Translations) -> None:
        self.table.update({at: entry for at, *entry in granted})


with mmubus.sync.connect(name="my-driver") as bus:
    mm, driver = bus.create_mm("program"), Driver()
    address = mm.mmap(0, mmubus.PAGE_SIZE)
    registration = bus.register(driver, mm)
    registration.fault(address, address + mmubus.PAGE_SIZE, commit=driver.commit)
    mm.munmap(address, mmubus.PAGE_SIZE)  # returns when invalidate_range has
    print(f"held after munmap: {len(driver.table)} pages")
