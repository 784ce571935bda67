"""What the suite's KVMs do otherwise than the manuals say, test by test, and why it is not Ostler's doing.

The nested lab's processor is QEMU 7.2's emulation of one with SVM. Its faults show through KVM, which runs guest code
on that processor and sees only what it intercepts. Each entry was compared with AMD's manual (APM volume 2, chapter 15)
or, where it says KVM, with the kernel's source; each is expected to fail (strictly: a QEMU that mends it is noticed).
Marks for a KVM that emulates its guests' instructions stand at the tests themselves (`emulated_kvm_deviates`).
"""

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_QEMU_NAMES = ("QEMU TCG CPU", "QEMU Virtual CPU")

_IDT_ERROR_CODE = "QEMU's error code for an entry of the 64-bit IDT is vector * 16 + 2"
_NO_MF_XM = "QEMU raises no unmasked x87 or SSE exception but by FWAIT"
_NO_AC = "QEMU has no alignment check"
_CASE = "test_exceptions.py::test_exception_reports_vector_error_code_and_rip"
_NUMERIC = "test_numeric_faults.py::test_numeric_fault_in_ring_3"
_WRMSR = "test_processor.py::test_wrmsr_refuses_what_the_register_does_not_take"
_OTHERS = "test_processor.py::test_instruction_of_a_feature_the_model_lacks_is_undefined"

QEMU_SVM: dict[str, str] = {
    "test_avx.py::test_vex_is_available_by_xcr0_osxsave_and_ts[mov rax, cr0; or eax, 4; mov cr0, rax-7-None]": (
        "QEMU holds CR0.EM against VEX encodings"
    ),
    "test_debug.py::test_port_breakpoint_needs_cr4_de": "KVM emulates port accesses without a look at I/O breakpoints",
    "test_debug.py::test_general_detect_stops_an_access_to_a_debug_register": "QEMU has no DR7.GD",
    "test_debug.py::test_guest_debug_hardware_breakpoint_stops_before_the_instruction": (
        "QEMU's VMRUN loads DR7 without arming its breakpoints"
    ),
    "test_debug.py::test_guest_debug_software_breakpoint_stops_at_an_int3": (
        "QEMU offers INT3 to the intercept of software interrupts, not to the one of #BP"
    ),
    "test_delivery.py::test_stack_fault_on_a_non_canonical_push": "QEMU makes #GP of a non-canonical stack access",
    "test_delivery.py::test_absent_gate_for_a_fault_reports_the_gate": _IDT_ERROR_CODE,
    f"{_CASE}[int1]": "QEMU is built without INT1",
    f"{_CASE}[lock on a move]": "QEMU takes LOCK on a move",
    f"{_CASE}[int through a gate that is absent]": _IDT_ERROR_CODE,
    f"{_CASE}[int beyond the IDT's limit]": _IDT_ERROR_CODE,
    f"{_CASE}[int to a ring-0 gate from ring 3]": _IDT_ERROR_CODE,
    f"{_CASE}[non-canonical jump]": "on AMD's processors the fetch faults, not the jump",
    f"{_CASE}[write of CR8 above 15]": "QEMU cuts CR8 to four bits",
    f"{_CASE}[non-canonical LSTAR]": "QEMU takes any address; KVM does not intercept this register",
    "test_faults.py::test_page_fault_reports_cause_and_address[reserved bit in the entry]": (
        "QEMU leaves P clear beside RSVD in a page fault's error code"
    ),
    "test_modes.py::test_protected_mode_limit_violation_is_a_general_protection_fault": "QEMU checks no segment limits",
    f"{_NUMERIC}[x87 stack underflow]": _NO_MF_XM,
    f"{_NUMERIC}[SSE division by zero]": _NO_MF_XM,
    f"{_NUMERIC}[SSE invalid comparison]": _NO_MF_XM,
    f"{_NUMERIC}[SSE exception without OSXMMEXCPT]": _NO_MF_XM,
    f"{_NUMERIC}[reserved bit of MXCSR]": "QEMU takes reserved bits of MXCSR",
    f"{_NUMERIC}[misaligned word with AC and AM]": _NO_AC,
    f"{_NUMERIC}[aligned word with AC and AM, then misaligned]": _NO_AC,
    f"{_WRMSR}[{0xC000_0100}-{0x8000_0000_0000_0000}]": "QEMU takes any address; KVM does not intercept this register",
    f"{_WRMSR}[{0xC000_0102}-{0x0100_0000_0000_0000}]": "QEMU takes any address; KVM does not intercept this register",
    f"{_OTHERS}[xbegin]": "QEMU takes XBEGIN without RTM, and aborts at once",
    f"{_OTHERS}[monitor]": "KVM makes it do nothing (KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)",
    "test_transfers.py::test_syscall_enters_ring_0_and_masks_flags": "QEMU's SYSCALL loses the arithmetic flags",
    "test_transfers.py::test_sysret_with_non_canonical_rcx_faults_in_ring_0": (
        "on AMD's processors ring 3 faults, behind SYSRET"
    ),
    "test_transfers.py::test_sysenter_with_null_cs_faults": (
        "AMD's processors have no SYSENTER in long mode, and KVM's emulator leaves it to user space"
    ),
    "test_transfers.py::test_call_gate_from_ring_3_switches_stack_and_returns": (
        "QEMU saves the RSP of a call through a 64-bit gate 8 bytes too low"
    ),
    "test_xsave.py::test_xsetbv_takes_what_the_model_has[7-True]": "QEMU does not intercept XSETBV",
    f"test_xsave.py::test_xsetbv_takes_what_the_model_has[{1 << 9 | 1}-True]": "QEMU does not intercept XSETBV",
    "test_xsave.py::test_xsave_family_faults_on_a_bad_area[mov dword ptr [rdi + 24], 0x10000-xrstor64 [rdi]]": (
        "QEMU takes reserved bits of MXCSR"
    ),
}  # fmt: skip

# What comes and goes, with the reason seen: no more than these few tests, which real processors and `soft` must pass.
QEMU_SVM_AT_TIMES: dict[str, str] = {
    "test_transfers.py::test_sysenter_from_compatibility_mode_and_sysexit_to_64_bits": (
        "QEMU's SYSENTER leaves CS with L and D both set, which its VMRUN refuses: seen as FAIL_ENTRY where an exit "
        "comes before CS is loaded anew (14 of 668 runs)"
    ),
}


def host_is_qemus_emulation() -> bool:
    """Whether this Linux runs on a processor that QEMU emulates: that is what gives itself such names."""
    return _cpuinfo("model name").startswith(_QEMU_NAMES)


def host_flag(name: str) -> bool:
    """Whether the host's kernel says that its processor has the feature."""
    return name in _cpuinfo("flags").split()


def _cpuinfo(field: str) -> str:
    """A field of the first processor; empty where there is none."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def table_key(node_id: str, accelerator: str) -> str:
    """A test's key in the table: its file and name, its parameters without the accelerator."""
    file, _, name = node_id.rpartition("/")[2].partition("::")
    name, bracket, parameters = name.partition("[")
    rest = parameters.removesuffix("]").removeprefix(accelerator).removeprefix("-")
    return f"{file}::{name}[{rest}]" if bracket and rest else f"{file}::{name}"
