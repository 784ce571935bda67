"""A guest gives memory back and uses it again: the host's share of it follows."""

from __future__ import annotations

import time
from collections.abc import Callable

from ostler import accel
from ostler.boot.load import read_kernel
from ostler.config import parse_guest
from ostler.devices.virtio.balloon import Balloon
from ostler.images import initrd, kernels
from ostler.testing.watched import Watched
from tests.guest.devices_guest import module_files

MIB = 1 << 20
MEMORY_MIB, KEPT_MIB, USED_MIB = 512, 256, 300
INIT = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module || echo "FAILED $module"; done
free() {{ awk '/^MemFree:/ {{ print int($2 / 1024) }}' /proc/meminfo; }}
mount -t tmpfs -o size={USED_MIB + 10}M tmpfs /mnt
dd if=/dev/zero of=/mnt/used bs=1M count={USED_MIB} 2>/dev/null
echo "step: used"
sleep 1; rm /mnt/used
echo "step: freed"
while [ "$(free)" -gt {KEPT_MIB - 40} ]; do sleep 0.2; done
echo "step: inflated"
while [ "$(free)" -lt {USED_MIB + 60} ]; do sleep 0.2; done
dd if=/dev/zero of=/mnt/used bs=1M count={USED_MIB} 2>/dev/null && echo "step: used again"
sleep 1
poweroff -f
""".encode()


def test_balloon_gives_memory_back_and_takes_it_again() -> None:
    kernel = kernels.fetch("debian-12-cloud")
    loaded = module_files(kernel, "virtio_pci", "virtio_balloon")
    ramdisk = initrd.build({"init": INIT, "bin/busybox": initrd.busybox_program().read_bytes(), **loaded})
    spec = parse_guest(
        kernel=kernel.image, initrd=ramdisk, append="console=ttyS0 quiet panic=-1", accel="soft", balloon=True,
        memory=MEMORY_MIB * MIB,
    )  # fmt: skip
    opened = accel.open("soft")
    watched = Watched(spec, opened)
    machine = watched.process.machine
    balloon = machine.devices["balloon"]
    assert isinstance(balloon, Balloon)
    seen: dict[str, int] = {}
    targets: dict[str, Callable[[], None]] = {
        "freed": lambda: balloon.set_target(KEPT_MIB * MIB),
        "inflated": lambda: balloon.set_target(MEMORY_MIB * MIB),
    }
    timer = watched.process.loop.new_timer(lock=watched.process.lock)

    def look() -> None:
        """Twice a second: the guest's steps, and how much the host has for it then."""
        held_mib = machine.memory.touched_bytes // MIB
        for step in ("used", "freed", "inflated", "used again"):
            if f"step: {step}\r\n".encode() in watched.console and step not in seen:
                seen[step] = held_mib
                targets.get(step, lambda: None)()
        timer.arm(time.monotonic_ns() + 500_000_000)

    timer.call(look)
    try:
        machine.load(read_kernel(spec.kernel), initrd=ramdisk.read_bytes(), cmdline=spec.append)
        timer.arm(1)
        watched.run()
    finally:
        watched.close()
        opened.close()

    assert seen.keys() == {"used", "freed", "inflated", "used again"}, watched.console[-2000:]
    assert seen["used"] >= USED_MIB
    assert seen["inflated"] <= KEPT_MIB * 1.1
    assert seen["used again"] >= USED_MIB
    assert balloon.statistics == {} or balloon.statistics["total_memory"] > 0
