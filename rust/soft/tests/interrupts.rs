//! Interrupts into a halted vCPU, vCPUs that start and interrupt each other.

mod lab;

use kvm_bindings::*;
use lab::*;
use ostler_soft::requests::*;
use ostler_soft::Vm;
use std::sync::mpsc::channel;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
const HANDLER: u32 = 0x9000;

/// mov dword [0xfee000f0], 0x1ff: the local APIC on.
const APIC_ON: [u8; 10] = [0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 0x01, 0, 0];
/// again: sti; hlt; cli; jmp again
const HALT_LOOP: [u8; 5] = [0xfb, 0xf4, 0xfa, 0xeb, 0xfb];
/// out 0x77, al; mov dword [0xfee000b0], 0; iret: tell user space, then EOI.
const TELL_AND_EOI: [u8; 13] = [0xe6, 0x77, 0xc7, 0x05, 0xb0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xcf];

fn route_msi(vm: &Vm, gsi: u32, vector: u32) {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = 0xfee0_0000;
    entry.u.msi.data = vector;
    let mut arg = [1u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
    arg.extend(bytes_of(&entry));
    vm.ioctl(KVM_SET_GSI_ROUTING, &mut arg).unwrap();
}

#[test]
fn test_irqfd_wakes_a_halted_vcpu_every_time() {
    let lab = Lab::new(true);
    route_msi(&lab.vm, 24, 0x40);
    let fd = eventfd();
    lab.vm.ioctl(KVM_IRQFD, &mut bytes_of(&kvm_irqfd { fd: fd as u32, gsi: 24, ..Default::default() })).unwrap();
    lab.ram.write(HANDLER as u64, &TELL_AND_EOI);
    lab.gate(0x40, HANDLER);
    // out 0x70, al once the local APIC is on.
    let vcpu = lab.boot(Mode::Protected, &[&APIC_ON[..], &[0xe6, 0x70], &HALT_LOOP].concat());
    let runner = vcpu.clone();
    let (told, interrupts) = channel();
    let thread = std::thread::spawn(move || loop {
        match run(&runner) {
            Seen::Out(0x70 | 0x77, ..) => told.send(()).unwrap(),
            other => return other,
        }
    });
    interrupts.recv_timeout(PATIENCE).expect("the guest is ready");
    for _ in 0..1000 {
        signal(fd);
        interrupts.recv_timeout(PATIENCE).expect("a wake-up was lost");
    }
    vcpu.kick();
    assert_eq!(thread.join().unwrap(), Seen::Intr);
}

#[test]
fn test_apic_timer_wakes_a_halted_vcpu() {
    let lab = Lab::new(true);
    lab.ram.write(HANDLER as u64, &TELL_AND_EOI);
    lab.gate(0x40, HANDLER);
    // LVT timer: one-shot, vector 0x40; divide by 1; initial count 100000.
    let timer = [
        &[0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x40, 0, 0, 0][..],
        &[0xc7, 0x05, 0xe0, 0x03, 0xe0, 0xfe, 0x0b, 0, 0, 0],
        &[0xc7, 0x05, 0x80, 0x03, 0xe0, 0xfe, 0xa0, 0x86, 0x01, 0],
    ]
    .concat();
    let vcpu = lab.boot(Mode::Protected, &[&APIC_ON[..], &timer, &HALT_LOOP].concat());
    assert_eq!(run(&vcpu), Seen::Out(0x77, 1, 0));
}

#[test]
fn test_init_and_sipi_start_a_second_vcpu_which_interrupts_the_first() {
    let lab = Lab::new(true);
    lab.ram.write(HANDLER as u64, &TELL_AND_EOI);
    lab.gate(0x40, HANDLER);
    // ICR: destination 1; INIT; then SIPI with page 0xa.
    let start_other = [
        &[0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0, 0, 0, 0x01][..],
        &[0xc7, 0x05, 0, 0x03, 0xe0, 0xfe, 0, 0x45, 0, 0],
        &[0xc7, 0x05, 0, 0x03, 0xe0, 0xfe, 0x0a, 0x46, 0, 0],
    ]
    .concat();
    // Page 0xa, real mode: out 0x66, al, then through a 32-bit address with DS's limit raised by
    // user space: mov dword [0xfee00310], 0; mov dword [0xfee00300], 0x4040; hlt
    let mut second = vec![0xe6, 0x66];
    second.extend([0x66, 0x67, 0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0, 0, 0, 0]);
    second.extend([0x66, 0x67, 0xc7, 0x05, 0, 0x03, 0xe0, 0xfe, 0x40, 0x40, 0, 0]);
    second.push(0xf4);
    lab.ram.write(0xa000, &second);
    let first = lab.boot(Mode::Protected, &[&APIC_ON[..], &start_other, &HALT_LOOP].concat());
    let other = lab.vm.create_vcpu(1).unwrap();
    let state: kvm_mp_state = ask(|r, a| other.ioctl(r, a), KVM_GET_MP_STATE);
    assert_eq!(state.mp_state, KVM_MP_STATE_UNINITIALIZED);
    let threads = [first.clone(), other.clone()].map(|vcpu| {
        std::thread::spawn(move || {
            let seen = run(&vcpu);
            if seen == Seen::Out(0x66, 1, 0) {
                let mut sregs: kvm_sregs = ask(|r, a| vcpu.ioctl(r, a), KVM_GET_SREGS);
                assert_eq!((sregs.cs.base, sregs.cs.selector), (0xa000, 0xa00));
                sregs.ds.limit = 0xffff_ffff;
                vcpu.ioctl(KVM_SET_SREGS, &mut bytes_of(&sregs)).unwrap();
                let end = run(&vcpu);
                assert_eq!(end, Seen::Intr);
            }
            seen
        })
    });
    let [one, two] = threads;
    assert_eq!(one.join().unwrap(), Seen::Out(0x77, 1, 0));
    other.kick();
    assert_eq!(two.join().unwrap(), Seen::Out(0x66, 1, 0));
    let state: kvm_mp_state = ask(|r, a| other.ioctl(r, a), KVM_GET_MP_STATE);
    assert!(matches!(state.mp_state, KVM_MP_STATE_HALTED | KVM_MP_STATE_RUNNABLE));
}

#[test]
fn test_nmi_wakes_a_halted_vcpu_whose_if_is_clear() {
    let lab = Lab::new(true);
    lab.ram.write(HANDLER as u64, &TELL_AND_EOI);
    lab.gate(2, HANDLER);
    let vcpu = lab.boot(Mode::Protected, &[0xf4, 0xeb, 0xfd]);
    let runner = vcpu.clone();
    let thread = std::thread::spawn(move || run(&runner));
    vcpu.ioctl(KVM_NMI, &mut []).unwrap();
    assert_eq!(thread.join().unwrap(), Seen::Out(0x77, 1, 0));
    let events: kvm_vcpu_events = ask(|r, a| vcpu.ioctl(r, a), KVM_GET_VCPU_EVENTS);
    assert_eq!((events.nmi.masked, events.nmi.pending), (1, 0));
}

#[test]
fn test_two_vcpus_running_and_changing_one_page_see_each_others_code() {
    // Each runs: again: mov al, imm; cmp al, [flag]; je again; out 0x10, al. The host changes nothing;
    // vCPU 1 rewrites vCPU 0's immediate through memory and then the flag.
    let lab = Lab::new(false);
    // 0: again: mov al, 1 ; cmp al, 1 ; je again ; out 0x10, al
    let vcpu = lab.boot(Mode::Protected, &[0xb0, 0x01, 0x3c, 0x01, 0x74, 0xfa, 0xe6, 0x10]);
    // 1, on the same page: mov byte [0x8001], 7 ; out 0x11, al
    lab.ram.write(PROGRAM + 0x400, &[0xc6, 0x05, 0x01, 0x80, 0, 0, 7, 0xe6, 0x11]);
    let other = lab.vm.create_vcpu(1).unwrap();
    lab.start(&other, Mode::Protected);
    let at = kvm_regs { rip: PROGRAM + 0x400, rflags: 2, ..Default::default() };
    other.ioctl(KVM_SET_REGS, &mut bytes_of(&at)).unwrap();
    let runner = vcpu.clone();
    let thread = std::thread::spawn(move || run(&runner));
    assert_eq!(run(&other), Seen::Out(0x11, 1, 0));
    assert_eq!(thread.join().unwrap(), Seen::Out(0x10, 1, 7));
}
