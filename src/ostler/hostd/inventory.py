"""What the host is and has, from /proc and /sys; what cannot be read is not there."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from pathlib import Path

from ostler.host.folders import cache_root
from ostler.hostd import admission
from ostler.hostd.models import (
    AcceleratorFacts,
    CpuFacts,
    DiskFacts,
    HostStats,
    Inventory,
    MemoryFacts,
    NetworkFacts,
)

_SECTOR = 512
_VIRTUAL_DISKS = ("loop", "ram", "zram", "dm-", "md")


def inventory(*, root: Path = Path("/"), probe: bool = True) -> Inventory:
    """Look at everything. `probe` tries the accelerators, which takes a moment the first time."""
    return Inventory(
        hostname=socket.gethostname(), kernel=platform.release(), cpu=_cpu(root), memory=_memory(root),
        disks=_disks(), networks=_networks(root), accelerators=_accelerators() if probe else [],
    )  # fmt: skip


def capacities(found: Inventory) -> dict[str, int]:
    """What of it can be promised, before anything is kept for the host."""
    return {
        admission.MEMORY: found.memory.size_bytes,
        admission.CPU: found.cpu.count * 1000,
        admission.DISK: max((each.free_bytes for each in found.disks), default=0),
    }


def host_stats(*, root: Path = Path("/")) -> HostStats:
    """What is in use now, and what has been used since the host's boot."""
    ticks = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    first = (_read(root / "proc/stat").splitlines() or ["cpu"])[0].split()[1:]
    user, nice, system, idle, iowait, irq, softirq, steal = [int(each) for each in (*first, *["0"] * 8)[:8]]
    memory = _meminfo(root)
    read, written = _disk_bytes(root)
    received, sent = _net_bytes(root)
    return HostStats(
        time=time.time(), cpus=os.cpu_count() or 1,
        cpu_busy_ns=(user + nice + system + irq + softirq) * ticks, cpu_idle_ns=(idle + iowait) * ticks,
        cpu_steal_ns=steal * ticks, memory_bytes=memory.get("MemTotal", 0),
        memory_available_bytes=memory.get("MemAvailable", 0), disk_read_bytes=read, disk_written_bytes=written,
        net_received_bytes=received, net_sent_bytes=sent,
    )  # fmt: skip


def _cpu(root: Path) -> CpuFacts:
    sockets, cores = set(), set()
    folders = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))
    for folder in folders:
        package, core = (_read(folder / "topology" / name) for name in ("physical_package_id", "core_id"))
        if package:
            sockets.add(package)
            cores.add((package, core))
    model = next(
        (line.partition(":")[2].strip() for line in _read(root / "proc/cpuinfo").splitlines()
         if line.startswith("model name")), "unknown",
    )  # fmt: skip
    online = os.cpu_count() or 1
    nodes = len([*(root / "sys/devices/system/node").glob("node[0-9]*")])
    return CpuFacts(
        count=len(os.sched_getaffinity(0)), online=online, model=model, sockets=max(1, len(sockets)),
        cores=len(cores) or online, threads_per_core=max(1, len(folders) // max(1, len(cores))),
        numa_nodes=max(1, nodes),
    )  # fmt: skip


def _memory(root: Path) -> MemoryFacts:
    found = _meminfo(root)
    return MemoryFacts(
        size_bytes=found.get("MemTotal", 0), available_bytes=found.get("MemAvailable", 0),
        swap_bytes=found.get("SwapTotal", 0), huge_page_bytes=found.get("Hugepagesize", 0),
        huge_pages=found.get("HugePages_Total", 0), huge_pages_free=found.get("HugePages_Free", 0),
    )  # fmt: skip


def _meminfo(root: Path) -> dict[str, int]:
    found = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words:
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _disks() -> list[DiskFacts]:
    """The file systems guests' disks are on: where throw-away layers and images are, and where snapshots go."""
    from ostler.snapshot import store

    found: dict[int, DiskFacts] = {}
    for wanted in (cache_root(), store.root()):
        place = next((each for each in (wanted, *wanted.parents) if each.exists()), Path("/"))
        with contextlib.suppress(OSError):
            facts, device = os.statvfs(place), place.stat().st_dev
            found.setdefault(
                device,
                DiskFacts(
                    path=str(place), size_bytes=facts.f_blocks * facts.f_frsize,
                    free_bytes=facts.f_bavail * facts.f_frsize,
                ),
            )  # fmt: skip
    return [*found.values()]


def _networks(root: Path) -> list[NetworkFacts]:
    addresses = _addresses()
    found = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        speed = _read(folder / "speed")
        found.append(
            NetworkFacts(
                name=folder.name, mac=_read(folder / "address") or None, mtu=int(_read(folder / "mtu") or 0),
                is_up=_read(folder / "operstate") in {"up", "unknown"},
                speed_bytes_per_s=int(speed) * 125_000 if speed.isdigit() else None,
                addresses=addresses.get(folder.name, []),
            )
        )  # fmt: skip
    return found


def _addresses() -> dict[str, list[str]]:
    """By interface, with their prefixes, as netlink knows them."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(Exception):
        from pyroute2 import IPRoute

        with IPRoute() as route:
            names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
            for each in route.get_addr():
                text = f"{each.get_attr('IFA_ADDRESS')}/{each['prefixlen']}"
                found.setdefault(names.get(each["index"], "?"), []).append(text)
    return found


def _accelerators() -> list[AcceleratorFacts]:
    from ostler import accel
    from ostler.errors import OstlerError

    found = []
    for name in ("kvm", "soft"):
        try:
            opened = accel.open(name)
            opened.close()
            found.append(AcceleratorFacts(name=name, usable=True, detail="runs guests"))
        except OstlerError as error:
            found.append(AcceleratorFacts(name=name, usable=False, detail=" ".join(str(error).split())))
    return found


def _disk_bytes(root: Path) -> tuple[int, int]:
    read = written = 0
    whole = {each.name for each in (root / "sys/block").glob("*")}
    for line in _read(root / "proc/diskstats").splitlines():
        words = line.split()
        if words[2] in whole and not words[2].startswith(_VIRTUAL_DISKS):
            read += int(words[5]) * _SECTOR
            written += int(words[9]) * _SECTOR
    return read, written


def _net_bytes(root: Path) -> tuple[int, int]:
    received = sent = 0
    for line in _read(root / "proc/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        words = rest.split()
        if name.strip() != "lo" and len(words) > 8:
            received += int(words[0])
            sent += int(words[8])
    return received, sent


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
