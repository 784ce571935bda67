//! A CPU with a little RAM and no board, for tests and benchmarks.

use super::{Board, Cpu, Gp, Shared};
use crate::mem::{zeroed_words, Slot, SlotMap};
use std::sync::Arc;

/// A board without anything on it: ports and MMIO are user space's, no interrupts.
pub struct NoBoard;

impl Board for NoBoard {
    fn mmio_read(&mut self, _: u64, _: u8) -> Option<u64> {
        None
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) -> bool {
        false
    }
    fn pio_read(&mut self, _: u16, _: u8) -> Option<u32> {
        None
    }
    fn pio_write(&mut self, _: u16, _: u8, _: u32) -> bool {
        false
    }
    fn msr_read(&mut self, _: u32) -> Option<Result<u64, Gp>> {
        None
    }
    fn msr_write(&mut self, _: u32, _: u64) -> Option<Result<(), Gp>> {
        None
    }
    fn cr8(&mut self) -> u64 {
        0
    }
    fn set_cr8(&mut self, _: u64) {}
    fn has_interrupt(&self) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
    fn take_init(&mut self) -> bool {
        false
    }
    fn is_bsp(&self) -> bool {
        true
    }
    fn take_sipi(&mut self) -> Option<u8> {
        None
    }
    fn has_irqchip(&self) -> bool {
        false
    }
    fn tsc(&self) -> u64 {
        0
    }
    fn set_tsc(&mut self, _: u64) {}
    fn code_page(&mut self, _: u64) -> bool {
        false
    }
    fn hypercall(&mut self, _: u64, _: [u64; 4]) -> u64 {
        0
    }
}

/// A CPU and the RAM it runs in, from guest-physical address 0.
pub struct Bench {
    /// The CPU, in its reset state or as the constructor says.
    pub cpu: Box<Cpu>,
    /// Guest RAM; freed after the CPU.
    pub ram: Box<[u64]>,
}

impl Bench {
    /// A CPU after reset with `bytes` of RAM.
    pub fn new(bytes: usize) -> Self {
        let mut ram = vec![0u64; bytes / 8 + 512].into_boxed_slice();
        let start = ram.as_mut_ptr() as usize;
        let host = start.next_multiple_of(4096) as *mut u8;
        let slot = Slot {
            id: 0,
            gpa: 0,
            size: bytes as u64,
            host,
            read_only: false,
            dirty: None,
            code: zeroed_words(bytes / 4096),
        };
        let slots = Arc::new(SlotMap::new(vec![Arc::new(slot)]));
        Self { cpu: Cpu::new(0, slots, Arc::new(Shared::default()), Box::new(NoBoard)), ram }
    }

    /// Copies bytes to a guest-physical address.
    pub fn load(&mut self, gpa: u64, bytes: &[u8]) {
        let Some(host) = self.cpu.slots.host(gpa) else { return };
        // SAFETY: tests load within their RAM.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
    }

    /// Reads a word of RAM.
    pub fn word(&self, gpa: u64) -> u64 {
        // SAFETY: tests read within their RAM.
        self.cpu.slots.host(gpa).map_or(0, |host| unsafe { (host as *const u64).read_unaligned() })
    }

    /// 64-bit mode at CPL 0 with the first 1 GiB mapped to itself by 2 MiB pages, tables at 0x1000;
    /// user pages when `user`. RIP is `rip`, the stack below 0x8000.
    pub fn long_mode(mut self, rip: u64, user: bool) -> Self {
        use super::state::{cr0, cr4, efer, seg, Segment};
        let flags = 3 | if user { 4 } else { 0 };
        self.load(0x1000, &(0x2000u64 | flags).to_le_bytes());
        self.load(0x2000, &(0x3000u64 | flags).to_le_bytes());
        for index in 0..512u64 {
            self.load(0x3000 + 8 * index, &(index << 21 | 0x80 | flags).to_le_bytes());
        }
        let cpu = &mut self.cpu;
        cpu.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::ET | cr0::MP;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        cpu.cr3 = 0x1000;
        cpu.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        let flat =
            Segment { limit: u32::MAX, kind: 3, present: true, s: true, db: true, g: true, ..Segment::default() };
        cpu.segs = [flat; 6];
        cpu.segs[seg::CS] = Segment { kind: 11, l: true, db: false, selector: 8, ..flat };
        cpu.rip = rip;
        cpu.regs[4] = 0x8000;
        cpu.flush_all();
        cpu.update_modes();
        self
    }
}
