//! Code that somebody else changes while a vCPU runs it: another vCPU, a device, the host. Where the
//! SDM (vol. 3, 8.1.3) makes the new code visible, it is what runs: after a serialising instruction.

mod lab;

use lab::*;
use ostler_soft::Vcpu;
use std::thread::JoinHandle;

/// Where the number lies that the executor waits for, and, eight bytes on, the one it has seen.
const FLAG: u64 = 0xa000;
const WRITER: u64 = 0x9000;
/// A function in a page of its own, in the executor's page, and with its constant in two pages.
const PLACES: [u64; 3] = [0xb003, 0x8803, 0xbffd];
const TURNS: u32 = 400;

/// ```text
///     xor esi, esi; xor ebx, ebx
/// l:  call r12; mov eax, [r13]; cmp eax, ebx; je l     ; runs the old code while it waits
///     mov edi, eax; xor eax, eax; cpuid; mov ebx, edi  ; serialises
///     call r12; cmp eax, ebx; je r; inc esi            ; counts what is not the new code
/// r:  mov [r13 + 8], ebx; cmp ebx, r14d; jne l
///     mov eax, esi; out 0x10, eax
/// ```
const EXECUTOR: [u8; 45] = [
    0x31, 0xf6, 0x31, 0xdb, 0x41, 0xff, 0xd4, 0x41, 0x8b, 0x45, 0, 0x39, 0xd8, 0x74, 0xf5, 0x89, 0xc7, 0x31, 0xc0, 0xf,
    0xa2, 0x89, 0xfb, 0x41, 0xff, 0xd4, 0x39, 0xd8, 0x74, 2, 0xff, 0xc6, 0x41, 0x89, 0x5d, 8, 0x44, 0x39, 0xf3, 0x75,
    0xdb, 0x89, 0xf0, 0xe7, 0x10,
];

/// The same without a function: `mov eax, number` stands right behind the serialising instruction.
const IN_LINE: [u8; 44] = [
    0x31, 0xf6, 0x31, 0xdb, 0x41, 0x8b, 0x45, 0, 0x39, 0xd8, 0x74, 0xf8, 0x89, 0xc7, 0x31, 0xc0, 0xf, 0xa2, 0x89, 0xfb,
    0xb8, 0, 0, 0, 0, 0x39, 0xd8, 0x74, 2, 0xff, 0xc6, 0x41, 0x89, 0x5d, 8, 0x44, 0x39, 0xf3, 0x75, 0xdc, 0x89, 0xf0,
    0xe7, 0x10,
];
/// Or where the function that serialises comes back to.
const AFTER_A_CALL: [u8; 50] = [
    0x31, 0xf6, 0x31, 0xdb, 0x41, 0x8b, 0x45, 0, 0x39, 0xd8, 0x74, 0xf8, 0x89, 0xc7, 0xe8, 0x18, 0, 0, 0, 0xb8, 0, 0,
    0, 0, 0x39, 0xd8, 0x74, 2, 0xff, 0xc6, 0x41, 0x89, 0x5d, 8, 0x44, 0x39, 0xf3, 0x75, 0xdd, 0x89, 0xf0, 0xe7, 0x10,
    0x31, 0xc0, 0xf, 0xa2, 0x89, 0xfb, 0xc3,
];

/// ```text
///     mov ecx, 1
/// n:  mov [r12 + 1], ecx; mov [r13], ecx
/// w:  pause; cmp [r13 + 8], ecx; jne w
///     inc ecx; cmp ecx, r14d; jbe n
///     out 0x11, al
/// ```
const CHANGER: [u8; 31] = [
    0xb9, 1, 0, 0, 0, 0x41, 0x89, 0x4c, 0x24, 1, 0x41, 0x89, 0x4d, 0, 0xf3, 0x90, 0x41, 0x39, 0x4d, 8, 0x75, 0xf8,
    0xff, 0xc1, 0x44, 0x39, 0xf1, 0x76, 0xe8, 0xe6, 0x11,
];

/// mov eax, number; ret
fn function(number: u32) -> Vec<u8> {
    [&[0xb8][..], &number.to_le_bytes(), &[0xc3]].concat()
}

fn prepare(lab: &Lab, vcpu: &Vcpu, rip: u64, place: u64) {
    lab.start(vcpu, Mode::Long);
    let mut state = regs(vcpu);
    (state.rip, state.r12, state.r13, state.r14) = (rip, place, FLAG, TURNS as u64);
    vcpu.ioctl(ostler_soft::requests::KVM_SET_REGS, &mut bytes_of(&state)).unwrap();
}

/// A vCPU that calls the function at `place` over and over.
fn executor(lab: &Lab, place: u64) -> Vcpu {
    let vcpu = lab.boot(Mode::Long, &EXECUTOR);
    lab.ram.write(place, &function(0));
    lab.ram.write(FLAG, &[0; 16]);
    prepare(lab, &vcpu, PROGRAM, place);
    vcpu
}

fn spawn(vcpu: &Vcpu) -> JoinHandle<Seen> {
    let vcpu = vcpu.clone();
    std::thread::spawn(move || run(&vcpu))
}

#[test]
fn test_code_changed_by_another_vcpu_runs_as_changed() {
    for place in PLACES {
        let lab = Lab::new(false);
        let executor = executor(&lab, place);
        lab.ram.write(WRITER, &CHANGER);
        let changer = lab.vm.create_vcpu(1).unwrap();
        prepare(&lab, &changer, WRITER, place);

        let [one, other] = [spawn(&executor), spawn(&changer)];

        assert_eq!(one.join().unwrap(), Seen::Out(0x10, 4, 0), "calls of stale code at {place:#x}");
        assert_eq!(other.join().unwrap(), Seen::Out(0x11, 1, 0));
    }
}

#[test]
fn test_code_changed_by_another_vcpu_right_behind_a_serialising_instruction_runs_as_changed() {
    for (program, place) in [(&IN_LINE[..], PROGRAM + 0x14), (&AFTER_A_CALL[..], PROGRAM + 0x13)] {
        let lab = Lab::new(false);
        let executor = lab.boot(Mode::Long, program);
        prepare(&lab, &executor, PROGRAM, place);
        lab.ram.write(WRITER, &CHANGER);
        let changer = lab.vm.create_vcpu(1).unwrap();
        prepare(&lab, &changer, WRITER, place);

        let [one, other] = [spawn(&executor), spawn(&changer)];

        assert_eq!(one.join().unwrap(), Seen::Out(0x10, 4, 0), "stale code at {place:#x}");
        assert_eq!(other.join().unwrap(), Seen::Out(0x11, 1, 0));
    }
}

#[test]
fn test_code_changed_by_the_host_and_announced_runs_as_changed() {
    for place in PLACES {
        let lab = Lab::new(false);
        let executor = executor(&lab, place);
        let thread = spawn(&executor);

        for number in 1..=TURNS {
            lab.ram.write(place + 1, &number.to_le_bytes());
            lab.vm.invalidate(place + 1, 4);
            lab.ram.write(FLAG, &number.to_le_bytes());
            while lab.ram.read::<u32>(FLAG + 8) != number && !thread.is_finished() {
                std::thread::yield_now();
            }
        }

        assert_eq!(thread.join().unwrap(), Seen::Out(0x10, 4, 0), "calls of stale code at {place:#x}");
    }
}

#[test]
fn test_code_changed_while_the_vcpu_is_outside_runs_as_changed() {
    for place in PLACES {
        let lab = Lab::new(false);
        // l: call r12; call r12; call r12; call r12; out 0x12, eax; jmp l
        let program = [0x41, 0xff, 0xd4, 0x41, 0xff, 0xd4, 0x41, 0xff, 0xd4, 0x41, 0xff, 0xd4, 0xe7, 0x12, 0xeb, 0xf0];
        let vcpu = lab.boot(Mode::Long, &program);
        prepare(&lab, &vcpu, PROGRAM, place);
        for number in 1..200 {
            lab.ram.write(place, &function(number));
            lab.vm.invalidate(place, 6);

            assert_eq!(run(&vcpu), Seen::Out(0x12, 4, number), "at {place:#x}");
        }
    }
}
