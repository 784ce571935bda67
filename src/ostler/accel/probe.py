"""What this host can do, measured: the reason behind `--accel auto`, and a page of `ostler doctor`.

That /dev/kvm opens says little: it may belong to a kernel module that emulates every instruction of a
guest, or to a hypervisor that forgot it. So a short loop is timed on it (`ostler.accel.timing`), in a
child process, which a KVM that hangs cannot keep us from killing, and compared with the host's own speed at
the same loop. The verdict holds until the next boot and is cached as long.
"""

import enum
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from ostler.accel.kvm import KvmSystem
from ostler.accel.soft import open_engine
from ostler.errors import AccelUnavailable

TIMEOUT_S = 10.0

# A processor with virtualisation runs guests at its own speed; emulation is a hundred times slower.
_NATIVE_SHARE = 0.25

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_VERSION = 1


class KvmState(enum.Enum):
    """What /dev/kvm turned out to be."""

    NATIVE = "native"
    EMULATED = "emulated"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class KvmReport:
    """The verdict on KVM. Rates are millions of instructions a second; 0 where none was measured."""

    state: KvmState
    text: str
    guest_mips: float = 0.0
    host_mips: float = 0.0
    cached: bool = False


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What `auto` chooses (`kvm`, `soft` or None) and everything it looked at, each text one line."""

    choice: str | None
    kvm: KvmReport
    soft_available: bool
    soft_text: str

    @property
    def text(self) -> str:
        """Why, in one line."""
        if self.choice == "kvm":
            return f"kvm: {self.kvm.text}"
        if self.choice == "soft":
            return f"soft: {self.kvm.text}"
        return f"no accelerator: {self.kvm.text}; {self.soft_text}"


def probe(*, cache: bool = True) -> ProbeReport:
    """Look at both accelerators. Takes up to TIMEOUT_S at the first call after a boot; raises nothing."""
    try:
        open_engine().close()
        soft_available, soft_text = True, "the software CPU is built"
    except AccelUnavailable as error:
        soft_available, soft_text = False, str(error)
    kvm = probe_kvm(cache=cache)
    choice = "soft" if soft_available else None
    if kvm.state is KvmState.NATIVE:
        choice = "kvm"
    return ProbeReport(choice, kvm, soft_available, soft_text)


def probe_kvm(*, cache: bool = True) -> KvmReport:
    """Open KVM and, unless this boot's verdict is cached, time it."""
    try:
        KvmSystem().close()
    except AccelUnavailable as error:
        return KvmReport(KvmState.UNAVAILABLE, str(error))
    path = _cache_path()
    if cache and (known := _load(path)) is not None:
        return known
    report = _judge(_measure())
    # A failure may be a passing one (memory short, another hypervisor at work): ask again next time.
    if cache and report.state is not KvmState.FAILED:
        _store(path, report)
    return report


def warning(name: str) -> str | None:
    """What a user who insists on accelerator `name` should know, in one line; None where there is nothing."""
    if name != "kvm":
        return None
    kvm = probe_kvm()
    if kvm.state is KvmState.EMULATED:
        return f"{kvm.text}: guests are many times slower than with --accel soft"
    return kvm.text if kvm.state is KvmState.FAILED else None


def _measure() -> tuple[float, float] | str:
    """Guest's and host's rate, or what went wrong."""
    import subprocess

    command = [sys.executable, "-m", "ostler.accel.timing"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"a short loop did not end in {TIMEOUT_S:g} s"
    except OSError as error:
        return f"the timing process did not start: {error.strerror}"
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        return f"a short loop failed: {lines[-1]}"
    guest, host = child.stdout.split()
    return float(guest), float(host)


def _judge(measured: tuple[float, float] | str) -> KvmReport:
    if isinstance(measured, str):
        return KvmReport(KvmState.FAILED, f"KVM is not usable: {measured}")
    guest, host = measured
    rates = f"{guest:,.1f} M instructions/s, the host itself {host:,.1f}"
    if guest >= host * _NATIVE_SHARE:
        return KvmReport(KvmState.NATIVE, f"KVM runs at native speed ({rates})", guest, host)
    return KvmReport(KvmState.EMULATED, f"KVM here emulates its guests ({rates})", guest, host)


def _cache_path() -> Path:
    return Path(platformdirs.user_cache_dir("ostler")) / "accel-probe.json"


def _key() -> dict[str, str | int]:
    return {"version": _VERSION, "boot": _BOOT_ID.read_text().strip(), "release": os.uname().release}


def _load(path: Path) -> KvmReport | None:
    """The cached verdict; anything unexpected in the file counts as no cache."""
    try:
        entry = json.loads(path.read_text())
        if entry["key"] != _key():
            return None
        fields = entry["report"]
        return KvmReport(
            KvmState(fields["state"]),
            str(fields["text"]),
            float(fields["guest_mips"]),
            float(fields["host_mips"]),
            cached=True,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, report: KvmReport) -> None:
    """Best effort: a home that cannot be written costs a second at the next start, no more."""
    import tempfile

    fields = asdict(report) | {"state": report.state.value}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"key": _key(), "report": fields}, file)
        Path(file.name).replace(path)
    except OSError:
        return
