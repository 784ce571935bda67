//! Memory slots and dirty logs under a running vCPU, clocks in guest memory.

mod lab;

use kvm_bindings::*;
use lab::*;
use ostler_soft::requests::*;

const EXTRA: u64 = 0x10_0000;

/// again: inc dword [0x100000]; jmp again
const COUNT_UP: [u8; 8] = [0xff, 0x05, 0, 0, 0x10, 0, 0xeb, 0xf8];

/// Runs a vCPU in a thread until it has an exit.
fn spawn(vcpu: &ostler_soft::Vcpu) -> std::thread::JoinHandle<Seen> {
    let runner = vcpu.clone();
    std::thread::spawn(move || run(&runner))
}

fn wait_for_count(pages: &Pages, above: u32) -> u32 {
    loop {
        let now: u32 = pages.read(0);
        if now > above {
            return now;
        }
        std::thread::yield_now();
    }
}

#[test]
fn test_slot_removed_under_a_running_vcpu_is_touched_no_more() {
    let lab = Lab::new(false);
    let extra = Pages::new(0x2000);
    set_slot(&lab.vm, 1, EXTRA, &extra, 0).unwrap();
    let vcpu = lab.boot(Mode::Protected, &COUNT_UP);
    let thread = spawn(&vcpu);
    wait_for_count(&extra, 1000);
    delete_slot(&lab.vm, 1).unwrap();
    // Unmapped: another touch would end the process.
    let last: u32 = extra.read(0);
    drop(extra);
    assert_eq!(thread.join().unwrap(), Seen::Read(EXTRA, 4));
    supply_mmio(&vcpu, last as u64);
    assert_eq!(run(&vcpu), Seen::Write(EXTRA, 4, last as u64 + 1));
    assert_eq!(delete_slot(&lab.vm, 1), Err(libc::EINVAL));
}

#[test]
fn test_slot_moved_under_a_halted_or_outside_vcpu_is_seen_at_entry() {
    let lab = Lab::new(false);
    let extra = Pages::new(0x1000);
    extra.write(0, &41u32.to_le_bytes());
    set_slot(&lab.vm, 1, 0x40_0000, &extra, 0).unwrap();
    let vcpu = lab.boot(Mode::Protected, &COUNT_UP);
    assert_eq!(run(&vcpu), Seen::Read(EXTRA, 4));
    set_slot(&lab.vm, 1, EXTRA, &extra, 0).unwrap();
    supply_mmio(&vcpu, 7);
    let thread = spawn(&vcpu);
    wait_for_count(&extra, 41);
    vcpu.kick();
    assert_eq!(thread.join().unwrap(), Seen::Intr);
}

#[test]
fn test_dirty_log_read_under_a_running_vcpu_catches_every_later_store() {
    let lab = Lab::new(false);
    let extra = Pages::new(0x3000);
    set_slot(&lab.vm, 1, EXTRA, &extra, 0).unwrap();
    let vcpu = lab.boot(Mode::Protected, &COUNT_UP);
    let thread = spawn(&vcpu);
    let before = wait_for_count(&extra, 0);
    set_slot(&lab.vm, 1, EXTRA, &extra, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    wait_for_count(&extra, before);
    for _ in 0..50 {
        let seen: u32 = extra.read(0);
        // A store after `seen` was read and after the log was fetched must be in the next one.
        dirty_log(&lab.vm, 1);
        let at_fetch: u32 = extra.read(0);
        wait_for_count(&extra, at_fetch.max(seen));
        assert_eq!(dirty_log(&lab.vm, 1) & !1, 0);
        wait_for_count(&extra, extra.read(0));
        assert_eq!(dirty_log(&lab.vm, 1), 1);
    }
    vcpu.kick();
    assert_eq!(thread.join().unwrap(), Seen::Intr);
    dirty_log(&lab.vm, 1);
    assert_eq!(dirty_log(&lab.vm, 1), 0);
}

#[test]
fn test_manual_protect_clears_only_what_is_asked() {
    let lab = Lab::new(false);
    let cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args: [3, 0, 0, 0], ..Default::default() };
    lab.vm.ioctl(KVM_ENABLE_CAP, &mut bytes_of(&cap)).unwrap();
    let extra = Pages::new(0x3000);
    set_slot(&lab.vm, 1, EXTRA, &extra, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    assert_eq!(dirty_log(&lab.vm, 1), 0b111);
    assert_eq!(dirty_log(&lab.vm, 1), 0b111);
    let mut bits = 0b101u64;
    let mut clear = kvm_clear_dirty_log { slot: 1, num_pages: 3, ..Default::default() };
    clear.__bindgen_anon_1.dirty_bitmap = (&mut bits as *mut u64).cast();
    lab.vm.ioctl(KVM_CLEAR_DIRTY_LOG, &mut bytes_of(&clear)).unwrap();
    assert_eq!(dirty_log(&lab.vm, 1), 0b010);
    clear.num_pages = 2;
    assert_eq!(lab.vm.ioctl(KVM_CLEAR_DIRTY_LOG, &mut bytes_of(&clear)), Err(libc::EINVAL));
}

#[test]
fn test_dirty_log_to_a_bad_address_is_a_fault_and_loses_nothing() {
    let lab = Lab::new(false);
    let extra = Pages::new(0x1000);
    set_slot(&lab.vm, 1, EXTRA, &extra, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    let vcpu = lab.boot(Mode::Protected, &COUNT_UP);
    let thread = spawn(&vcpu);
    wait_for_count(&extra, 0);
    vcpu.kick();
    thread.join().unwrap();
    let mut request = kvm_dirty_log { slot: 1, ..Default::default() };
    request.__bindgen_anon_1.padding2 = 8;
    assert_eq!(lab.vm.ioctl(KVM_GET_DIRTY_LOG, &mut bytes_of(&request)), Err(libc::EFAULT));
    assert_eq!(dirty_log(&lab.vm, 1), 1);
}

#[test]
fn test_read_only_slot_gives_writes_to_user_space() {
    let lab = Lab::new(false);
    let extra = Pages::new(0x1000);
    extra.write(0, &9u32.to_le_bytes());
    set_slot(&lab.vm, 1, EXTRA, &extra, KVM_MEM_READONLY).unwrap();
    let vcpu = lab.boot(Mode::Protected, &COUNT_UP);
    assert_eq!(run(&vcpu), Seen::Write(EXTRA, 4, 10));
    assert_eq!(extra.read::<u32>(0), 9);
}

#[test]
fn test_set_memory_region_refuses_what_kvm_refuses() {
    let lab = Lab::new(false);
    let extra = Pages::new(0x2000);
    assert_eq!(set_slot(&lab.vm, 1, 0xf000, &extra, 0), Err(libc::EEXIST));
    assert_eq!(set_slot(&lab.vm, 1, 0x800, &extra, 0), Err(libc::EINVAL));
    assert_eq!(set_slot(&lab.vm, 1, EXTRA, &extra, 1 << 7), Err(libc::EINVAL));
    assert_eq!(set_slot(&lab.vm, 1 << 16, EXTRA, &extra, 0), Err(libc::EINVAL));
    assert_eq!(set_slot(&lab.vm, 1, u64::MAX - 0xfff, &extra, 0), Err(libc::EINVAL));
    set_slot(&lab.vm, 1, EXTRA, &extra, 0).unwrap();
    assert_eq!(set_slot(&lab.vm, 1, EXTRA, &extra, KVM_MEM_READONLY), Err(libc::EINVAL));
    let smaller = Pages { host: extra.host, size: 0x1000 };
    assert_eq!(set_slot(&lab.vm, 1, EXTRA, &smaller, 0), Err(libc::EINVAL));
    std::mem::forget(smaller);
    let region = kvm_userspace_memory_region {
        slot: 2,
        guest_phys_addr: EXTRA * 2,
        memory_size: 0x1000,
        userspace_addr: 0x1000,
        ..Default::default()
    };
    assert_eq!(lab.vm.ioctl(KVM_SET_USER_MEMORY_REGION, &mut bytes_of(&region)), Err(libc::EFAULT));
}

#[test]
fn test_kvmclock_written_by_the_guest_agrees_with_get_clock() {
    let lab = Lab::new(false);
    // mov ecx, 0x4b564d01; mov eax, 0xa001; xor edx, edx; wrmsr; rdtsc; out 0x10, al
    let program =
        [0xb9, 0x01, 0x4d, 0x56, 0x4b, 0xb8, 0x01, 0xa0, 0, 0, 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x31, 0xe6, 0x10];
    let vcpu = lab.boot(Mode::Protected, &program);
    let clock = kvm_clock_data { clock: 1_000_000_000_000, ..Default::default() };
    lab.vm.ioctl(KVM_SET_CLOCK, &mut bytes_of(&clock)).unwrap();
    assert!(matches!(run(&vcpu), Seen::Out(0x10, 1, _)));
    let state = regs(&vcpu);
    let tsc = state.rdx << 32 | state.rax & 0xffff_ffff;
    let (version, stamp, system): (u32, u64, u64) = (lab.ram.read(0xa000), lab.ram.read(0xa008), lab.ram.read(0xa010));
    let (multiplier, shift, flags): (u32, i8, u8) = (lab.ram.read(0xa018), lab.ram.read(0xa01c), lab.ram.read(0xa01d));
    assert_eq!((version % 2, flags), (0, 1));
    let ticks = tsc - stamp;
    let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
    let guest = system + ((ticks as u128 * multiplier as u128) >> 32) as u64;
    let host: kvm_clock_data = ask(|r, a| lab.vm.ioctl(r, a), KVM_GET_CLOCK);
    assert!(guest >= 1_000_000_000_000 && guest <= host.clock, "{guest} {}", host.clock);
    assert!(host.clock - guest < 20_000_000_000);
}
