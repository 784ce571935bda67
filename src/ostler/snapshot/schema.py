"""The state of a guest without its memory and disks, as bytes: what snapshots, forks and migrations carry.

    bytes 0..7    magic "OSTLERst"
    bytes 8..11   version of this schema, little endian
    bytes 12..15  length of the body, little endian
    bytes 16..47  SHA-256 of the body
    body          JSON in UTF-8

The body is one object:

    spec            the guest's specification, as `spec.json` of a runtime folder has it
    model           the processor's model, with what the host it ran on could not give taken out: `ostler-v2.1,-pku`
    clock_ns        the guest's kvmclock
    chips, pit      `kvm_irqchip` of both PICs and the IOAPIC, `kvm_pit_state2`
    processors      for each: `structures` (KVM's, by name), `msrs` (by number), `mp_state`, `tsc_khz`
    board           for each device by its name: its registers; numbers are numbers, bytes are base64

Structures are KVM's own, so a state written under one accelerator is read under the other.

Whoever decodes holds a `SavedMachine` that is well formed: every structure there and of its size, every number within
its width, nothing unbounded. Whether a device could have been in that state the device itself judges, when
`ostler.machine.saved.restore` gives it to it. Both raise StateError, of one line. How the pieces go together:

    process.pause()                                   # vmm.run.GuestProcess, on its loop's thread
    data = encode(process.save_state(), process.machine.spec)
    …
    saved, spec = decode(data)
    process = GuestProcess(spec_of(saved, spec), opened, make_console, folder=…)
    …                                                 # fill process.machine.memory
    process.restore_state(saved)
    process.run()                                     # or run(paused=True), and resume() when the time has come

Left out on purpose: memory and disks, which travel apart.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from ostler.abi.kvm import board as kvm_board
from ostler.abi.kvm import state as kvm_state
from ostler.config import GuestSpec, parse_guest
from ostler.config.guest import MAX_CPUS
from ostler.devices.state import Saved
from ostler.errors import BadRequest, StateError
from ostler.machine.saved import CHIPS, SavedMachine, SavedProcessor

MAGIC, VERSION = b"OSTLERst", 2
HEAD = struct.Struct("<8sII32s")
# 255 processors have 2 MiB of structures, and no device has more than a few dozen KiB.
MAX_BODY_BYTES = 16 << 20
MAX_DEVICES, MAX_FIELDS, MAX_BLOB_BYTES, MAX_MSRS, MAX_NAME = 64, 256, 64 << 10, 256, 80
MAX_TSC_KHZ, MAX_MP_STATE = 100_000_000, 10
STRUCTURES: Mapping[str, int] = {
    name: ctypes.sizeof(kind)
    for name, kind in {
        "regs": kvm_state.Regs, "sregs": kvm_state.Sregs, "xcrs": kvm_state.Xcrs, "xsave": kvm_state.Xsave,
        "lapic": kvm_state.LapicState, "debugregs": kvm_state.Debugregs, "events": kvm_state.VcpuEvents,
    }.items()
}  # fmt: skip
_FIELDS = {"spec", "model", "clock_ns", "chips", "pit", "processors", "board"}
_U64 = 1 << 64
# Times of devices are counted from years ago on.
_WIDEST = 1 << 128


def encode(saved: SavedMachine, spec: GuestSpec) -> bytes:
    """The state and the specification of the machine it is of."""
    body = json.dumps(
        {
            "spec": spec.model_dump(mode="json"),
            "model": saved.model,
            "clock_ns": saved.clock_ns,
            "chips": [_text(chip) for chip in saved.chips],
            "pit": _text(saved.pit),
            "processors": [_processor(each) for each in saved.processors],
            "board": {name: _device(device) for name, device in saved.board.items()},
        },
        separators=(",", ":"),
    ).encode()
    return HEAD.pack(MAGIC, VERSION, len(body), hashlib.sha256(body).digest()) + body


def decode(data: bytes | memoryview) -> tuple[SavedMachine, GuestSpec]:
    """Undo `encode`; the data may come from anywhere. Raises StateError."""
    found = _object("state", _body(data), _FIELDS)
    processors = _list("processors", found["processors"], 1, MAX_CPUS)
    saved = SavedMachine(
        model=_string("model", found["model"], 1000),
        processors=tuple(_read_processor(each) for each in processors),
        chips=tuple(
            _bytes("irqchip", chip, ctypes.sizeof(kvm_board.Irqchip))
            for chip in _list("chips", found["chips"], len(CHIPS), len(CHIPS))
        ),
        pit=_bytes("pit", found["pit"], ctypes.sizeof(kvm_board.PitState2)),
        clock_ns=_number("clock_ns", found["clock_ns"], _U64),
        board=_read_board(found["board"]),
    )
    return saved, _read_spec(found["spec"], saved)


def spec_of(saved: SavedMachine, spec: GuestSpec, *, accel: str | None = None) -> GuestSpec:
    """The specification for a machine that goes on from `saved`: with its very processor, which must be had whole."""
    changes: dict[str, Any] = {"cpu": saved.model}
    if accel is not None:
        changes["accel"] = accel
    return spec.model_copy(update=changes)


# -- writing ------------------------------------------------------------------------------------------


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _processor(saved: SavedProcessor) -> dict[str, Any]:
    return {
        "structures": {name: _text(data) for name, data in saved.structures.items()},
        "msrs": {f"{index:#x}": value for index, value in saved.msrs.items()},
        "mp_state": saved.mp_state,
        "tsc_khz": saved.tsc_khz,
    }


def _device(saved: Saved) -> dict[str, int | str]:
    return {name: _text(value) if isinstance(value, bytes) else value for name, value in saved.items()}


# -- reading ------------------------------------------------------------------------------------------


def _body(data: bytes | memoryview) -> object:
    if len(data) < HEAD.size:
        raise StateError(f"saved state of {len(data)} bytes: expected {HEAD.size} at least")
    magic, version, length, digest = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise StateError(f"saved state begins with {bytes(magic).hex()}: expected {MAGIC.hex()}")
    if version != VERSION:
        raise StateError(f"saved state of version {version}: this Ostler reads version {VERSION}")
    if not length == len(data) - HEAD.size <= MAX_BODY_BYTES:
        raise StateError(f"saved state of {len(data) - HEAD.size} bytes: expected the {length} its head says")
    body = bytes(data[HEAD.size :])
    if hashlib.sha256(body).digest() != digest:
        raise StateError("saved state is damaged: its checksum differs")
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise StateError(f"saved state is no JSON: {str(error)[:100]}") from error


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no number")


def _read_processor(value: object) -> SavedProcessor:
    found = _object("processor", value, {"structures", "msrs", "mp_state", "tsc_khz"})
    structures = _object("structures", found["structures"], set(STRUCTURES))
    return SavedProcessor(
        structures={name: _bytes(name, structures[name], size) for name, size in STRUCTURES.items()},
        msrs=_read_msrs(found["msrs"]),
        mp_state=_number("mp_state", found["mp_state"], MAX_MP_STATE),
        tsc_khz=_number("tsc_khz", found["tsc_khz"], MAX_TSC_KHZ),
    )


def _read_msrs(value: object) -> dict[int, int]:
    msrs: dict[int, int] = {}
    for name, number in _mapping("msrs", value, MAX_MSRS).items():
        try:
            index = int(name, 16)
        except ValueError:
            index = -1
        if not 0 <= index < 1 << 32 or name != f"{index:#x}":
            raise StateError(f"saved MSR {name[:20]!r}: expected a number such as 0x10")
        msrs[index] = _number(f"MSR {name}", number, _U64)
    return msrs


def _read_board(value: object) -> dict[str, Saved]:
    return {name: _read_device(name, device) for name, device in _mapping("board", value, MAX_DEVICES).items()}


def _read_device(name: str, value: object) -> Saved:
    saved: Saved = {}
    for field, data in _mapping(name, value, MAX_FIELDS).items():
        what = f"{name}, {field}"
        saved[field] = _blob(what, data) if isinstance(data, str) else _number(what, data, _WIDEST)
    return saved


def _read_spec(value: object, saved: SavedMachine) -> GuestSpec:
    try:
        spec = parse_guest(**_mapping("specification", value, MAX_FIELDS))
    except BadRequest as error:
        raise StateError(f"saved specification: {error}") from error
    except (TypeError, RecursionError) as error:
        raise StateError("saved specification: expected the fields of a guest's") from error
    if spec.cpus != len(saved.processors):
        raise StateError(f"saved specification of {spec.cpus} processors: {len(saved.processors)} were saved")
    return spec


def _mapping(what: str, value: object, most: int) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > most:
        raise StateError(f"saved {what}: expected an object of at most {most} entries")
    if any(len(name) > MAX_NAME for name in value):
        raise StateError(f"saved {what}: a name of more than {MAX_NAME} letters")
    return value


def _object(what: str, value: object, fields: set[str]) -> dict[str, Any]:
    found = _mapping(what, value, len(fields) + 8)
    if set(found) != fields:
        odd = sorted(set(found) ^ fields)
        raise StateError(f"saved {what}: missing or unknown entries {odd[:8]}")
    return found


def _list(what: str, value: object, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise StateError(f"saved {what}: expected a list of {least} to {most}")
    return value


def _string(what: str, value: object, most: int) -> str:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise StateError(f"saved {what}: expected text of at most {most} letters")
    return value


def _number(what: str, value: object, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise StateError(f"saved {what}: expected a number below {limit:#x}")
    return value


def _blob(what: str, value: str) -> bytes:
    if len(value) > MAX_BLOB_BYTES // 3 * 4 + 4:
        raise StateError(f"saved {what}: expected at most {MAX_BLOB_BYTES} bytes")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise StateError(f"saved {what}: expected base64") from error


def _bytes(what: str, value: object, size: int) -> bytes:
    data = _blob(what, value) if isinstance(value, str) else b""
    if len(data) != size:
        raise StateError(f"saved {what}: {len(data)} bytes; expected {size}")
    return data
