# A driver with a table of its own, without asyncio: it drops what the program takes away.
import mmubus.sync


class Driver(dict[int, int], mmubus.Notifier):  # address -> frame
    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        for address in [address for address in self if start <= address < end]:
            del self[address]

    def age_page(self, mm: int, address: int) -> bool:
        return address in self


with mmubus.sync.connect(name="my-driver") as bus:
    mm, driver = bus.create_mm("program"), Driver()
    start = mm.mmap(0, mmubus.PAGE_SIZE)
    registration = bus.register(driver, mm)
    registration.fault(start, start + 4096, commit=lambda pages: driver.update({page[0]: page[1] for page in pages}))
    mm.munmap(start, mmubus.PAGE_SIZE)  # returns when invalidate_range has
    print(len(driver), "pages held after munmap")
