"""Machine checks: telling a guest that a page of its memory has gone bad (SDM volume 3, chapters 16 and 17).

A processor model with `mce` and `mca` has banks, which KVM keeps; no model by itself has them. The error is told as
found by scrubbing: not corrected, no processor was about to use it ("action optional"), so that the guest's kernel
takes the page away and lets its owner know. All processors are interrupted, as Intel's are.
"""

from __future__ import annotations

from collections.abc import Sequence

from ostler.abi.kvm.state import X86Mce
from ostler.accel.api import VCPU
from ostler.accel.models import CpuModel

FEATURES = frozenset({"mce", "mca"})
BANKS, CTL_P, SER_P = 10, 1 << 8, 1 << 24
MCG_CAP = BANKS | CTL_P | SER_P
# IA32_MCG_STATUS: execution can go on; being handled.
RIPV, MCIP = 1 << 0, 1 << 2
# IA32_MCi_STATUS.
VAL, UC, EN, MISCV, ADDRV, SIGNALLED = 1 << 63, 1 << 61, 1 << 60, 1 << 59, 1 << 58, 1 << 56
MEMORY_SCRUBBING = 0xC0
# IA32_MCi_MISC: the address is physical, and right down to bit 12.
PHYSICAL_PAGE = 2 << 6 | 12
MEMORY_BANK, OTHERS_BANK = 9, 1


def is_possible(model: CpuModel) -> bool:
    """Whether a guest with this model can be told."""
    return model.features >= FEATURES


def enable(vcpu: VCPU, model: CpuModel) -> None:
    """Give a new processor its banks, where its model has them."""
    if is_possible(model):
        vcpu.setup_mce(MCG_CAP)


def tell_of_bad_page(vcpus: Sequence[VCPU], gpa: int) -> None:
    """The page at `gpa` has lost its content. The processors do not run meanwhile."""
    status = VAL | UC | EN | MISCV | ADDRV | SIGNALLED | MEMORY_SCRUBBING
    vcpus[0].set_mce(
        X86Mce(status=status, addr=gpa, misc=PHYSICAL_PAGE, mcg_status=MCIP | RIPV, bank=MEMORY_BANK)
    )  # fmt: skip
    for other in vcpus[1:]:
        other.set_mce(X86Mce(status=VAL | UC, mcg_status=MCIP | RIPV, bank=OTHERS_BANK))
