"""The kernel's carrier: /dev/kvm, its file descriptors, and the shared page of each vCPU.

Kicking a vCPU must not lose the race against its entering the guest, and must not need a signal
handler, which Python installs in the main thread only. So the kick signal stays blocked in a vCPU's
thread and KVM unblocks it for the time of KVM_RUN (KVM_SET_SIGNAL_MASK): a signal that arrives too
early is pending and ends KVM_RUN at once; `run()` then takes it off the thread's queue. The process
ignores it: blocked it is kept pending all the same (signal(7)), and one that comes when its thread has
ended, and its number is another's, does nothing. So `kick()` needs not know whether the thread is in the
guest, and the way into it, which every exit takes, has no lock on it.
"""

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import signal
import threading

from ostler.abi.kvm import requests
from ostler.abi.kvm.run import Run
from ostler.accel.transport import require_features
from ostler.errors import AccelUnavailable

KICK_SIGNAL = signal.SIGRTMIN + 3

# Intel's processors need three pages of guest-physical space for real mode and one for identity
# paging; here, just under the BIOS image below 4 GiB, no board has memory.
_IDENTITY_MAP_GPA = 0xFFFB_C000
_TSS_GPA = 0xFFFB_D000

# fcntl.ioctl takes a C int where the kernel takes an unsigned long.
_FCNTL_INT_MAX = 0x7FFF_FFFF

_libc = ctypes.CDLL(None, use_errno=True)


class _Descriptor:
    """Owner of one of KVM's file descriptors."""

    # A constructor that fails before it has a descriptor still meets __del__.
    _fd = -1

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ioctl(self, request: int, arg: bytearray | int = 0) -> int:
        if isinstance(arg, int) and arg > _FCNTL_INT_MAX:
            return _ioctl_long(self._fd, request, arg)
        return fcntl.ioctl(self._fd, request, arg)

    @property
    def fd(self) -> int:
        """Stays owned by this object."""
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class KvmVcpu(_Descriptor):
    """A vCPU's file descriptor and page."""

    def __init__(self, fd: int, page_size: int) -> None:
        super().__init__(fd)
        self._page = memoryview(mmap.mmap(fd, page_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
        self._run = Run.from_buffer(self._page)
        self._lock = threading.Lock()
        self._runner: int | None = None  # get_ident() of the thread whose signal mask KVM knows
        self._runner_tid = 0  # and its number for tgkill(2)
        self._kicked = False

    @property
    def run_page(self) -> memoryview:
        return self._page

    def run(self) -> None:
        if threading.get_ident() != self._runner:
            self._prepare()
        while True:
            try:
                fcntl.ioctl(self._fd, requests.KVM_RUN, 0)
            except BlockingIOError:
                # A vCPU that waited for INIT or SIPI says EAGAIN when it got one.
                continue
            except InterruptedError:
                self._take_kick()
                raise
            return

    def kick(self) -> None:
        with self._lock:
            self._kicked = True
            self._run.immediate_exit = 1
            if self._runner_tid:
                # The thread may have ended: then there is nobody to interrupt.
                _libc.tgkill(os.getpid(), self._runner_tid, KICK_SIGNAL)

    def _take_kick(self) -> None:
        # Under the lock, so that a kick's signal has been sent by the time its flag is seen.
        with self._lock:
            if self._kicked:
                self._kicked = False
                self._run.immediate_exit = 0
            # Taken even if another vCPU of this thread was meant: left pending it would end every run from now on.
            while signal.sigtimedwait({KICK_SIGNAL}, 0) is not None:
                pass

    def _prepare(self) -> None:
        _ignore_kicks()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        bits = sum(1 << (number - 1) for number in blocked if number != KICK_SIGNAL)
        mask = requests.SignalMask8(len=8, sigset=(ctypes.c_uint8 * 8)(*bits.to_bytes(8, "little")))
        fcntl.ioctl(self._fd, requests.KVM_SET_SIGNAL_MASK, bytearray(mask))
        with self._lock:
            self._runner, self._runner_tid = threading.get_ident(), threading.get_native_id()


@functools.cache
def _ignore_kicks() -> None:
    """Python's own `signal.signal` works in the main thread only; ignoring needs no handler of Python's."""
    _libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    _libc.signal(KICK_SIGNAL, ctypes.c_void_p(int(signal.SIG_IGN)))


class KvmVm(_Descriptor):
    """A VM's file descriptor."""

    def __init__(self, fd: int, page_size: int) -> None:
        super().__init__(fd)
        self._page_size = page_size

    def create_vcpu(self, vcpu_id: int) -> KvmVcpu:
        return KvmVcpu(fcntl.ioctl(self._fd, requests.KVM_CREATE_VCPU, vcpu_id), self._page_size)

    def invalidate(self, gpa: int, size: int) -> None:
        """Nothing to do: the processor keeps its own instruction cache coherent."""

    def stats(self) -> dict[str, int]:
        """None: what the kernel counts is in its debugfs, under names of its own."""
        return {}


class KvmSystem(_Descriptor):
    """/dev/kvm."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        super().__init__(_open(path))
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            require_features(self, path)
            undo.pop_all()
        self._page_size = self.ioctl(requests.KVM_GET_VCPU_MMAP_SIZE)

    def create_vm(self) -> KvmVm:
        vm = KvmVm(self.ioctl(requests.KVM_CREATE_VM), self._page_size)
        vm.ioctl(requests.KVM_SET_IDENTITY_MAP_ADDR, bytearray(_IDENTITY_MAP_GPA.to_bytes(8, "little")))
        vm.ioctl(requests.KVM_SET_TSS_ADDR, _TSS_GPA)
        return vm


def _ioctl_long(fd: int, request: int, arg: int) -> int:
    result: int = _libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(arg))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AccelUnavailable(f"{path} does not exist: this host offers no KVM") from error
    except PermissionError as error:
        raise AccelUnavailable(
            f"{path} may not be opened by this user: read and write access expected (group kvm)"
        ) from error
    except OSError as error:
        raise AccelUnavailable(f"{path} cannot be opened: {error.strerror}") from error
