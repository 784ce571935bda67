"""One virtual CPU over either carrier; the contract is `ostler.accel.api.VCPU`."""

import ctypes
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ostler.abi.kvm import requests, state
from ostler.abi.kvm.run import KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_EXIT_IO_OUT, Run
from ostler.accel import tables
from ostler.accel.exits import DebugStop, ExitReason, FailEntry, InternalError, Mmio, PortIo, SystemEvent
from ostler.accel.rings import PAGE_SIZE, CoalescedRing, CollectedWrite, DirtyRing
from ostler.accel.transport import VcpuTransport, call
from ostler.errors import AccelError

S = TypeVar("S", bound=ctypes.Structure)

COALESCED_AT = KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE
_EXITS_AT = Run.exits.offset
_REASON_WORD = Run.exit_reason.offset // 4
_IO = struct.Struct("<BBHIQ")  # RunIo
_MMIO = struct.Struct("<Q8xIB")  # RunMmio
_MMIO_DATA_AT = _EXITS_AT + 8
_REASONS: dict[int, ExitReason] = {int(reason): reason for reason in ExitReason}


class Exit:
    """The current exit, read from the shared page when asked for."""

    __slots__ = ("_page", "_run")

    def __init__(self, page: memoryview, run: Run) -> None:
        self._page = page
        self._run = run

    @property
    def io(self) -> PortIo:
        direction, size, port, count, at = _IO.unpack_from(self._page, _EXITS_AT)
        return PortIo(direction == KVM_EXIT_IO_OUT, port, size, count, self._page[at : at + size * count])

    @property
    def mmio(self) -> Mmio:
        address, length, is_write = _MMIO.unpack_from(self._page, _EXITS_AT)
        return Mmio(is_write != 0, address, self._page[_MMIO_DATA_AT : _MMIO_DATA_AT + length])

    @property
    def debug(self) -> DebugStop:
        stop = self._run.debug
        return DebugStop(stop.exception, stop.pc, stop.dr6, stop.dr7)

    @property
    def system_event(self) -> SystemEvent:
        event = self._run.system_event
        return SystemEvent(event.type, tuple(event.data[: event.ndata]))

    @property
    def internal(self) -> InternalError:
        error = self._run.internal
        return InternalError(error.suberror, tuple(error.data[: error.ndata]))

    @property
    def fail_entry(self) -> FailEntry:
        failure = self._run.fail_entry
        return FailEntry(failure.hardware_entry_failure_reason, failure.cpu)

    @property
    def hardware_reason(self) -> int:
        return int(self._run.hw.hardware_exit_reason)


class Vcpu:
    """A virtual CPU."""

    def __init__(self, transport: VcpuTransport, vcpu_id: int) -> None:
        self._transport = transport
        self._id = vcpu_id
        self._subject = f"vCPU {vcpu_id}"
        self._enter = transport.run
        page = transport.run_page
        self._run = Run.from_buffer(page)
        # What every exit reads, without a structure's field in between.
        self._words = page[:_EXITS_AT].cast("I")
        self._exit = Exit(page, self._run)

    @property
    def id(self) -> int:
        return self._id

    @property
    def exit(self) -> Exit:
        return self._exit

    @property
    def immediate_exit(self) -> bool:
        return bool(self._run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._run.immediate_exit = value

    def run(self) -> ExitReason:
        try:
            self._enter()
        except InterruptedError:
            return ExitReason.INTR
        except OSError as error:
            raise AccelError(f"KVM_RUN ({self._subject}): {error.strerror or error}") from error
        number = self._words[_REASON_WORD]
        try:
            return _REASONS[number]
        except KeyError:
            raise AccelError(f"KVM_RUN ({self._subject}): exit reason {number} is unknown") from None

    def kick(self) -> None:
        self._transport.kick()

    def nmi(self) -> None:
        self._call(requests.KVM_NMI)

    def setup_mce(self, mcg_cap: int) -> None:
        self._call(requests.KVM_X86_SETUP_MCE, bytearray(mcg_cap.to_bytes(8, "little")))

    def set_mce(self, mce: state.X86Mce) -> None:
        self._call(requests.KVM_X86_SET_MCE, bytearray(mce))

    def get_regs(self) -> state.Regs:
        return self._get(requests.KVM_GET_REGS, state.Regs)

    def set_regs(self, regs: state.Regs) -> None:
        self._call(requests.KVM_SET_REGS, bytearray(regs))

    def get_sregs(self) -> state.Sregs:
        return self._get(requests.KVM_GET_SREGS, state.Sregs)

    def set_sregs(self, sregs: state.Sregs) -> None:
        self._call(requests.KVM_SET_SREGS, bytearray(sregs))

    def get_fpu(self) -> state.Fpu:
        return self._get(requests.KVM_GET_FPU, state.Fpu)

    def set_fpu(self, fpu: state.Fpu) -> None:
        self._call(requests.KVM_SET_FPU, bytearray(fpu))

    def get_xsave(self) -> state.Xsave:
        return self._get(requests.KVM_GET_XSAVE, state.Xsave)

    def set_xsave(self, xsave: state.Xsave) -> None:
        self._call(requests.KVM_SET_XSAVE, bytearray(xsave))

    def get_xcrs(self) -> state.Xcrs:
        return self._get(requests.KVM_GET_XCRS, state.Xcrs)

    def set_xcrs(self, xcrs: state.Xcrs) -> None:
        self._call(requests.KVM_SET_XCRS, bytearray(xcrs))

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        return tables.read_msrs(self._transport, indices, subject=self._subject)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        tables.write_msrs(self._transport, values, subject=self._subject)

    def get_debugregs(self) -> state.Debugregs:
        return self._get(requests.KVM_GET_DEBUGREGS, state.Debugregs)

    def set_debugregs(self, debugregs: state.Debugregs) -> None:
        self._call(requests.KVM_SET_DEBUGREGS, bytearray(debugregs))

    def get_lapic(self) -> state.LapicState:
        return self._get(requests.KVM_GET_LAPIC, state.LapicState)

    def set_lapic(self, lapic: state.LapicState) -> None:
        self._call(requests.KVM_SET_LAPIC, bytearray(lapic))

    def get_vcpu_events(self) -> state.VcpuEvents:
        return self._get(requests.KVM_GET_VCPU_EVENTS, state.VcpuEvents)

    def set_vcpu_events(self, events: state.VcpuEvents) -> None:
        self._call(requests.KVM_SET_VCPU_EVENTS, bytearray(events))

    def get_mp_state(self) -> int:
        return int(self._get(requests.KVM_GET_MP_STATE, state.MpState).mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        self._call(requests.KVM_SET_MP_STATE, bytearray(state.MpState(mp_state=mp_state)))

    def get_cpuid2(self) -> list[state.CpuidEntry2]:
        return tables.read_cpuid(self._transport, requests.KVM_GET_CPUID2)

    def set_cpuid2(self, entries: Sequence[state.CpuidEntry2]) -> None:
        tables.write_cpuid(self._transport, entries, subject=self._subject)

    def get_tsc_khz(self) -> int:
        return self._call(requests.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        self._call(requests.KVM_SET_TSC_KHZ, khz)

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        debug = state.GuestDebug(control=control)
        debug.debugreg[: len(debugreg)] = debugreg
        self._call(requests.KVM_SET_GUEST_DEBUG, bytearray(debug))

    def translate(self, linear: int) -> state.Translation:
        buffer = bytearray(state.Translation(linear_address=linear))
        self._call(requests.KVM_TRANSLATE, buffer)
        return state.Translation.from_buffer(buffer)

    def kvmclock_ctrl(self) -> None:
        self._call(requests.KVM_KVMCLOCK_CTRL)

    def collected_writes(self) -> list[CollectedWrite]:
        page = self._transport.run_page[COALESCED_AT : COALESCED_AT + PAGE_SIZE]
        return CoalescedRing(page).drain() if len(page) == PAGE_SIZE else []

    def dirty_ring(self, size_bytes: int) -> DirtyRing:
        fd = getattr(self._transport, "fd", None)
        if fd is None:
            raise AccelError(f"dirty ring ({self._subject}): this accelerator has none")
        try:
            return DirtyRing(fd, size_bytes)
        except OSError as error:
            raise AccelError(f"dirty ring ({self._subject}): {error.strerror or error}") from error

    def close(self) -> None:
        self._transport.close()

    def _call(self, request: int, arg: bytearray | int = 0) -> int:
        return call(self._transport, request, arg, subject=self._subject)

    def _get(self, request: int, kind: type[S]) -> S:
        buffer = bytearray(ctypes.sizeof(kind))
        self._call(request, buffer)
        return kind.from_buffer(buffer)
