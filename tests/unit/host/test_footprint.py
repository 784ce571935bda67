"""What a range of memory costs the host, by smaps and pagemap."""

from __future__ import annotations

from ostler.host import footprint
from ostler.host.memfd import SharedMapping

PAGE = footprint.PAGE_BYTES
SMAPS = b"""\
1000-3000 rw-s 00000000 00:01 1 /memfd:ostler-guest (deleted)
Size:                  8 kB
Rss:                   8 kB
Pss:                   4 kB
Shared_Dirty:          4 kB
Referenced:            4 kB
Anonymous:             0 kB
KSM:                   0 kB
Swap:                  0 kB
VmFlags: rd wr sh mr mw me ms sd
3000-5000 rw-p 00000000 00:00 0
Rss:                   4 kB
Referenced:            4 kB
Anonymous:             4 kB
AnonHugePages:      2048 kB
Swap:                  4 kB
9000-a000 rw-p 00000000 00:00 0
Rss:                   4 kB
"""


def test_footprint_sums_mappings_of_the_range_only() -> None:
    found = footprint.footprint(0x1000, 0x4000, smaps=SMAPS)
    assert (found.present_bytes, found.share_bytes, found.shared_bytes) == (12 << 10, 4 << 10, 4 << 10)
    assert (found.private_bytes, found.huge_bytes, found.swapped_bytes) == (4 << 10, 2 << 20, 4 << 10)
    assert found.referenced_bytes == 8 << 10
    assert footprint.footprint(0x1000, 0x2000, smaps=SMAPS).present_bytes == 8 << 10


def test_footprint_of_real_memory_counts_what_was_touched() -> None:
    with SharedMapping("test", 64 * PAGE) as mapping, mapping.view() as view:
        view[0] = view[5 * PAGE] = 1
        assert footprint.footprint(mapping.address, mapping.size_bytes).present_bytes == 2 * PAGE
        flags = footprint.page_flags(mapping.address, 64)
        assert [page for page in range(64) if flags[page] & footprint.PRESENT] == [0, 5]
        footprint.advise(mapping.address + 5 * PAGE, PAGE, footprint.MADV_DONTDUMP)
        assert footprint.footprint(mapping.address + 5 * PAGE, PAGE).present_bytes == PAGE
        assert footprint.footprint(mapping.address, mapping.size_bytes).present_bytes == 2 * PAGE


def test_accessed_bits_come_back_with_the_next_access_only() -> None:
    with SharedMapping("test", 4096 * PAGE) as mapping, mapping.view() as view:
        for page in range(4096):
            view[page * PAGE] = 1
        footprint.forget_references()
        untouched = footprint.footprint(mapping.address, mapping.size_bytes).referenced_bytes
        for page in range(4096):
            view[page * PAGE] = 2
        touched = footprint.footprint(mapping.address, mapping.size_bytes).referenced_bytes
        # A page that stayed in the TLB in between may keep its bit away.
        assert untouched <= 256 * PAGE
        assert touched >= 2048 * PAGE
