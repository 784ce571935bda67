"""ioctl numbers, computed as the kernel computes them (include/uapi/asm-generic/ioctl.h).

A number carries the size of its argument, so it is always derived from the ctypes structure: a
structure of the wrong size then gives a number the kernel rejects, instead of a corrupted stack.
"""

import ctypes

_NR_BITS = 8
_TYPE_BITS = 8
_SIZE_BITS = 14

_TYPE_SHIFT = _NR_BITS
_SIZE_SHIFT = _TYPE_SHIFT + _TYPE_BITS
_DIRECTION_SHIFT = _SIZE_SHIFT + _SIZE_BITS

_WRITE = 1
_READ = 2

CType = type[ctypes.Structure] | type[ctypes.c_uint64]


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    if size >= 1 << _SIZE_BITS:
        raise ValueError(f"ioctl argument of {size} bytes: the number has room for 16383")
    return direction << _DIRECTION_SHIFT | size << _SIZE_SHIFT | kind << _TYPE_SHIFT | number


def io(kind: int, number: int) -> int:
    """Number of a request without a structure (`_IO`)."""
    return _ioc(0, kind, number, 0)


def ior(kind: int, number: int, argument: CType) -> int:
    """Number of a request from which user space reads (`_IOR`)."""
    return _ioc(_READ, kind, number, ctypes.sizeof(argument))


def iow(kind: int, number: int, argument: CType) -> int:
    """Number of a request to which user space writes (`_IOW`)."""
    return _ioc(_WRITE, kind, number, ctypes.sizeof(argument))


def iowr(kind: int, number: int, argument: CType) -> int:
    """Number of a request whose argument goes both ways (`_IOWR`)."""
    return _ioc(_READ | _WRITE, kind, number, ctypes.sizeof(argument))
