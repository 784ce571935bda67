//! A VM with a little memory and hand-assembled programs, driven through the public face alone.
//!
//! Guest-physical: 64 KiB of RAM at 0 in slot 0 (page tables at 0x1000, IDT at 0x4000, program at
//! 0x8000, stack below 0x8000) unless a test says otherwise. Linear is physical in every mode.

#![allow(dead_code)]

use kvm_bindings::*;
use ostler_soft::requests::*;
use ostler_soft::{System, Vcpu, Vm};
use std::mem::offset_of;
use std::ptr::null_mut;

pub const PROGRAM: u64 = 0x8000;
pub const IDT: u64 = 0x4000;
pub const RAM: usize = 0x1_0000;

/// Pages of guest memory, unmapped when dropped.
pub struct Pages {
    pub host: *mut u8,
    pub size: usize,
}

// SAFETY: plain memory.
unsafe impl Send for Pages {}
unsafe impl Sync for Pages {}

impl Pages {
    pub fn new(size: usize) -> Self {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let host = unsafe { libc::mmap(null_mut(), size, access, flags, -1, 0) };
        assert_ne!(host, libc::MAP_FAILED);
        Self { host: host.cast(), size }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.size);
        // SAFETY: within the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.add(at as usize), bytes.len()) };
    }

    pub fn read<T: Copy>(&self, at: u64) -> T {
        assert!(at as usize + size_of::<T>() <= self.size);
        // SAFETY: within the mapping.
        unsafe { self.host.add(at as usize).cast::<T>().read_volatile() }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by new().
        unsafe { libc::munmap(self.host.cast(), self.size) };
    }
}

/// A structure as a request's argument.
pub fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    // SAFETY: KVM structures are plain integers without hidden padding.
    unsafe { std::slice::from_raw_parts((value as *const T).cast::<u8>(), size_of::<T>()) }.to_vec()
}

pub fn of_bytes<T: Copy>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: as bytes_of().
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

/// A request that gives a structure.
pub fn ask<T: Copy + Default>(call: impl Fn(u32, &mut [u8]) -> Result<i64, i32>, request: u32) -> T {
    let mut arg = bytes_of(&T::default());
    call(request, &mut arg).expect("the request succeeds");
    of_bytes(&arg)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Real,
    Protected,
    Long,
}

pub struct Lab {
    pub vm: Vm,
    pub ram: Pages,
}

impl Lab {
    pub fn new(irqchip: bool) -> Self {
        let vm = System::new().create_vm();
        let ram = Pages::new(RAM);
        set_slot(&vm, 0, 0, &ram, 0).expect("slot 0");
        if irqchip {
            vm.ioctl(KVM_CREATE_IRQCHIP, &mut [0; 8]).expect("irqchip");
        }
        Self { vm, ram }
    }

    /// vCPU 0 in `mode` at the start of `program`.
    pub fn boot(&self, mode: Mode, program: &[u8]) -> Vcpu {
        self.ram.write(PROGRAM, program);
        let vcpu = self.vm.create_vcpu(0).expect("vCPU 0");
        self.start(&vcpu, mode);
        vcpu
    }

    pub fn start(&self, vcpu: &Vcpu, mode: Mode) {
        let mut sregs: kvm_sregs = ask(|r, a| vcpu.ioctl(r, a), KVM_GET_SREGS);
        let flat =
            kvm_segment { limit: 0xffff_ffff, selector: 0x10, type_: 3, present: 1, s: 1, g: 1, ..Default::default() };
        let data = kvm_segment { db: 1, ..flat };
        let code = kvm_segment {
            selector: 8,
            type_: 11,
            db: (mode == Mode::Protected) as u8,
            l: (mode == Mode::Long) as u8,
            ..flat
        };
        if mode == Mode::Real {
            sregs.cs.base = 0;
            sregs.cs.selector = 0;
        } else {
            sregs.cr0 |= 1;
            (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (code, data, data, data);
            sregs.idt = kvm_dtable { base: IDT, limit: 0xfff, ..Default::default() };
            self.gdt(&mut sregs);
        }
        if mode == Mode::Long {
            // Four 1 GiB pages, one to one.
            self.ram.write(0x1000, &(0x2000u64 | 7).to_le_bytes());
            (0..4u64).for_each(|gib| self.ram.write(0x2000 + 8 * gib, &(gib << 30 | 0x87).to_le_bytes()));
            sregs.cr0 |= 1 << 31;
            (sregs.cr3, sregs.cr4, sregs.efer) = (0x1000, 1 << 5, 0x500);
        }
        vcpu.ioctl(KVM_SET_SREGS, &mut bytes_of(&sregs)).expect("sregs");
        let regs = kvm_regs { rip: PROGRAM, rsp: PROGRAM, rflags: 2, ..Default::default() };
        vcpu.ioctl(KVM_SET_REGS, &mut bytes_of(&regs)).expect("regs");
    }

    /// A GDT with 32-bit code at 8 and data at 0x10, for interrupts to come back to.
    fn gdt(&self, sregs: &mut kvm_sregs) {
        let code = if sregs.cs.l != 0 { 0x00af_9b00_0000_ffffu64 } else { 0x00cf_9b00_0000_ffff };
        self.ram.write(0x5008, &code.to_le_bytes());
        self.ram.write(0x5010, &0x00cf_9300_0000_ffffu64.to_le_bytes());
        sregs.gdt = kvm_dtable { base: 0x5000, limit: 0x17, ..Default::default() };
    }

    /// A 32-bit interrupt gate for `vector`.
    pub fn gate(&self, vector: u8, handler: u32) {
        let gate = handler as u64 & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler as u64 >> 16) << 48;
        self.ram.write(IDT + 8 * vector as u64, &gate.to_le_bytes());
    }
}

pub fn set_slot(vm: &Vm, slot: u32, gpa: u64, pages: &Pages, flags: u32) -> Result<i64, i32> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: pages.size as u64,
        userspace_addr: pages.host as u64,
    };
    vm.ioctl(KVM_SET_USER_MEMORY_REGION, &mut bytes_of(&region))
}

pub fn delete_slot(vm: &Vm, slot: u32) -> Result<i64, i32> {
    vm.ioctl(KVM_SET_USER_MEMORY_REGION, &mut bytes_of(&kvm_userspace_memory_region { slot, ..Default::default() }))
}

/// Bits of a slot's dirty log of up to 64 pages.
pub fn dirty_log(vm: &Vm, slot: u32) -> u64 {
    let mut bits = 0u64;
    let mut request = kvm_dirty_log { slot, ..Default::default() };
    request.__bindgen_anon_1.dirty_bitmap = (&mut bits as *mut u64).cast();
    vm.ioctl(KVM_GET_DIRTY_LOG, &mut bytes_of(&request)).expect("dirty log");
    bits
}

pub fn regs(vcpu: &Vcpu) -> kvm_regs {
    ask(|r, a| vcpu.ioctl(r, a), KVM_GET_REGS)
}

/// Reads the shared page.
pub fn page<T: Copy>(vcpu: &Vcpu, offset: usize) -> T {
    // SAFETY: within the page.
    unsafe { vcpu.run_page().0.add(offset).cast::<T>().read_volatile() }
}

pub fn set_page<T: Copy>(vcpu: &Vcpu, offset: usize, value: T) {
    // SAFETY: within the page.
    unsafe { vcpu.run_page().0.add(offset).cast::<T>().write_volatile(value) };
}

pub fn set_immediate_exit(vcpu: &Vcpu, on: bool) {
    set_page(vcpu, offset_of!(kvm_run, immediate_exit), on as u8);
}

/// An exit as tests look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    In(u16, u8),
    Out(u16, u8, u32),
    Read(u64, u32),
    Write(u64, u32, u64),
    Hlt,
    Intr,
    Other(u32),
}

const EXITS: usize = offset_of!(kvm_run, __bindgen_anon_1);
const MMIO_DATA: usize = EXITS + 8;
const PIO_DATA: usize = 4096;

pub fn run(vcpu: &Vcpu) -> Seen {
    match vcpu.run() {
        Ok(()) => {}
        Err(libc::EINTR) => return Seen::Intr,
        Err(errno) => panic!("errno {errno}"),
    }
    match page::<u32>(vcpu, offset_of!(kvm_run, exit_reason)) {
        KVM_EXIT_IO => {
            let (out, size, port): (u8, u8, u16) = (page(vcpu, EXITS), page(vcpu, EXITS + 1), page(vcpu, EXITS + 2));
            assert_eq!(page::<u64>(vcpu, EXITS + 8), PIO_DATA as u64);
            match out {
                0 => Seen::In(port, size),
                _ => Seen::Out(port, size, page(vcpu, PIO_DATA)),
            }
        }
        KVM_EXIT_MMIO => {
            let (gpa, data, len): (u64, u64, u32) = (page(vcpu, EXITS), page(vcpu, MMIO_DATA), page(vcpu, EXITS + 16));
            match page::<u8>(vcpu, EXITS + 20) {
                0 => Seen::Read(gpa, len),
                _ => Seen::Write(gpa, len, data),
            }
        }
        KVM_EXIT_HLT => Seen::Hlt,
        other => Seen::Other(other),
    }
}

/// Answers an IN.
pub fn supply_port(vcpu: &Vcpu, value: u32) {
    set_page(vcpu, PIO_DATA, value);
}

/// Answers an MMIO read.
pub fn supply_mmio(vcpu: &Vcpu, value: u64) {
    set_page(vcpu, MMIO_DATA, value);
}

pub fn eventfd() -> i32 {
    // SAFETY: a new descriptor; the test process ends soon enough to leave it open.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
    assert!(fd >= 0);
    fd
}

pub fn signal(fd: i32) {
    // SAFETY: eight readable bytes.
    assert_eq!(unsafe { libc::write(fd, (&1u64 as *const u64).cast(), 8) }, 8);
}
