"""The Python face of the engine: what `_soft.pyi` promises beyond KVM's semantics."""

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ostler.abi.kvm import requests
from ostler.abi.kvm.caps import Cap
from ostler.accel.soft import load_engine
from ostler.errors import AccelUnavailable


@pytest.fixture
def system() -> Iterator[Any]:
    try:
        opened: Any = load_engine().System()
    except AccelUnavailable as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def test_int_arguments_reach_the_engine(system: Any) -> None:
    assert system.ioctl(requests.KVM_GET_API_VERSION) == 12
    assert system.ioctl(requests.KVM_CHECK_EXTENSION, Cap.IRQFD) == 1
    assert system.ioctl(requests.KVM_CHECK_EXTENSION, 10_000) == 0


def test_structures_are_updated_in_place_and_on_errors_too(system: Any) -> None:
    table = bytearray(8)

    with pytest.raises(OSError, match="Argument list too long") as caught:
        system.ioctl(requests.KVM_GET_SUPPORTED_CPUID, table)

    assert caught.value.errno == errno.E2BIG


def test_request_nobody_knows_is_an_os_error(system: Any) -> None:
    for target in (system, system.create_vm()):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            target.ioctl(0xDEAD_BEEF, bytearray(16))
        assert caught.value.errno in (errno.EINVAL, errno.ENOTTY)


@pytest.mark.parametrize("argument", [b"fixed", "text", 1.5, None.__class__])
def test_argument_of_another_kind_is_a_type_error(system: Any, argument: object) -> None:
    with pytest.raises((TypeError, BufferError)):
        system.ioctl(requests.KVM_GET_API_VERSION, argument)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100])
def test_structure_that_is_too_short_is_refused(system: Any, size: int) -> None:
    vm = system.create_vm()
    for request in (requests.KVM_SET_USER_MEMORY_REGION, requests.KVM_SET_GSI_ROUTING, requests.KVM_IRQFD):
        with pytest.raises(OSError, match=r"\[Errno"):
            vm.ioctl(request, bytearray(b"\xff" * min(size, 15)))
    vcpu = vm.create_vcpu(0)
    for request in (requests.KVM_SET_SREGS, requests.KVM_GET_REGS, requests.KVM_SET_MSRS, requests.KVM_SET_CPUID2):
        with pytest.raises(OSError, match=r"\[Errno"):
            vcpu.ioctl(request, bytearray(b"\xff" * min(size, 12)))


def test_table_that_counts_more_than_it_holds_is_refused(system: Any) -> None:
    vcpu = system.create_vm().create_vcpu(0)
    for request in (requests.KVM_SET_MSRS, requests.KVM_GET_MSRS, requests.KVM_SET_CPUID2):
        with pytest.raises(OSError, match=r"\[Errno"):
            vcpu.ioctl(request, bytearray(b"\xff\xff\xff\xff\0\0\0\0") + bytearray(40))


def test_closed_objects_answer_ebadf_and_their_pages_stay(system: Any) -> None:
    vm = system.create_vm()
    vcpu = vm.create_vcpu(0)
    page = vcpu.run_page
    vm.close()
    vcpu.close()

    for call in (lambda: vm.ioctl(0), lambda: vm.create_vcpu(1), vcpu.run, vcpu.kick):
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            call()
        assert caught.value.errno == errno.EBADF
    page[0] = 1
    assert page[0] == 1
    assert not page.readonly


def test_run_page_is_one_page_for_all_its_views(system: Any) -> None:
    vcpu = system.create_vm().create_vcpu(0)
    one, other = vcpu.run_page, vcpu.run_page

    one[1] = 1

    assert other[1] == 1
    assert len(one) >= 8192


def test_run_leaves_the_gil_and_kick_comes_from_another_thread(system: Any) -> None:
    vm = system.create_vm()
    vm.ioctl(requests.KVM_CREATE_IRQCHIP)
    vcpu = vm.create_vcpu(1)  # waits for INIT and SIPI
    ended: list[BaseException] = []

    def body() -> None:
        try:
            vcpu.run()
        except InterruptedError as error:
            ended.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    vcpu.kick()
    thread.join(timeout=20)

    assert not thread.is_alive()
    assert [type(error) for error in ended] == [InterruptedError]


def test_vcpu_number_twice_is_refused(system: Any) -> None:
    vm = system.create_vm()
    first = vm.create_vcpu(0)

    with pytest.raises(OSError, match="File exists"):
        vm.create_vcpu(0)
    first.close()
