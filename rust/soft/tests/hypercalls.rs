//! KVM's paravirtual calls from a guest: results by number and arguments, kicks, IPIs, paired clocks.

mod lab;

use kvm_bindings::*;
use lab::*;
use ostler_soft::Vcpu;
use std::time::{SystemTime, UNIX_EPOCH};

/// vmcall; out 0x10, al
const CALL: [u8; 5] = [0x0f, 0x01, 0xc1, 0xe6, 0x10];
/// The same of AMD's.
const AMD_CALL: [u8; 5] = [0x0f, 0x01, 0xd9, 0xe6, 0x10];
const KICK_CPU: u64 = 5;
const CLOCK_PAIRING: u64 = 9;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;
const ENOSYS: i64 = -1000;
/// mov dword [0xfee000f0], 0x1ff, the local APIC on; out 0x70, al; again: sti; hlt; cli; jmp again
const LISTEN: [u8; 17] = [0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 0x01, 0, 0, 0xe6, 0x70, 0xfb, 0xf4, 0xfa, 0xeb, 0xfb];
/// out 0x77, al; mov dword [0xfee000b0], 0; iret
const TELL_AND_EOI: [u8; 13] = [0xe6, 0x77, 0xc7, 0x05, 0xb0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xcf];

/// Has the vCPU, which stands before a call, make it; what it finds in RAX.
fn call(vcpu: &Vcpu, nr: u64, [rbx, rcx, rdx, rsi]: [u64; 4]) -> i64 {
    let regs_before = kvm_regs { rip: PROGRAM, rax: nr, rbx, rcx, rdx, rsi, rsp: PROGRAM, rflags: 2, ..regs(vcpu) };
    vcpu.ioctl(ostler_soft::requests::KVM_SET_REGS, &mut bytes_of(&regs_before)).unwrap();
    assert!(matches!(run(vcpu), Seen::Out(0x10, 1, _)));
    regs(vcpu).rax as i64
}

#[test]
fn test_results_are_those_that_are_documented() {
    let lab = Lab::new(true);
    let vcpu = lab.boot(Mode::Long, &CALL);
    lab.vm.create_vcpu(1).unwrap();
    let (beyond, nobody) = (1 << 40, 77);
    let (efault, einval, unsupported) = (-libc::EFAULT as i64, -libc::EINVAL as i64, -libc::EOPNOTSUPP as i64);
    let table: [(&str, u64, [u64; 4], i64); 18] = [
        ("no such call", 4, [0; 4], ENOSYS),
        ("far from any", 1 << 40, [0; 4], ENOSYS),
        ("a number of more than 32 bits is not cut", 1 << 32 | KICK_CPU, [0; 4], ENOSYS),
        ("kick another", KICK_CPU, [0, 1, 0, 0], 0),
        ("kick nobody", KICK_CPU, [0, nobody, 0, 0], 0),
        ("kick, an ID is 32 bits", KICK_CPU, [0, beyond | 1, 0, 0], 0),
        ("pair clocks", CLOCK_PAIRING, [0x3000, 0, 0, 0], 0),
        ("of an unknown kind", CLOCK_PAIRING, [0x3000, 1, 0, 0], unsupported),
        ("where there is no memory", CLOCK_PAIRING, [beyond, 0, 0, 0], efault),
        ("over the end of memory", CLOCK_PAIRING, [RAM as u64 - 32, 0, 0, 0], efault),
        ("IPI to nobody", SEND_IPI, [0, 0, 0, 0x40], 0),
        ("IPI to who is not there", SEND_IPI, [0, 1, 0, 0x40], 0),
        ("IPI from an ID nobody has", SEND_IPI, [!0, !0, !0, 0x40], 0),
        ("IPI by logical destination", SEND_IPI, [1, 0, 0, 0x840], einval),
        ("IPI by shorthand", SEND_IPI, [1, 0, 0, 0x8_0040], einval),
        ("yield to another", SCHED_YIELD, [1, 0, 0, 0], 0),
        ("yield to oneself", SCHED_YIELD, [0, 0, 0, 0], 0),
        ("yield to nobody", SCHED_YIELD, [nobody, 0, 0, 0], 0),
    ];
    for (what, nr, args, expected) in table {
        assert_eq!(call(&vcpu, nr, args), expected, "{what}");
    }
    lab.ram.write(PROGRAM, &AMD_CALL);
    assert_eq!(call(&vcpu, SCHED_YIELD, [1, 0, 0, 0]), 0);
}

#[test]
fn test_user_mode_is_refused() {
    let lab = Lab::new(true);
    let vcpu = lab.boot(Mode::Protected, &CALL);
    let mut sregs: kvm_sregs = ask(|r, a| vcpu.ioctl(r, a), ostler_soft::requests::KVM_GET_SREGS);
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (segment.dpl, segment.selector) = (3, segment.selector | 3);
    }
    vcpu.ioctl(ostler_soft::requests::KVM_SET_SREGS, &mut bytes_of(&sregs)).unwrap();
    // IOPL 3, for the OUT.
    let before = kvm_regs { rip: PROGRAM, rax: KICK_CPU, rflags: 0x3002, ..Default::default() };
    vcpu.ioctl(ostler_soft::requests::KVM_SET_REGS, &mut bytes_of(&before)).unwrap();
    assert!(matches!(run(&vcpu), Seen::Out(0x10, 1, _)));
    assert_eq!(regs(&vcpu).rax as u32 as i32, -libc::EPERM);
}

#[test]
fn test_without_interrupt_controllers_there_are_no_ipis() {
    let lab = Lab::new(false);
    let vcpu = lab.boot(Mode::Long, &CALL);
    assert_eq!(call(&vcpu, SEND_IPI, [1, 0, 0, 0x40]), ENOSYS);
}

#[test]
fn test_clock_pairing_is_of_now_and_moves_with_the_counter() {
    let lab = Lab::new(true);
    let vcpu = lab.boot(Mode::Long, &CALL);
    lab.ram.write(0x3000, &[0xff; 80]);
    let wall = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let before = wall();
    assert_eq!(call(&vcpu, CLOCK_PAIRING, [0x3000, 0, 0, 0]), 0);
    let words = |at: u64| lab.ram.read::<u64>(0x3000 + at);
    let (seconds, nanoseconds, first) = (words(0), words(8), words(16));
    assert!(nanoseconds < 1_000_000_000);
    let said = std::time::Duration::new(seconds, nanoseconds as u32);
    assert!(before <= said && said <= wall(), "{before:?} {said:?}");
    // All 64 bytes are the host's, and no more.
    assert_eq!((24..64).step_by(8).map(words).collect::<Vec<_>>(), [0; 5]);
    assert_eq!(words(64), !0);
    assert_eq!(call(&vcpu, CLOCK_PAIRING, [0x3000, 0, 0, 0]), 0);
    assert!(words(16) > first);
    assert!(dirty_after(&lab, &vcpu));
}

/// Whether the dirty log sees what the call writes.
fn dirty_after(lab: &Lab, vcpu: &Vcpu) -> bool {
    set_slot(&lab.vm, 0, 0, &lab.ram, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    dirty_log(&lab.vm, 0);
    assert_eq!(call(vcpu, CLOCK_PAIRING, [0x3000, 0, 0, 0]), 0);
    dirty_log(&lab.vm, 0) & 1 << 3 != 0
}

#[test]
fn test_kick_ends_a_halt_that_no_interrupt_would() {
    let lab = Lab::new(true);
    let caller = lab.boot(Mode::Long, &CALL);
    let other = lab.vm.create_vcpu(1).unwrap();
    lab.start(&other, Mode::Long);
    // cli; hlt; out 0x11, al; jmp to the start
    lab.ram.write(PROGRAM + 0x400, &[0xfa, 0xf4, 0xe6, 0x11, 0xeb, 0xfa]);
    let at = kvm_regs { rip: PROGRAM + 0x400, rflags: 2, ..Default::default() };
    other.ioctl(ostler_soft::requests::KVM_SET_REGS, &mut bytes_of(&at)).unwrap();
    let state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    other.ioctl(ostler_soft::requests::KVM_SET_MP_STATE, &mut bytes_of(&state)).unwrap();
    let sleeper = other.clone();
    let thread = std::thread::spawn(move || (0..500).map(|_| run(&sleeper)).collect::<Vec<_>>());
    // A kick before the halt counts for it, so two may end one: kicked until all have been seen.
    while !thread.is_finished() {
        assert_eq!(call(&caller, KICK_CPU, [0, 1, 0, 0]), 0);
    }
    assert!(thread.join().unwrap().iter().all(|seen| *seen == Seen::Out(0x11, 1, 0)));
}

#[test]
fn test_send_ipi_reaches_whom_the_bitmap_names_and_counts_them() {
    let lab = Lab::new(true);
    lab.ram.write(0x9000, &TELL_AND_EOI);
    lab.gate(0x40, 0x9000);
    let caller = lab.boot(Mode::Protected, &CALL);
    let listeners: Vec<Vcpu> = (1..4).map(|id| lab.vm.create_vcpu(id).unwrap()).collect();
    lab.ram.write(PROGRAM + 0x400, &LISTEN);
    for (number, vcpu) in listeners.iter().enumerate() {
        lab.start(vcpu, Mode::Protected);
        let stack = PROGRAM - 0x400 * (number as u64 + 1);
        let at = kvm_regs { rip: PROGRAM + 0x400, rsp: stack, rflags: 2, ..Default::default() };
        vcpu.ioctl(ostler_soft::requests::KVM_SET_REGS, &mut bytes_of(&at)).unwrap();
        let state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        vcpu.ioctl(ostler_soft::requests::KVM_SET_MP_STATE, &mut bytes_of(&state)).unwrap();
        assert_eq!(run(vcpu), Seen::Out(0x70, 1, 0));
    }
    // Outside of 64-bit mode the two words are halves of one bitmap: from ID 1 on, the first and the third.
    assert_eq!(call(&caller, SEND_IPI, [0b101, 0, 1, 0x40]), 2);
    let seen: Vec<Seen> = [0, 2].map(|number| run(&listeners[number])).into();
    assert_eq!(seen, [Seen::Out(0x77, 1, 0); 2]);
    listeners[1].kick();
    assert_eq!(run(&listeners[1]), Seen::Intr);
}
