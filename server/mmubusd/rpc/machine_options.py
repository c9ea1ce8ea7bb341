"""The server's configuration, as far as it is about the simulated machine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings

__all__ = ["MachineOptions"]


class MachineOptions(BaseSettings):
    """What the machine is made of; a state that was made with others is refused."""

    frames_nr: int = Field(
        1 << 20,
        ge=16,
        le=1 << 32,
        description=(
            "Page frames of 4096 bytes, all together; only used ones cost memory. Prevents one program from taking "
            "the machine's memory."
        ),
    )
    swap_slots_nr: int = Field(
        0,
        ge=0,
        le=1 << 32,
        description=(
            "Pages that the swap file holds, 0: there is none, and private memory cannot be reclaimed. A page in swap "
            "costs memory of the server like one in a frame, but a device cannot hold it."
        ),
    )
    nodes_nr: int = Field(
        1, ge=1, le=64, description="NUMA nodes that share the frames; OP_MOVE_PAGES moves between them."
    )
    thp: Literal["never", "madvise", "always"] = Field(
        "never",
        description="Which private memory gets huge pages: none, what MADV_HUGEPAGE asks for, all that has room; an "
        "address space may be made with another choice.",
    )
    shmem_enabled: Literal["never", "advise", "within_size", "always", "deny", "force"] = Field(
        "never",
        description="Which shared anonymous memory gets huge pages when it is first used, as Linux's setting of that "
        "name: none, what MADV_HUGEPAGE asks for, that and what does not reach beyond the end, all; deny and force "
        "count for files of tmpfs as well, whatever tmpfs_huge says.",
    )
    tmpfs_huge: Literal["never", "advise", "within_size", "always"] = Field(
        "never", description="Likewise for files of tmpfs (kind shm), as the option huge= of a mount."
    )
    hugetlb_nr: int = Field(
        0,
        ge=0,
        le=1 << 23,
        description=(
            "Huge pages of 2 MiB in hugetlb's pool (Linux: vm.nr_hugepages), for MAP_HUGETLB and files of hugetlbfs; "
            "they are taken out of the frames, and nobody else gets them."
        ),
    )
    profile: Literal["mainline", "v3"] = Field(
        "mainline",
        description=(
            "Whose call sites the memory manager has: the kernel's of today, or those of the notifiers' first patch "
            "series of 2008 (docs/call-sites.md)."
        ),
    )
    max_map_count: int = Field(
        65530,
        ge=16,
        le=1 << 24,
        description="Mappings of one address space, as vm.max_map_count; one more is refused with ENOMEM. Prevents one "
        "program's bookkeeping from filling the memory.",
    )
    oom_kill: bool = Field(
        False,
        description=(
            "When memory runs out and nothing can be reclaimed, end the largest address space, as Linux does. Default: "
            "who asks for more gets ENOMEM."
        ),
    )
    khugepaged_scan_sleep_s: float = Field(
        0.0,
        ge=0,
        description="Seconds between two passes of khugepaged, which makes huge pages of small ones where they are "
        "allowed (Linux: scan_sleep_millisecs); 0: none but those that somebody calls for. Prevents passes from taking "
        "the server's time.",
    )
    khugepaged_pages_to_scan: int = Field(
        4096, ge=512, le=1 << 32, description="Pages that khugepaged looks at in one pass; the next one goes on there."
    )
    khugepaged_max_ptes_none: int = Field(
        511, ge=0, le=511, description="Pages of a block that nobody has touched, with which it may still become huge."
    )
    khugepaged_max_ptes_swap: int = Field(
        64, ge=0, le=511, description="Likewise, pages that are in swap; they are read in."
    )
    khugepaged_max_ptes_shared: int = Field(
        256, ge=0, le=511, description="Likewise, pages that another address space has too; they are copied."
    )

    @model_validator(mode="after")
    def _has_room(self) -> MachineOptions:
        if self.hugetlb_nr and self.frames_nr < self.hugetlb_nr + 2 << 9:
            raise ValueError(
                f"hugetlb_nr: {self.frames_nr} frames have no room for {self.hugetlb_nr} huge pages of 512 and others"
            )
        return self
