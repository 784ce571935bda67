"""The state's schema: what is written is read again, anything else is refused in one line."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from ostler.abi.kvm import board as kvm_board
from ostler.config import GuestSpec, parse_guest
from ostler.errors import StateError
from ostler.machine.saved import SavedMachine, SavedProcessor
from ostler.snapshot import schema

MUTATIONS = 300


def a_state(cpus: int = 1) -> SavedMachine:
    processor = SavedProcessor({name: bytes(size) for name, size in schema.STRUCTURES.items()}, {0x10: 5}, 0, 1_000_000)
    chip = bytes(ctypes.sizeof(kvm_board.Irqchip))
    return SavedMachine(
        model="ostler-v2.1,-pku",
        processors=(processor,) * cpus,
        chips=(chip,) * 3,
        pit=bytes(ctypes.sizeof(kvm_board.PitState2)),
        clock_ns=12345,
        board={"COM1": {"ier": 1, "rx": b"abc"}, "PCI 01.0 rng": {"virtio.status": 15}},
    )


def a_spec(**values: object) -> GuestSpec:
    return parse_guest(kernel="/nowhere/vmlinuz", **{"memory": "64M", **values})


def reseal(body: object) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return schema.HEAD.pack(schema.MAGIC, schema.VERSION, len(data), hashlib.sha256(data).digest()) + data


def head(size_bytes: int) -> bytes:
    return schema.HEAD.pack(schema.MAGIC, schema.VERSION, size_bytes, bytes(32))


def body_of(data: bytes) -> Any:
    return json.loads(data[schema.HEAD.size :])


def test_state_written_is_state_read() -> None:
    spec = a_spec(cpus=2, disks=["/nowhere/disk.raw,overlay"], nets=["passt"])
    assert schema.decode(schema.encode(a_state(2), spec)) == (a_state(2), spec)


def test_machine_that_goes_on_has_the_processor_saved() -> None:
    changed = schema.spec_of(a_state(), a_spec(), accel="soft")
    assert (changed.cpu, changed.accel) == ("ostler-v2.1,-pku", "soft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.pop("pit"), "saved state: missing or unknown entries ['pit']"),
        (lambda body: body.update(more=1), "saved state: missing or unknown entries ['more']"),
        (lambda body: body.update(chips=[]), "saved chips: expected a list of 3 to 3"),
        (lambda body: body.update(clock_ns=-1), "saved clock_ns: expected a number below 0x10000000000000000"),
        (lambda body: body.update(model="\0"), "saved model: expected text of at most 1000 letters"),
        (lambda body: body["spec"].update(cpus=2), "saved specification of 2 processors: 1 were saved"),
        (lambda body: body["spec"].update(cpus="many"), "saved specification: cpus 'many': expected 1 to 255"),
        (lambda body: body["processors"][0].update(mp_state=99), "saved mp_state: expected a number below 0xa"),
        (lambda body: body["processors"][0]["msrs"].update({"17": 1}), "saved MSR '17': expected a number such as"),
        (lambda body: body["processors"][0]["structures"].update(regs="AAAA"), "saved regs: 3 bytes; expected 144"),
        (lambda body: body["board"]["COM1"].update(rx="?"), "saved COM1, rx: expected base64"),
        (lambda body: body["board"]["COM1"].update(ier=None), "saved COM1, ier: expected a number below"),
        (lambda body: body["board"].update({"x" * 99: {}}), "saved board: a name of more than 80 letters"),
    ],
)
def test_state_of_another_shape_is_refused(change: Callable[[Any], object], message: str) -> None:
    body = body_of(schema.encode(a_state(), a_spec()))
    change(body)
    with pytest.raises(StateError) as caught:
        schema.decode(reseal(body))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "saved state of 0 bytes: expected 48 at least"),
        (b"x" * 60, "saved state begins with 7878787878787878"),
        (schema.HEAD.pack(schema.MAGIC, 1, 0, bytes(32)), "saved state of version 1: this Ostler reads version 2"),
        (head(9) + b"{}", "saved state of 2 bytes: expected the 9 its head"),
        (head(2) + b"{}", "saved state is damaged: its checksum differs"),
        (reseal(b"[" * 100_000), "saved state is no JSON"),
        (reseal(b"1" * 100_000), "saved state is no JSON"),
        (reseal(b"NaN"), "saved state is no JSON: NaN is no number"),
        (reseal([]), "saved state: expected an object"),
    ],
)
def test_bytes_that_are_no_state_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(StateError) as caught:
        schema.decode(data)
    assert message in str(caught.value)


def test_damaged_states_are_refused_in_one_line() -> None:
    chosen, whole = random.Random(6), schema.encode(a_state(), a_spec())
    for _ in range(MUTATIONS):
        data = bytearray(whole)
        for _ in range(chosen.randint(1, 8)):
            data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        if bytes(data) == whole:
            continue
        with pytest.raises(StateError) as caught:
            schema.decode(bytes(data))
        assert "\n" not in str(caught.value)


def test_damaged_bodies_are_read_as_something_well_formed_or_refused() -> None:
    chosen, body = random.Random(7), schema.encode(a_state(), a_spec())[schema.HEAD.size :]
    for _ in range(MUTATIONS):
        data = bytearray(body)
        for _ in range(chosen.randint(1, 8)):
            at = chosen.randrange(len(data))
            data[at : at + chosen.choice((0, 1, 2))] = chosen.choice((b"9", b'"', b"{", b"[]", b"", b"-", b"\xff"))
        with contextlib.suppress(StateError):
            schema.encode(*schema.decode(reseal(bytes(data))))
