//! Machine checks that user space brings about: banks, the exception, what the guest may write.

mod lab;

use kvm_bindings::*;
use lab::*;
use ostler_soft::requests::*;
use ostler_soft::{System, Vcpu};

const CTL_P_SER_P: u64 = 1 << 8 | 1 << 24;
const VAL: u64 = 1 << 63;
const OVER: u64 = 1 << 62;
const UC: u64 = 1 << 61;
const MCIP: u64 = 1 << 2;
const CR4_MCE: u64 = 1 << 6;
const HANDLER: u32 = 0x9000;
const BANK1_STATUS: u32 = 0x405;

fn set_up(vcpu: &Vcpu, cap: u64) -> Result<i64, i32> {
    vcpu.ioctl(KVM_X86_SETUP_MCE, &mut cap.to_le_bytes())
}

fn raise(vcpu: &Vcpu, bank: u8, status: u64) -> Result<i64, i32> {
    let mce = kvm_x86_mce { status, addr: 0x1234_5000, misc: 0x8c, mcg_status: MCIP | 1, bank, ..Default::default() };
    vcpu.ioctl(KVM_X86_SET_MCE, &mut bytes_of(&mce))
}

fn msr(vcpu: &Vcpu, index: u32) -> Option<u64> {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let mut arg = [1u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
    arg.extend(bytes_of(&entry));
    let done = vcpu.ioctl(KVM_GET_MSRS, &mut arg).unwrap();
    (done == 1).then(|| of_bytes::<kvm_msr_entry>(&arg[8..]).data)
}

/// Protected mode, a handler of machine checks that tells by port 0x77; `hlt` in a loop.
fn guest(lab: &Lab, cr4: u64) -> Vcpu {
    lab.ram.write(HANDLER as u64, &[0xe6, 0x77, 0xcf]);
    lab.gate(18, HANDLER);
    let vcpu = lab.boot(Mode::Protected, &[0xf4, 0xeb, 0xfd]);
    let mut sregs: kvm_sregs = ask(|r, a| vcpu.ioctl(r, a), KVM_GET_SREGS);
    sregs.cr4 |= cr4;
    vcpu.ioctl(KVM_SET_SREGS, &mut bytes_of(&sregs)).unwrap();
    vcpu
}

#[test]
fn test_supported_is_what_set_up_takes() {
    let mut arg = [0; 8];
    System::new().ioctl(KVM_X86_GET_MCE_CAP_SUPPORTED, &mut arg).unwrap();
    assert_eq!(u64::from_le_bytes(arg), CTL_P_SER_P);
    let vcpu = guest(&Lab::new(true), 0);
    assert_eq!(msr(&vcpu, 0x179), Some(0));
    assert_eq!(msr(&vcpu, BANK1_STATUS), None);
    for bad in [0, 33, CTL_P_SER_P, 10 | 1 << 10, 10 | 1 << 27] {
        assert_eq!(set_up(&vcpu, bad), Err(libc::EINVAL), "{bad:#x}");
    }
    set_up(&vcpu, 10 | CTL_P_SER_P).unwrap();
    assert_eq!(msr(&vcpu, 0x179), Some(10 | CTL_P_SER_P));
    assert_eq!((msr(&vcpu, 0x17b), msr(&vcpu, 0x400)), (Some(!0), Some(!0)));
    assert_eq!((msr(&vcpu, 0x427), msr(&vcpu, 0x428)), (Some(0), None));
}

#[test]
fn test_uncorrected_error_interrupts_even_a_halted_processor() {
    let lab = Lab::new(true);
    let vcpu = guest(&lab, CR4_MCE);
    set_up(&vcpu, 10 | CTL_P_SER_P).unwrap();
    let state = kvm_mp_state { mp_state: KVM_MP_STATE_HALTED };
    vcpu.ioctl(KVM_SET_MP_STATE, &mut bytes_of(&state)).unwrap();
    raise(&vcpu, 1, VAL | UC | 0xc0).unwrap();
    assert_eq!(run(&vcpu), Seen::Out(0x77, 1, 0));
    assert_eq!(msr(&vcpu, 0x17a), Some(MCIP | 1));
    let bank = [0x404, 0x405, 0x406, 0x407].map(|index| msr(&vcpu, index).unwrap());
    assert_eq!(bank, [!0, VAL | UC | 0xc0, 0x1234_5000, 0x8c]);
}

#[test]
fn test_second_error_before_the_first_was_handled_shuts_down() {
    let vcpu = guest(&Lab::new(true), CR4_MCE);
    set_up(&vcpu, 10 | CTL_P_SER_P).unwrap();
    raise(&vcpu, 1, VAL | UC).unwrap();
    raise(&vcpu, 1, VAL | UC).unwrap();
    assert_eq!(run(&vcpu), Seen::Other(KVM_EXIT_SHUTDOWN));
}

#[test]
fn test_guest_without_cr4_mce_shuts_down() {
    let vcpu = guest(&Lab::new(true), 0);
    set_up(&vcpu, 10 | CTL_P_SER_P).unwrap();
    raise(&vcpu, 1, VAL | UC).unwrap();
    assert_eq!(run(&vcpu), Seen::Other(KVM_EXIT_SHUTDOWN));
}

#[test]
fn test_corrected_errors_are_only_noted_and_the_worse_one_stays() {
    let vcpu = guest(&Lab::new(true), CR4_MCE);
    set_up(&vcpu, 10 | CTL_P_SER_P).unwrap();
    raise(&vcpu, 1, VAL | 1).unwrap();
    assert_eq!(msr(&vcpu, BANK1_STATUS), Some(VAL | 1));
    raise(&vcpu, 1, VAL | 2).unwrap();
    assert_eq!(msr(&vcpu, BANK1_STATUS), Some(VAL | OVER | 2));
    raise(&vcpu, 1, VAL | UC | 3).unwrap();
    raise(&vcpu, 1, VAL | 4).unwrap();
    assert_eq!(msr(&vcpu, BANK1_STATUS), Some(VAL | OVER | UC | 3));
    let events: kvm_vcpu_events = ask(|r, a| vcpu.ioctl(r, a), KVM_GET_VCPU_EVENTS);
    assert_eq!((events.exception.injected, events.exception.nr), (1, 18));
}

#[test]
fn test_bad_requests_are_refused_and_change_nothing() {
    let vcpu = guest(&Lab::new(true), CR4_MCE);
    assert_eq!(raise(&vcpu, 0, VAL | UC), Err(libc::EINVAL));
    set_up(&vcpu, 2 | CTL_P_SER_P).unwrap();
    assert_eq!(raise(&vcpu, 2, VAL | UC), Err(libc::EINVAL));
    assert_eq!(raise(&vcpu, 1, UC), Err(libc::EINVAL));
    assert_eq!(msr(&vcpu, BANK1_STATUS), Some(0));
}

#[test]
fn test_guest_clears_a_status_and_writes_nothing_else_there() {
    let lab = Lab::new(true);
    let vcpu = guest(&lab, CR4_MCE);
    set_up(&vcpu, 10 | CTL_P_SER_P).unwrap();
    raise(&vcpu, 1, VAL | 1).unwrap();
    // wrmsr; out 0x10, al; the handler of #GP: out 0x11, al
    lab.ram.write(PROGRAM, &[0x0f, 0x30, 0xe6, 0x10]);
    lab.ram.write(0xa000, &[0xe6, 0x11]);
    lab.gate(13, 0xa000);
    let write = |index: u32, value: u64| {
        let (rax, rdx) = (value & 0xffff_ffff, value >> 32);
        let at = kvm_regs { rip: PROGRAM, rsp: PROGRAM, rcx: index.into(), rax, rdx, rflags: 2, ..Default::default() };
        vcpu.ioctl(KVM_SET_REGS, &mut bytes_of(&at)).unwrap();
        matches!(run(&vcpu), Seen::Out(0x10, ..))
    };
    assert!(!write(BANK1_STATUS, VAL));
    assert!(write(BANK1_STATUS, 0));
    assert_eq!(msr(&vcpu, BANK1_STATUS), Some(0));
    assert!(write(0x404, 0) && write(0x404, !0) && !write(0x404, 5));
    assert!(!write(0x179, 1));
    assert!(write(0x17b, 0) && !write(0x17b, 1));
    // A bank that is not enabled takes no uncorrected error.
    raise(&vcpu, 1, VAL | UC).unwrap();
    assert_eq!(msr(&vcpu, BANK1_STATUS), Some(0));
}
