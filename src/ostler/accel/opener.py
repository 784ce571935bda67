"""`accel.open(name)`: from a name on the command line to an opened accelerator."""

from ostler.accel.vm import Accelerator
from ostler.errors import AccelUnavailable, BadRequest

NAMES = ("auto", "kvm", "soft")


def open_accelerator(name: str = "auto") -> Accelerator:
    """Open an accelerator by name; `auto` takes what `probe()` chose.

    Raises BadRequest for a name there is not, AccelUnavailable with the reason for one this host cannot give.
    """
    if name == "kvm":
        from ostler.accel.kvm import KvmSystem

        return Accelerator("kvm", KvmSystem(), pays_huge_pages=True)
    if name == "soft":
        from ostler.accel.soft import open_engine

        return Accelerator("soft", open_engine())
    if name != "auto":
        raise BadRequest(f"accelerator {name!r}: expected one of {', '.join(NAMES)}")
    from ostler.accel.probe import probe

    report = probe()
    if report.choice is None:
        raise AccelUnavailable(f"no accelerator: {report.kvm.text}; {report.soft_text}")
    return open_accelerator(report.choice)
