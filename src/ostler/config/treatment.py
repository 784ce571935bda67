"""What a guest is given of the host, may ask of it, and what becomes of it when something goes wrong.

The same fields in a request for a guest and in the guest that is made of it. Their values where nobody says are
`ostler.config.defaults`'.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from ostler.config.calls import CallRights
from ostler.config.defaults import POLICIES, Fault, PlainTreatment
from ostler.config.schedule import Cap, HostCpus, Reserve, Weight, check_reserve, check_shares

_PLAIN = PlainTreatment()


def _among(fault: Fault) -> AfterValidator:
    choices = POLICIES[fault]

    def judge(value: str) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value

    return AfterValidator(judge)


OnPanic = Annotated[str, _among(Fault.PANIC)]
OnTripleFault = Annotated[str, _among(Fault.TRIPLE_FAULT)]
OnHang = Annotated[str, _among(Fault.HANG)]
OnDiskError = Annotated[str, _among(Fault.DISK_ERROR)]
OnNoSpace = Annotated[str, _among(Fault.NO_SPACE)]
OnBackendLost = Annotated[str, _among(Fault.BACKEND_LOST)]
OnMemoryError = Annotated[str, _among(Fault.MEMORY_ERROR)]


class Treatment(BaseModel):
    """These fields of a guest."""

    cpu_weight: Weight = Field(_PLAIN.cpu_weight, description="Shares of guests that compete are as their weights.")
    cpu_cap: Cap = Field(_PLAIN.cpu_cap, description="Percent of one host CPU it may use at most.")
    cpu_reserve: Reserve = Field(
        _PLAIN.cpu_reserve, description="Percent of one host CPU it is to have whatever others want."
    )
    cpu_pin: HostCpus = Field(_PLAIN.cpu_pin, description="Host CPUs it runs on.")
    calls: CallRights = Field(_PLAIN.calls, description="Of Ostler's own: log, keys, ready, snapshot, own; or none.")
    on_panic: OnPanic = Field(_PLAIN.on_panic, description="Its kernel panicked: poweroff, reset, pause, ignore.")
    on_triple_fault: OnTripleFault = Field(_PLAIN.on_triple_fault, description="poweroff, reset, pause.")
    on_hang: OnHang = Field(_PLAIN.on_hang, description="Its watchdog expired: poweroff, reset, pause, ignore.")
    on_disk_error: OnDiskError = Field(_PLAIN.on_disk_error, description="report, pause, poweroff.")
    on_no_space: OnNoSpace = Field(_PLAIN.on_no_space, description="Of a disk's file: pause, report, poweroff.")
    on_backend_lost: OnBackendLost = Field(_PLAIN.on_backend_lost, description="report, pause, poweroff.")
    on_memory_error: OnMemoryError = Field(
        _PLAIN.on_memory_error, description="poweroff, reset, pause, ignore, report."
    )

    def check_shares(self, cpus: int) -> None:
        """Raises ValueError for shares that a guest of so many processors cannot have."""
        check_shares(self.cpu_cap, self.cpu_reserve)
        check_reserve(self.cpu_reserve, cpus)

    @property
    def treatment(self) -> dict[str, Any]:
        """All of it, for the guest that is made of a request."""
        return {name: getattr(self, name) for name in Treatment.model_fields}
