//! Exits and their completion, EINTR, requests with hostile arguments.

mod lab;

use kvm_bindings::*;
use lab::*;
use ostler_soft::requests::*;
use ostler_soft::System;

/// in al, 0x10; inc al; out 0x11, al; hlt
const IN_OUT_HLT: [u8; 7] = [0xe4, 0x10, 0xfe, 0xc0, 0xe6, 0x11, 0xf4];

#[test]
fn test_port_read_completed_by_user_space_goes_on_with_its_value() {
    let lab = Lab::new(false);
    let vcpu = lab.boot(Mode::Real, &IN_OUT_HLT);
    assert_eq!(run(&vcpu), Seen::In(0x10, 1));
    supply_port(&vcpu, 0x41);
    assert_eq!(run(&vcpu), Seen::Out(0x11, 1, 0x42));
    assert_eq!(run(&vcpu), Seen::Hlt);
    assert_eq!(regs(&vcpu).rip, PROGRAM + 7);
}

#[test]
fn test_mmio_read_and_write_in_long_mode() {
    let lab = Lab::new(false);
    // mov ebx, 0xd0000000; mov rax, [rbx]; inc rax; mov [rbx + 8], rax; mov [rbx + 1], al; hlt
    let program =
        [0xbb, 0, 0, 0, 0xd0, 0x48, 0x8b, 0x03, 0x48, 0xff, 0xc0, 0x48, 0x89, 0x43, 0x08, 0x88, 0x43, 0x01, 0xf4];
    let vcpu = lab.boot(Mode::Long, &program);
    assert_eq!(run(&vcpu), Seen::Read(0xd000_0000, 8));
    supply_mmio(&vcpu, 0x1_0000_00ff);
    assert_eq!(run(&vcpu), Seen::Write(0xd000_0008, 8, 0x1_0000_0100));
    assert_eq!(run(&vcpu), Seen::Write(0xd000_0001, 1, 0));
    assert_eq!(run(&vcpu), Seen::Hlt);
    assert_eq!(regs(&vcpu).rax, 0x1_0000_0100);
}

#[test]
fn test_immediate_exit_completes_the_instruction_and_no_more() {
    let lab = Lab::new(false);
    let vcpu = lab.boot(Mode::Real, &IN_OUT_HLT);
    assert_eq!(run(&vcpu), Seen::In(0x10, 1));
    supply_port(&vcpu, 0x77);
    set_immediate_exit(&vcpu, true);
    assert_eq!(run(&vcpu), Seen::Intr);
    let state = regs(&vcpu);
    assert_eq!((state.rip, state.rax), (PROGRAM + 2, 0x77));
    set_immediate_exit(&vcpu, false);
    assert_eq!(run(&vcpu), Seen::Out(0x11, 1, 0x78));
}

#[test]
fn test_kick_before_run_makes_the_next_run_return_once() {
    let lab = Lab::new(false);
    let vcpu = lab.boot(Mode::Real, &IN_OUT_HLT);
    vcpu.kick();
    assert_eq!(run(&vcpu), Seen::Intr);
    assert_eq!(run(&vcpu), Seen::In(0x10, 1));
}

#[test]
fn test_kick_of_a_spinning_vcpu_returns_every_time() {
    let lab = Lab::new(false);
    let vcpu = lab.boot(Mode::Long, &[0xeb, 0xfe]);
    let runner = vcpu.clone();
    let (entered, ready) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        for _ in 0..300 {
            entered.send(()).unwrap();
            assert_eq!(run(&runner), Seen::Intr);
        }
    });
    for _ in 0..300 {
        ready.recv().unwrap();
        vcpu.kick();
    }
    thread.join().unwrap();
}

#[test]
fn test_kick_of_a_halted_vcpu_returns() {
    let lab = Lab::new(true);
    let vcpu = lab.boot(Mode::Real, &[0xf4, 0xe6, 0x11]);
    let runner = vcpu.clone();
    let thread = std::thread::spawn(move || run(&runner));
    vcpu.kick();
    assert_eq!(thread.join().unwrap(), Seen::Intr);
}

#[test]
fn test_interrupt_window_opens_when_the_guest_sets_if() {
    let lab = Lab::new(false);
    // sti; nop; nop; jmp $
    let vcpu = lab.boot(Mode::Real, &[0xfb, 0x90, 0x90, 0xeb, 0xfe]);
    set_page(&vcpu, 0, 1u8);
    assert_eq!(run(&vcpu), Seen::Other(KVM_EXIT_IRQ_WINDOW_OPEN));
    // Vector 0x20 of the real-mode table: out 0x33, al at 0x9000.
    lab.ram.write(4 * 0x20, &0x9000u32.to_le_bytes());
    lab.ram.write(0x9000, &[0xe6, 0x33]);
    set_page(&vcpu, 0, 0u8);
    vcpu.ioctl(KVM_INTERRUPT, &mut bytes_of(&kvm_interrupt { irq: 0x20 })).unwrap();
    assert_eq!(run(&vcpu), Seen::Out(0x33, 1, 0));
}

#[test]
fn test_ioeventfd_takes_the_write_without_an_exit() {
    let lab = Lab::new(false);
    let fd = eventfd();
    let mut request = kvm_ioeventfd { datamatch: 5, addr: 0x55, len: 1, fd, flags: 0b11, pad: [0; 36] };
    lab.vm.ioctl(KVM_IOEVENTFD, &mut bytes_of(&request)).unwrap();
    // mov al, 5; out 0x55, al; inc al; out 0x55, al
    let vcpu = lab.boot(Mode::Real, &[0xb0, 5, 0xe6, 0x55, 0xfe, 0xc0, 0xe6, 0x55]);
    assert_eq!(run(&vcpu), Seen::Out(0x55, 1, 6));
    let mut count = 0u64;
    // SAFETY: eight writable bytes.
    assert_eq!(unsafe { libc::read(fd, (&mut count as *mut u64).cast(), 8) }, 8);
    assert_eq!(count, 1);
    request.flags |= 0b100;
    lab.vm.ioctl(KVM_IOEVENTFD, &mut bytes_of(&request)).unwrap();
}

#[test]
fn test_triple_fault_is_a_shutdown_exit() {
    let lab = Lab::new(false);
    // An IDT without a gate: int3.
    let vcpu = lab.boot(Mode::Protected, &[0xcc]);
    assert_eq!(run(&vcpu), Seen::Other(KVM_EXIT_SHUTDOWN));
}

#[test]
fn test_requests_with_random_arguments_give_an_errno_and_leave_the_vcpu_usable() {
    let lab = Lab::new(true);
    let vcpu = lab.boot(Mode::Real, &IN_OUT_HLT);
    let system = System::new();
    let mut seed = 0x1234_5678_9abc_def0u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let pointers = [KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_SET_USER_MEMORY_REGION];
    let requests = (0..=0xff_u32).flat_map(|number| {
        let sizes =
            [0u32, 4, 8, 16, 24, 32, 40, 48, 64, 72, 88, 104, 112, 128, 144, 312, 320, 392, 416, 520, 1024, 4096];
        sizes.into_iter().flat_map(move |size| (0..4).map(move |way| way << 30 | size << 16 | KVMIO << 8 | number))
    });
    for request in requests.filter(|request| !pointers.contains(request)) {
        let length = [0, 4, 8, (request >> 16 & 0x3fff) as usize, 5000][random() as usize % 5];
        let mut arg: Vec<u8> = (0..length).map(|_| random() as u8).collect();
        if random() % 2 == 0 {
            arg.iter_mut().skip(1).for_each(|byte| *byte &= 0x11);
        }
        let _ = system.ioctl(request, &mut arg.clone());
        let _ = lab.vm.ioctl(request, &mut arg.clone());
        let _ = vcpu.ioctl(request, &mut arg);
    }
    set_immediate_exit(&vcpu, true);
    assert_eq!(run(&vcpu), Seen::Intr);
}
