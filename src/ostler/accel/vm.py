"""A virtual machine and the accelerator it comes from; the contract is `ostler.accel.api`."""

import ctypes
import errno
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from ostler.abi.kvm import board, requests, state
from ostler.abi.kvm.caps import Cap
from ostler.accel import tables
from ostler.accel.api import MsiRoute, Route
from ostler.accel.transport import SystemTransport, VmTransport, call
from ostler.accel.vcpu import Vcpu
from ostler.errors import AccelError

PAGE_SIZE = 4096
_WORD_PAGES = 64  # dirty bitmaps come in 64-bit words


class Vm:
    """A virtual machine."""

    def __init__(self, transport: VmTransport) -> None:
        self._transport = transport
        self._vcpus: list[Vcpu] = []
        self._slot_pages: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for vcpu in self._vcpus:
            vcpu.close()
        self._transport.close()

    def check_extension(self, cap: int) -> int:
        return self._call(requests.KVM_CHECK_EXTENSION, cap)

    def set_user_memory_region(self, slot: int, gpa: int, size: int, host_address: int, flags: int = 0) -> None:
        region = board.UserspaceMemoryRegion(
            slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=host_address
        )
        subject = f"slot {slot}, {size:#x} bytes at {gpa:#x}"
        self._call(requests.KVM_SET_USER_MEMORY_REGION, bytearray(region), subject)
        self._slot_pages[slot] = size // PAGE_SIZE

    def create_irqchip(self) -> None:
        self._call(requests.KVM_CREATE_IRQCHIP)

    def create_pit2(self) -> None:
        self._call(requests.KVM_CREATE_PIT2, bytearray(board.PitConfig(flags=board.KVM_PIT_SPEAKER_DUMMY)))

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        try:
            transport = self._transport.create_vcpu(vcpu_id)
        except OSError as error:
            raise AccelError(f"KVM_CREATE_VCPU (vCPU {vcpu_id}): {error.strerror or error}") from error
        vcpu = Vcpu(transport, vcpu_id)
        self._vcpus.append(vcpu)
        return vcpu

    def set_gsi_routing(self, routes: Iterable[Route]) -> None:
        entries = [_routing_entry(route) for route in routes]
        buffer = tables.pack(board.IrqRouting(nr=len(entries)), entries)
        self._call(requests.KVM_SET_GSI_ROUTING, buffer, f"{len(entries)} routes")

    def irq_line(self, gsi: int, level: int) -> None:
        self._call(requests.KVM_IRQ_LINE, bytearray(board.IrqLevel(irq=gsi, level=level)), f"GSI {gsi}")

    def signal_msi(self, address: int, data: int) -> bool:
        msi = board.Msi(address_lo=address & 0xFFFF_FFFF, address_hi=address >> 32, data=data)
        try:
            return self._transport.ioctl(requests.KVM_SIGNAL_MSI, bytearray(msi)) > 0
        except OSError as error:
            # KVM's "nobody took it" is -1, which looks like this errno.
            if error.errno == errno.EPERM:
                return False
            raise AccelError(f"KVM_SIGNAL_MSI ({data:#x} to {address:#x}): {error.strerror}") from error

    def irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None, deassign: bool = False) -> None:
        request = board.Irqfd(fd=fd, gsi=gsi)
        if resample_fd is not None:
            request.flags |= board.KVM_IRQFD_FLAG_RESAMPLE
            request.resamplefd = resample_fd
        if deassign:
            request.flags |= board.KVM_IRQFD_FLAG_DEASSIGN
        self._call(requests.KVM_IRQFD, bytearray(request), f"GSI {gsi}")

    def ioeventfd(
        self,
        fd: int,
        address: int,
        size: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        request = board.Ioeventfd(addr=address, len=size, fd=fd)
        if datamatch is not None:
            request.flags |= board.KVM_IOEVENTFD_FLAG_DATAMATCH
            request.datamatch = datamatch
        request.flags |= board.KVM_IOEVENTFD_FLAG_PIO * pio | board.KVM_IOEVENTFD_FLAG_DEASSIGN * deassign
        self._call(requests.KVM_IOEVENTFD, bytearray(request), f"{size} bytes at {address:#x}")

    def get_dirty_log(self, slot: int) -> bytearray:
        bitmap = bytearray(_bitmap_size(self._slot_pages.get(slot, 0)))
        if bitmap:
            with_address = (ctypes.c_uint8 * len(bitmap)).from_buffer(bitmap)
            request = board.DirtyLog(slot=slot, dirty_bitmap=ctypes.addressof(with_address))
            self._call(requests.KVM_GET_DIRTY_LOG, bytearray(request), f"slot {slot}")
        return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, page_count: int, bitmap: bytes | bytearray) -> None:
        wanted = _bitmap_size(page_count)
        if len(bitmap) < wanted:
            raise ValueError(f"dirty bitmap of {len(bitmap)} bytes: {wanted} expected for {page_count} pages")
        pages = (ctypes.c_uint8 * wanted).from_buffer_copy(bitmap)
        request = board.ClearDirtyLog(
            slot=slot, num_pages=page_count, first_page=first_page, dirty_bitmap=ctypes.addressof(pages)
        )
        self._call(requests.KVM_CLEAR_DIRTY_LOG, bytearray(request), f"slot {slot}")

    def collect_writes(self, address: int, size: int, *, pio: bool = False, stop: bool = False) -> None:
        zone = board.CoalescedMmioZone(addr=address, size=size, pio=pio)
        request = requests.KVM_UNREGISTER_COALESCED_MMIO if stop else requests.KVM_REGISTER_COALESCED_MMIO
        self._call(request, bytearray(zone), f"{size} bytes at {address:#x}")

    def reset_dirty_rings(self) -> int:
        return self._call(requests.KVM_RESET_DIRTY_RINGS)

    def enable_cap(self, cap: int, *args: int) -> None:
        request = state.EnableCap(cap=cap)
        request.args[: len(args)] = args
        name = Cap(cap).name if cap in Cap.__members__.values() else str(cap)
        self._call(requests.KVM_ENABLE_CAP, bytearray(request), f"KVM_CAP_{name}")

    def get_clock(self) -> board.ClockData:
        buffer = bytearray(ctypes.sizeof(board.ClockData))
        self._call(requests.KVM_GET_CLOCK, buffer)
        return board.ClockData.from_buffer(buffer)

    def set_clock(self, clock: board.ClockData) -> None:
        self._call(requests.KVM_SET_CLOCK, bytearray(clock))

    def get_irqchip(self, chip_id: int) -> board.Irqchip:
        buffer = bytearray(board.Irqchip(chip_id=chip_id))
        self._call(requests.KVM_GET_IRQCHIP, buffer, f"chip {chip_id}")
        return board.Irqchip.from_buffer(buffer)

    def set_irqchip(self, chip: board.Irqchip) -> None:
        self._call(requests.KVM_SET_IRQCHIP, bytearray(chip), f"chip {chip.chip_id}")

    def get_pit2(self) -> board.PitState2:
        buffer = bytearray(ctypes.sizeof(board.PitState2))
        self._call(requests.KVM_GET_PIT2, buffer)
        return board.PitState2.from_buffer(buffer)

    def set_pit2(self, pit: board.PitState2) -> None:
        self._call(requests.KVM_SET_PIT2, bytearray(pit))

    def memory_written(self, gpa: int, size: int) -> None:
        self._transport.invalidate(gpa, size)

    def statistics(self) -> dict[str, int]:
        return self._transport.stats()

    def _call(self, request: int, arg: bytearray | int = 0, subject: str = "") -> int:
        return call(self._transport, request, arg, subject=subject)


class Accelerator:
    """An opened accelerator over either carrier."""

    def __init__(self, name: str, transport: SystemTransport, *, pays_huge_pages: bool = False) -> None:
        self._name = name
        self._pays_huge_pages = pays_huge_pages
        self._transport = transport

    @property
    def name(self) -> str:
        return self._name

    @property
    def pays_huge_pages(self) -> bool:
        return self._pays_huge_pages

    def close(self) -> None:
        self._transport.close()

    def check_extension(self, cap: int) -> int:
        return call(self._transport, requests.KVM_CHECK_EXTENSION, cap)

    def create_vm(self) -> Vm:
        try:
            return Vm(self._transport.create_vm())
        except OSError as error:
            raise AccelError(f"KVM_CREATE_VM: {error.strerror or error}") from error

    def get_supported_cpuid(self) -> list[state.CpuidEntry2]:
        return tables.read_cpuid(self._transport, requests.KVM_GET_SUPPORTED_CPUID)

    def get_msr_index_list(self) -> list[int]:
        return tables.read_msr_list(self._transport, requests.KVM_GET_MSR_INDEX_LIST)

    def get_feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        offered = tables.read_msr_list(self._transport, requests.KVM_GET_MSR_FEATURE_INDEX_LIST)
        known = [index for index in indices if index in offered]
        return tables.read_msrs(self._transport, known, subject="features")


def _bitmap_size(page_count: int) -> int:
    return (page_count + _WORD_PAGES - 1) // _WORD_PAGES * (_WORD_PAGES // 8)


def _routing_entry(route: Route) -> board.IrqRoutingEntry:
    entry = board.IrqRoutingEntry(gsi=route.gsi)
    if isinstance(route, MsiRoute):
        entry.type = board.KVM_IRQ_ROUTING_MSI
        entry.u.msi = board.IrqRoutingMsi(
            address_lo=route.address & 0xFFFF_FFFF, address_hi=route.address >> 32, data=route.data
        )
    else:
        entry.type = board.KVM_IRQ_ROUTING_IRQCHIP
        entry.u.irqchip = board.IrqRoutingIrqchip(irqchip=route.chip, pin=route.pin)
    return entry
