"""Requests of variable size: a header that counts, and its entries behind it in one buffer."""

import ctypes
import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ostler.abi.kvm import requests
from ostler.abi.kvm.state import Cpuid2, CpuidEntry2, MsrEntry, MsrList, Msrs
from ostler.accel.transport import Channel, call
from ostler.errors import AccelError

Header = TypeVar("Header", bound=ctypes.Structure)
Entry = TypeVar("Entry", bound=ctypes.Structure)

_FIRST_GUESS = 64
_MOST_ENTRIES = 4096


def pack(header: ctypes.Structure, entries: Iterable[ctypes.Structure]) -> bytearray:
    """Header and entries as one buffer; the header counts already."""
    return bytearray(header) + b"".join(bytes(entry) for entry in entries)


def unpack(buffer: bytearray, header: type[Header], entry: type[Entry], count: int) -> list[Entry]:
    """The first `count` entries behind the header, copied."""
    start, step = ctypes.sizeof(header), ctypes.sizeof(entry)
    return [entry.from_buffer_copy(buffer, start + step * index) for index in range(count)]


def read_cpuid(channel: Channel, request: int) -> list[CpuidEntry2]:
    """Ask for a CPUID table, with a larger buffer until it fits."""
    room = _FIRST_GUESS
    while True:
        buffer = pack(Cpuid2(nent=room), ()) + bytes(room * ctypes.sizeof(CpuidEntry2))
        try:
            channel.ioctl(request, buffer)
        except OSError as error:
            if error.errno == errno.E2BIG and room < _MOST_ENTRIES:
                room *= 2
                continue
            raise AccelError(f"reading CPUID: {error.strerror}") from error
        return _without_padding(unpack(buffer, Cpuid2, CpuidEntry2, Cpuid2.from_buffer(buffer).nent))


def _without_padding(entries: list[CpuidEntry2]) -> list[CpuidEntry2]:
    """Kernels before 6.3 do not say how many entries of a vCPU's table they filled in: what is left is zero."""
    while entries and not any(bytes(entries[-1])):
        entries.pop()
    return entries


def write_cpuid(channel: Channel, entries: Sequence[CpuidEntry2], *, subject: str) -> None:
    """KVM_SET_CPUID2."""
    call(channel, requests.KVM_SET_CPUID2, pack(Cpuid2(nent=len(entries)), entries), subject=subject)


def read_msr_list(channel: Channel, request: int) -> list[int]:
    """Ask for a list of MSR indices."""
    room = _FIRST_GUESS
    while True:
        buffer = bytearray(MsrList(nmsrs=room)) + bytes(4 * room)
        try:
            channel.ioctl(request, buffer)
        except OSError as error:
            if error.errno == errno.E2BIG and room < _MOST_ENTRIES:
                room *= 2
                continue
            raise AccelError(f"reading the list of MSRs: {error.strerror}") from error
        count = MsrList.from_buffer(buffer).nmsrs
        return list(memoryview(buffer)[4 : 4 + 4 * count].cast("I"))


def read_msrs(channel: Channel, indices: Iterable[int], *, subject: str) -> dict[int, int]:
    """KVM_GET_MSRS; names the first MSR that cannot be read."""
    wanted = list(indices)
    buffer = pack(Msrs(nmsrs=len(wanted)), (MsrEntry(index=index) for index in wanted))
    done = call(channel, requests.KVM_GET_MSRS, buffer, subject=subject) if wanted else 0
    if done != len(wanted):
        raise AccelError(f"KVM_GET_MSRS ({subject}): MSR {wanted[done]:#x} cannot be read")
    return {entry.index: entry.data for entry in unpack(buffer, Msrs, MsrEntry, done)}


def write_msrs(channel: Channel, values: Mapping[int, int], *, subject: str) -> None:
    """KVM_SET_MSRS; names the first MSR refused, with its value."""
    wanted = list(values.items())
    buffer = pack(Msrs(nmsrs=len(wanted)), (MsrEntry(index=index, data=data) for index, data in wanted))
    done = call(channel, requests.KVM_SET_MSRS, buffer, subject=subject) if wanted else 0
    if done != len(wanted):
        index, data = wanted[done]
        raise AccelError(f"KVM_SET_MSRS ({subject}): MSR {index:#x} does not take {data:#x}")
