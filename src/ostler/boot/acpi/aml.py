"""A small encoder of AML, ACPI specification 6.5 chapter 20.

Every function returns bytes, and terms nest by concatenation:

    device("COM1", name("_HID", eisa_id("PNP0501")), name("_UID", integer(1)))

Only what Ostler's DSDT needs is here; there is no parser.
"""

from __future__ import annotations

ZERO_OP, ONE_OP, ONES_OP = b"\x00", b"\x01", b"\xff"
NAME_OP, SCOPE_OP, BUFFER_OP, PACKAGE_OP, METHOD_OP, RETURN_OP = b"\x08", b"\x10", b"\x11", b"\x12", b"\x14", b"\xa4"
BYTE_PREFIX, WORD_PREFIX, DWORD_PREFIX, STRING_PREFIX, QWORD_PREFIX = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
NOTIFY_OP = b"\x86"
DEVICE_OP = b"\x5b\x82"
DUAL_NAME_PREFIX, MULTI_NAME_PREFIX = b"\x2e", b"\x2f"


def name_string(path: str) -> bytes:
    """A path such as `\\_SB.COM1`; segments are padded to four characters."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [part for part in path.lstrip("\\").split(".") if part]
    for part in segments:
        if len(part) > 4 or not part.replace("_", "A").isalnum() or part.upper() != part or part[0].isdigit():
            raise ValueError(f"AML name {path!r}: segment {part!r} is not one of up to four of A-Z, 0-9, _")
    packed = b"".join(part.ljust(4, "_").encode("ascii") for part in segments)
    if not segments:
        return root + b"\x00"
    if len(segments) == 1:
        return root + packed
    prefix = DUAL_NAME_PREFIX if len(segments) == 2 else MULTI_NAME_PREFIX + bytes([len(segments)])
    return root + prefix + packed


def package_length(body_size: int) -> bytes:
    """PkgLength counts itself, in one to four bytes (section 20.2.4)."""
    if body_size + 1 < 0x40:
        return bytes([body_size + 1])
    for following in (1, 2, 3):
        total = body_size + 1 + following
        if total < 1 << (4 + 8 * following):
            rest = (total >> 4).to_bytes(following, "little")
            return bytes([following << 6 | total & 0x0F]) + rest
    raise ValueError(f"AML package of {body_size} bytes: longer than the encoding allows")


def _packaged(opcode: bytes, body: bytes) -> bytes:
    return opcode + package_length(len(body)) + body


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits."""
    if value in (0, 1):
        return ONE_OP if value else ZERO_OP
    for prefix, size in ((BYTE_PREFIX, 1), (WORD_PREFIX, 2), (DWORD_PREFIX, 4), (QWORD_PREFIX, 8)):
        if value < 1 << (size * 8):
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"AML integer {value:#x}: wider than 64 bits")


def string(text: str) -> bytes:
    """A zero-terminated ASCII string."""
    return STRING_PREFIX + text.encode("ascii") + b"\x00"


def eisa_id(text: str) -> bytes:
    """A compressed PNP identity such as PNP0501: three letters and four hex digits."""
    if len(text) != 7 or not text[:3].isupper() or not text[:3].isalpha():
        raise ValueError(f"EISA identity {text!r}: expected three letters and four hex digits")
    letters = [ord(character) - 0x40 for character in text[:3]]
    vendor = letters[0] << 10 | letters[1] << 5 | letters[2]
    return DWORD_PREFIX + vendor.to_bytes(2, "big") + int(text[3:], 16).to_bytes(2, "big")


def buffer(data: bytes) -> bytes:
    """A buffer with its initial contents."""
    return _packaged(BUFFER_OP, integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """A fixed package of data objects."""
    return _packaged(PACKAGE_OP, bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """A named constant."""
    return NAME_OP + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Terms inside an existing object."""
    return _packaged(SCOPE_OP, name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """A device object."""
    return _packaged(DEVICE_OP, name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """A method that needs no serialisation."""
    return _packaged(METHOD_OP, name_string(path) + bytes([arguments & 7]) + b"".join(terms))


def returns(value: bytes) -> bytes:
    """Return(value)."""
    return RETURN_OP + value


def notify(path: str, value: int) -> bytes:
    """Notify(path, value)."""
    return NOTIFY_OP + name_string(path) + integer(value)


def argument(number: int) -> bytes:
    """Arg0 to Arg6 inside a method."""
    return bytes([0x68 + number])


# -- resource descriptors, section 6.4 ----------------------------------------------------------


def io_ports(start: int, size: int) -> bytes:
    """Fixed ports, decoded in 16 bits."""
    return b"\x47\x01" + start.to_bytes(2, "little") * 2 + bytes([1, size])


def isa_irq(line: int) -> bytes:
    """An edge-triggered, active-high, exclusive ISA interrupt."""
    return b"\x22" + (1 << line).to_bytes(2, "little")


def interrupt(gsi: int) -> bytes:
    """An edge-triggered, active-high, exclusive interrupt by its global number (6.4.3.6)."""
    return b"\x89\x06\x00\x03\x01" + gsi.to_bytes(4, "little")


def memory32(start: int, size: int) -> bytes:
    """A fixed, writable range below 4 GiB."""
    return b"\x86\x09\x00\x01" + start.to_bytes(4, "little") + size.to_bytes(4, "little")


def _window(kind: bytes, resource_type: int, flags: int, width: int, bounds: tuple[int, int]) -> bytes:
    """An address space descriptor whose ends are fixed and which the device forwards (6.4.3.5)."""
    first, last = bounds
    general, granularity, translation = 0x0C, 0, 0
    fields = (granularity, first, last, translation, last - first + 1)
    body = bytes([resource_type, general, flags]) + b"".join(each.to_bytes(width, "little") for each in fields)
    return kind + len(body).to_bytes(2, "little") + body


def bus_range(first: int, last: int) -> bytes:
    """Bus numbers below a bridge."""
    return _window(b"\x88", 2, 0, 2, (first, last))


def memory_window32(start: int, size: int) -> bytes:
    """Memory below 4 GiB that a bridge forwards, not cacheable, writable."""
    return _window(b"\x87", 0, 1, 4, (start, start + size - 1))


def memory_window64(start: int, size: int) -> bytes:
    """Memory anywhere that a bridge forwards, not cacheable, writable."""
    return _window(b"\x8a", 0, 1, 8, (start, start + size - 1))


def resource_template(*descriptors: bytes) -> bytes:
    """The buffer _CRS yields; checksum zero means none."""
    return buffer(b"".join(descriptors) + b"\x79\x00")
