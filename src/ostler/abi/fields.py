"""Several ctypes fields of one width in a line, as a C header declares them: `u64 rax, rbx;`."""

from ctypes import c_uint8, c_uint16, c_uint32, c_uint64


def u8s(names: str) -> list[tuple[str, type[c_uint8]]]:
    """8-bit fields, in the order of the names."""
    return [(name, c_uint8) for name in names.split()]


def u16s(names: str) -> list[tuple[str, type[c_uint16]]]:
    """16-bit fields, in the order of the names."""
    return [(name, c_uint16) for name in names.split()]


def u32s(names: str) -> list[tuple[str, type[c_uint32]]]:
    """32-bit fields, in the order of the names."""
    return [(name, c_uint32) for name in names.split()]


def u64s(names: str) -> list[tuple[str, type[c_uint64]]]:
    """64-bit fields, in the order of the names."""
    return [(name, c_uint64) for name in names.split()]
