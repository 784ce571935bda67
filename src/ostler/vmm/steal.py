"""Telling a guest of the turns it had to wait for: its counter of stolen time.

KVM adds what the host's kernel made a processor's thread wait. It does not know of the time that the run loop was kept
out of the guest, which whoever did that is to add. The counter lives in guest memory, where KVM too only ever adds to
it, in the processor's thread: so it may be added to here, in the same thread, while the processor is out of the guest.

`struct kvm_steal_time` (Documentation/virt/kvm/x86/msr.rst): the counter in nanoseconds, and at 8 a version that is
odd while it changes.
"""

from __future__ import annotations

from collections.abc import Callable

from ostler.accel.api import VCPU
from ostler.errors import AccelError
from ostler.memory import GuestMemory
from ostler.memory.guest import MemoryFault

MSR_KVM_STEAL_TIME = 0x4B56_4D03
ENABLED, FLAGS = 1 << 0, 0x3F
VERSION_AT, STEAL_BYTES, VERSION_BYTES = 8, 8, 4


def teller(vcpu: VCPU, memory: GuestMemory) -> Callable[[int], None]:
    """What to call in the processor's thread with the nanoseconds it was kept out of the guest."""
    state = {"works": True}

    def tell(waited_ns: int) -> None:
        if not state["works"]:
            return
        try:
            value = vcpu.get_msrs([MSR_KVM_STEAL_TIME])[MSR_KVM_STEAL_TIME]
        except (AccelError, KeyError):
            # There is no such register: the accelerator's answer does not change.
            state["works"] = False
            return
        if value & ENABLED:
            add_steal(memory, value & ~FLAGS, waited_ns)

    return tell


def add_steal(memory: GuestMemory, gpa: int, waited_ns: int) -> None:
    """Add to the counter at `gpa`; where the guest named no memory, to nothing."""
    try:
        version = memory.read_int(gpa + VERSION_AT, VERSION_BYTES) | 1
        steal = memory.read_int(gpa, STEAL_BYTES) + waited_ns
        memory.write_int(gpa + VERSION_AT, VERSION_BYTES, version)
        memory.write_int(gpa, STEAL_BYTES, steal & (1 << 64) - 1)
        memory.write_int(gpa + VERSION_AT, VERSION_BYTES, (version + 1) & (1 << 32) - 1)
    except MemoryFault:
        return
