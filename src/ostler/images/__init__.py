"""Guest material: kernels and initrds that Ostler fetches, builds and caches itself.

`kernels.fetch(name)` gives a Debian kernel, `initrd.busybox(...)` something for it to run. Everything comes from
Debian packages through apt's own client, so the host's mirror, proxy and keys are used and every byte is verified.
"""

from ostler.images.kernels import DEFAULT_KERNEL, KERNELS, Kernel, KernelSource

__all__ = ["DEFAULT_KERNEL", "KERNELS", "Kernel", "KernelSource"]
