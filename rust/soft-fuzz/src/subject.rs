//! The interpreter as executor: the same linear addresses as the native side, through page tables in
//! a little guest RAM, at CPL 3 of 64-bit mode. Physical pages lie in another order than linear
//! ones, so that page-crossing accesses really are two.
//!
//! Exceptions are looked at before their delivery; there is no guest kernel.

use crate::layout::*;
use crate::native;
use crate::select::{is_safe, usable};
use iced_x86::{Decoder, DecoderOptions};
use ostler_soft::cpu::state::{cr0, cr4, efer, rflags, seg, DescriptorTable, Segment};
use ostler_soft::cpu::testing::NoBoard;
use ostler_soft::cpu::translate::{Budget, MEMORY};
use ostler_soft::cpu::{attention, Cpu, Shared, Stop, R};
use ostler_soft::host::fxsave::{fxrstor, fxsave, Format, FXSAVE_BYTES};
use ostler_soft::mem::{note_store, zeroed_words, Slot, SlotMap};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::Arc;

const RAM_BYTES: usize = 0x10_0000;
const PAGE: usize = 4096;
const TABLES: usize = 0x1000;
const POOL: usize = 0x10000;
/// Steps that a case may take: a repeated string instruction counts each of its steps.
pub const STEP_LIMIT: u64 = 6000;
const FORMAT: Format = Format { wide_pointers: true, sixteen_registers: true };
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// Of the jump at a case's end, in either mode.
const EXIT_BYTES: usize = 7;

/// The interpreter with its guest RAM.
pub struct Subject {
    cpu: Box<Cpu>,
    slot: Arc<Slot>,
    ram: *mut u8,
    pool_used: usize,
    next_table: usize,
    xcr0: u64,
    bits: u32,
    placed: (u64, usize),
    pages: Vec<(u64, usize)>,
}

/// How a stepped run went, beside its outcome: for every instruction of the case how often it
/// completed and how often it faulted.
#[derive(Default)]
pub struct Trace {
    /// Index of the case's instruction, whether it completed.
    pub steps: Vec<(u32, bool)>,
}

impl Subject {
    /// An interpreter with the areas mapped.
    pub fn new() -> Result<Self, String> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new anonymous mapping, never unmapped: it lives as long as the process.
        let ram = unsafe { libc::mmap(std::ptr::null_mut(), RAM_BYTES, rw, flags, -1, 0) };
        if ram == libc::MAP_FAILED {
            return Err(format!("cannot map guest RAM: {}", std::io::Error::last_os_error()));
        }
        let ram = ram as *mut u8;
        let code = zeroed_words(RAM_BYTES / PAGE);
        let (id, gpa, size, host) = (0, 0, RAM_BYTES as u64, ram);
        let slot = Arc::new(Slot { id, gpa, size, host, read_only: false, dirty: None, code });
        let slots = Arc::new(SlotMap::new(vec![slot.clone()]));
        let cpu = Cpu::new(0, slots, Arc::new(Shared::default()), Box::new(NoBoard));
        let xcr0 = host_xcr0();
        let mut subject = Self {
            cpu,
            slot,
            ram,
            pool_used: 0,
            next_table: TABLES + PAGE,
            xcr0,
            bits: 64,
            placed: (CODE, 0),
            pages: Vec::new(),
        };
        subject.map_areas();
        subject.enter_user_mode();
        Ok(subject)
    }

    /// The same with the translator, which translates what was executed `hot` times.
    pub fn translating(hot: u32) -> Result<Self, String> {
        let mut subject = Self::new()?;
        if !subject.cpu.use_translator(hot, Budget::share(MEMORY, 4)) {
            return Err("no memory for translated code".to_owned());
        }
        Ok(subject)
    }

    fn map_areas(&mut self) {
        self.map(CODE, CODE_BYTES, 0);
        self.map(PATCH, PATCH_BYTES, WRITE);
        self.map(DATA, DATA_BYTES, WRITE | NO_EXECUTE);
        self.map(READ_ONLY, READ_ONLY_BYTES, NO_EXECUTE);
        self.map(STACK, STACK_BYTES, WRITE | NO_EXECUTE);
        self.store(CODE, &[0xcc; CODE_BYTES]);
        self.store(PATCH, &[0xcc; PATCH_BYTES]);
        self.store(STUBS, &stubs());
        self.store(READ_ONLY, &read_only_page());
    }

    /// Maps an area; its pages are taken in an order that leaves no two neighbours.
    fn map(&mut self, linear: u64, size: usize, rights: u64) {
        for page in 0..size / PAGE {
            let physical = POOL + (self.pool_used * 7 % 32) * PAGE;
            self.pool_used += 1;
            let address = linear + (page * PAGE) as u64;
            let mut table = TABLES;
            for level in (1..4).rev() {
                table = self.next_level(table, address >> (12 + 9 * level) & 511);
            }
            self.put_entry(table, address >> 12 & 511, physical as u64 | rights | USER | PRESENT);
            self.pages.push((address, physical));
        }
    }

    fn next_level(&mut self, table: usize, index: u64) -> usize {
        // SAFETY: tables lie in guest RAM.
        let entry = unsafe { *(self.ram.add(table) as *const u64).add(index as usize) };
        if entry != 0 {
            return entry as usize & !0xfff;
        }
        let next = self.next_table;
        self.next_table += PAGE;
        self.put_entry(table, index, next as u64 | WRITE | USER | PRESENT);
        next
    }

    fn put_entry(&mut self, table: usize, index: u64, entry: u64) {
        // SAFETY: tables lie in guest RAM.
        unsafe { *(self.ram.add(table) as *mut u64).add(index as usize) = entry };
    }

    /// As Linux runs its programs.
    fn enter_user_mode(&mut self) {
        let cpu = &mut self.cpu;
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        cpu.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        cpu.cr3 = TABLES as u64;
        cpu.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        cpu.xcr0 = self.xcr0;
        cpu.cpl = 3;
        cpu.wait_sipi = false;
        // Far jumps find no descriptor: this is how 32-bit sequences end.
        cpu.gdtr = DescriptorTable::default();
        self.set_segments(64);
        self.cpu.flush_all();
    }

    fn set_segments(&mut self, bits: u32) {
        let cpu = &mut self.cpu;
        let flat = Segment { limit: u32::MAX, kind: 3, present: true, s: true, dpl: 3, g: true, ..Segment::default() };
        cpu.segs = [Segment { unusable: true, ..Segment::default() }; 6];
        let data = Segment { db: true, selector: 0x2b, ..flat };
        cpu.segs[seg::SS] = data;
        if bits == 64 {
            cpu.segs[seg::CS] = Segment { kind: 11, l: true, selector: CS64, ..flat };
        } else {
            cpu.segs[seg::CS] = Segment { kind: 11, db: true, selector: CS32, ..flat };
            (cpu.segs[seg::DS], cpu.segs[seg::ES]) = (data, data);
        }
        self.bits = bits;
    }

    fn store(&mut self, linear: u64, bytes: &[u8]) {
        self.each_page(linear, bytes.len(), |ram, range| {
            // SAFETY: each_page() stays within guest RAM.
            unsafe { ram.copy_from_nonoverlapping(bytes[range.clone()].as_ptr(), range.len()) }
        });
    }

    fn each_page(&self, linear: u64, size: usize, mut f: impl FnMut(*mut u8, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < size {
            let at = linear + done as u64;
            let offset = at as usize % PAGE;
            let length = (PAGE - offset).min(size - done);
            if let Some((_, physical)) = self.pages.iter().find(|(page, _)| *page == at - offset as u64) {
                // SAFETY: pages of the list lie in guest RAM.
                f(unsafe { self.ram.add(physical + offset) }, done..done + length);
            }
            done += length;
        }
    }

    /// Puts a case's code in its place; blocks decoded from what was there become stale.
    pub fn place(&mut self, case: &Case) {
        let image = case.image();
        let (before, size) = self.placed;
        // A case that changes code may have changed any of its area.
        let old = if before >= PATCH { (PATCH, PATCH_BYTES) } else { (before, size) };
        self.store(old.0, &vec![0xcc; old.1]);
        self.store(case.state.rip, &image);
        self.placed = (case.state.rip, image.len());
        self.announce(old.0, old.1);
        self.announce(case.state.rip, image.len());
        self.cpu.forget_returns();
    }

    /// The host wrote code.
    fn announce(&self, linear: u64, size: usize) {
        let ram = self.ram as usize;
        self.each_page(linear, size, |host, range| {
            let gpa = (host as usize - ram) as u64;
            note_store(self.slot.code_word(gpa), gpa, range.len() as u64);
        });
    }

    fn load(&mut self, case: &Case, memory: &Memory) {
        let state = &case.state;
        if self.bits != case.bits {
            self.set_segments(case.bits);
        }
        self.store(DATA, &memory.data[..]);
        self.store(STACK, &memory.stack[..]);
        let cpu = &mut self.cpu;
        cpu.regs[..16].copy_from_slice(&state.gpr);
        cpu.shared.attention.store(0, SeqCst);
        cpu.set_rflags(state.rflags);
        cpu.rip = state.rip;
        cpu.segs[seg::FS].base = state.fs;
        cpu.segs[seg::GS].base = state.gs;
        cpu.update_modes();
        cpu.shadow = 0;
        let mut image = [0; FXSAVE_BYTES];
        image[..fx::END].copy_from_slice(&state.fx);
        // A state that the native side could load is one that this accepts.
        let _ = fxrstor(&mut cpu.fp, &image, FORMAT);
        for (index, half) in state.ymm.chunks_exact(16).enumerate() {
            cpu.fp.set_ymm_high(index, half.try_into().map_or(0, u128::from_le_bytes));
        }
    }

    fn unload(&mut self, end: End, outcome: &mut Outcome) {
        outcome.end = end;
        self.each_page(DATA, DATA_BYTES, |host, range| {
            // SAFETY: each_page() stays within guest RAM.
            unsafe { host.copy_to_nonoverlapping(outcome.memory.data[range.clone()].as_mut_ptr(), range.len()) }
        });
        let stack = &mut outcome.memory.stack;
        self.each_page(STACK, STACK_BYTES, |host, range| {
            // SAFETY: as above.
            unsafe { host.copy_to_nonoverlapping(stack[range.clone()].as_mut_ptr(), range.len()) }
        });
        let code = &mut outcome.code;
        code.clear();
        if self.placed.0 >= PATCH {
            code.resize(self.placed.1, 0);
            self.each_page(self.placed.0, self.placed.1, |host, range| {
                // SAFETY: as above.
                unsafe { host.copy_to_nonoverlapping(code[range.clone()].as_mut_ptr(), range.len()) }
            });
        }
        let cpu = &self.cpu;
        outcome.state.gpr.copy_from_slice(&cpu.regs[..16]);
        outcome.state.rflags = cpu.rflags();
        outcome.state.rip = cpu.rip;
        outcome.state.fs = cpu.segs[seg::FS].base;
        outcome.state.gs = cpu.segs[seg::GS].base;
        let mut image = [0; FXSAVE_BYTES];
        fxsave(&cpu.fp, &mut image, FORMAT);
        outcome.state.fx.copy_from_slice(&image[..fx::END]);
        for (index, half) in outcome.state.ymm.chunks_exact_mut(16).enumerate() {
            half.copy_from_slice(&cpu.fp.ymm_high(index).to_le_bytes());
        }
        outcome.state.normalise(self.bits);
    }

    fn stopped(&self, stop: Stop) -> End {
        match stop {
            Stop::Fault => {
                let fault = self.cpu.fault;
                let address = if fault.vector == 14 { fault.payload } else { 0 };
                End::fault(fault.vector, fault.error.unwrap_or(0), address)
            }
            _ => End::Broken("an exit to user space"),
        }
    }

    /// Runs a placed case one instruction at a time, watching that it stays on the safe path.
    pub fn step(&mut self, case: &Case, memory: &Memory, outcome: &mut Outcome, trace: &mut Trace) {
        self.load(case, memory);
        trace.steps.clear();
        let mut index_of = vec![u32::MAX; case.code.len() + 1];
        for (index, &start) in case.starts.iter().enumerate() {
            index_of[start] = index as u32;
        }
        let end = self.walk(case, &index_of, trace);
        self.unload(end, outcome);
    }

    fn walk(&mut self, case: &Case, index_of: &[u32], trace: &mut Trace) -> End {
        for _ in 0..STEP_LIMIT {
            let rip = self.cpu.rip;
            if rip == case.end() {
                let intact = self.bytes_at(rip)[..EXIT_BYTES] == case.image()[case.code.len()..][..EXIT_BYTES];
                return if intact { End::Done } else { End::Unsafe };
            }
            let index = index_of.get(rip.wrapping_sub(case.state.rip) as usize).copied().unwrap_or(u32::MAX);
            let in_patch = rip.wrapping_sub(PATCH) < PATCH_BYTES as u64;
            let in_code = in_patch || rip.wrapping_sub(CODE) < CODE_BYTES as u64;
            if in_code && index == u32::MAX {
                return End::Unsafe;
            }
            let before = if in_patch { self.bytes_at(rip) } else { [0; 15] };
            if in_patch && !self.may_run(&before, rip) {
                return End::Unsafe;
            }
            let result: R = self.cpu.step_raw();
            // When a repeated instruction that overwrites itself finds out depends on the CPU.
            if in_patch && self.bytes_at(rip) != before && is_repeated(&before) {
                return End::Unsafe;
            }
            if index != u32::MAX {
                trace.steps.push((index, result.is_ok()));
            }
            if let Err(stop) = result {
                return self.stopped(stop);
            }
            if self.cpu.rflags() & (rflags::AC | rflags::TF) != 0 {
                return End::Unsafe;
            }
        }
        End::Limit
    }

    fn bytes_at(&self, linear: u64) -> [u8; 15] {
        let mut bytes = [0u8; 15];
        self.each_page(linear, bytes.len(), |host, range| {
            // SAFETY: each_page() stays within guest RAM.
            unsafe { host.copy_to_nonoverlapping(bytes[range.clone()].as_mut_ptr(), range.len()) }
        });
        bytes
    }

    /// Whether the host may execute what the code at `rip` has become.
    fn may_run(&self, bytes: &[u8], rip: u64) -> bool {
        let instruction = Decoder::with_ip(self.bits, bytes, rip, DecoderOptions::NONE).decode();
        usable(instruction.code(), self.bits) && is_safe(instruction.mnemonic())
    }

    /// Runs a placed case by decoded blocks, as guests run.
    pub fn run(&mut self, case: &Case, memory: &Memory, outcome: &mut Outcome) {
        self.load(case, memory);
        native::watch(&self.cpu.shared.attention);
        let result = self.cpu.run_raw(STEP_LIMIT * 64);
        native::unwatch();
        let end = match result {
            Ok(()) => End::Limit,
            Err(stop) => self.stopped(stop),
        };
        let at_end = match case.bits {
            64 => End::Fault { vector: 14, error: 4, address: EXIT_POINTER },
            _ => End::Fault { vector: 13, error: CS64 as u32 & !3, address: 0 },
        };
        let end = if end == at_end && self.cpu.rip == case.end() { End::Done } else { end };
        self.unload(end, outcome);
    }
}

/// The host's XCR0: XGETBV is compared too.
fn host_xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the native executor needs a 64-bit Linux host, all of which have XSAVE enabled where
    // FSGSBASE exists.
    unsafe { std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    low as u64 | (high as u64) << 32
}

/// Attention bits that a watchdog raises on an interpreter that does not come back.
pub const WATCHDOG: u32 = attention::KICK;

/// Whether 64-bit code is a string instruction with a repeat prefix.
fn is_repeated(bytes: &[u8]) -> bool {
    let instruction = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
    instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// Whether all of a case's instructions may run natively.
pub fn is_safe_case(case: &Case) -> bool {
    case.instructions().iter().all(|instruction| is_safe(instruction.mnemonic()))
}
