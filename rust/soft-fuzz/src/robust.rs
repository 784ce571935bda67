//! Robustness: random bytes as code, in random states of every mode, with random descriptor and page
//! tables. The interpreter may fault, exit or shut down; it must neither panic nor hang, and what it
//! cannot represent must be an exit.
//!
//! A case depends on its number alone, so one that fails is run again by `--seed <number>
//! --instructions 1`.

use crate::rng::Rng;
use crate::values;
use iced_x86::{Code, EncodingKind, MandatoryPrefix, OpCodeTableKind};
use ostler_soft::cpu::run::RunEnd;
use ostler_soft::cpu::state::{cr0, cr4, efer, rflags, seg, DescriptorTable, Segment};
use ostler_soft::cpu::testing::NoBoard;
use ostler_soft::cpu::{attention, Cpu, Exit, Shared};
use ostler_soft::mem::{note_store, zeroed_words, Slot, SlotMap};
use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::Arc;
use std::time::Duration;

const RAM_BYTES: usize = 0x4_0000;
const PAGE: usize = 4096;
const GDT: usize = 0x2000;
const IDT: usize = 0x3000;
const TSS: usize = 0x4000;
const TABLES: usize = 0x8000;
const STEPS: u64 = 400;
/// How long a case that loops runs before it is kicked.
const KICK: Duration = Duration::from_millis(2);
/// Kicks after which an interpreter that does not come back counts as hung.
const HUNG: u64 = 20_000;

struct Machine {
    cpu: Box<Cpu>,
    slots: Vec<Arc<Slot>>,
    ram: *mut u8,
}

impl Machine {
    /// RAM, a read-only slot, a slot with a dirty log; holes between them are MMIO.
    fn new(shared: Arc<Shared>) -> Self {
        let ram = Box::leak(vec![0u8; RAM_BYTES + 3 * PAGE].into_boxed_slice()).as_mut_ptr();
        // SAFETY: within the allocation, which has a page to spare.
        let ram = unsafe { ram.add(ram.align_offset(PAGE)) };
        let slot = |id: u32, gpa: u64, offset: usize, size: usize| Slot {
            id,
            gpa,
            size: size as u64,
            // SAFETY: offsets below stay within the allocation.
            host: unsafe { ram.add(offset) },
            read_only: id == 1,
            dirty: (id == 2).then(|| zeroed_words(Slot::bitmap_words(size as u64))),
            code: zeroed_words(size / PAGE),
        };
        let slots: Vec<Arc<Slot>> = vec![
            Arc::new(slot(0, 0, 0, RAM_BYTES)),
            Arc::new(slot(1, 0xf_0000, RAM_BYTES, PAGE)),
            Arc::new(slot(2, 0x10_0000, RAM_BYTES + PAGE, PAGE)),
        ];
        let map = Arc::new(SlotMap::new(slots.clone()));
        Self { cpu: Cpu::new(0, map, shared, Box::new(NoBoard)), slots, ram }
    }

    fn store(&mut self, at: usize, bytes: &[u8]) {
        let at = at % (RAM_BYTES - bytes.len());
        // SAFETY: within RAM, as just computed.
        unsafe { self.ram.add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn prepare(&mut self, rng: &mut Rng) {
        for at in (0..RAM_BYTES + 2 * PAGE).step_by(8) {
            // SAFETY: within the allocation.
            unsafe { (self.ram.add(at) as *mut u64).write(if rng.percent(30) { 0 } else { rng.u64() }) };
        }
        self.tables(rng);
        for _ in 0..24 {
            let at = rng.below(RAM_BYTES as u64 - 0x400) as usize;
            let code: Vec<u8> = (0..12).flat_map(|_| instruction(rng)).collect();
            self.store(at, &code);
        }
        for slot in &self.slots {
            for gpa in (slot.gpa..slot.gpa + slot.size).step_by(PAGE) {
                note_store(slot.code_word(gpa), 0, PAGE as u64);
            }
        }
        self.state(rng);
    }

    /// Tables that make sense often enough: descriptors and gates with plausible types, page tables
    /// that map low memory to itself but for some entries.
    fn tables(&mut self, rng: &mut Rng) {
        for at in (0..0x200).step_by(8) {
            let kind = rng.pick(&[0x9a, 0x92, 0xfa, 0xf2, 0x89, 0x8b, 0x82, 0x8c, 0x85, 0xec, 0x9e, 0x00, 0x1a]);
            let base = rng.below(RAM_BYTES as u64) & !0xf;
            let flags = rng.pick(&[0x0u64, 0xc, 0xa, 0x4, 0x2, 0x8]);
            let mut entry = 0xffff | (base & 0xff_ffff) << 16 | kind << 40 | 0xf << 48 | flags << 52;
            entry |= if rng.percent(50) { 0 } else { rng.below(3) << 45 };
            entry = if rng.percent(5) { rng.u64() } else { entry };
            self.store(GDT + at, &entry.to_le_bytes());
        }
        for at in (0..0x1000).step_by(8) {
            let kind = rng.pick(&[0x8e, 0x8f, 0xee, 0xef, 0x85, 0x86, 0x87, 0x0e]);
            let offset = rng.below(RAM_BYTES as u64);
            let selector = rng.below(0x40) << 3 | rng.below(4);
            let entry = offset & 0xffff | selector << 16 | kind << 40 | (offset >> 16) << 48;
            self.store(IDT + at, &entry.to_le_bytes());
        }
        for level in 0..3 {
            for index in 0..512u64 {
                let next = if level == 2 { index << 21 | 0x80 } else { (TABLES + (level + 1) * PAGE) as u64 };
                let mut entry = next | 7;
                entry = if rng.percent(6) { entry ^ 1 << rng.below(64) } else { entry };
                self.store(TABLES + level * PAGE + 8 * index as usize, &entry.to_le_bytes());
            }
        }
    }

    fn state(&mut self, rng: &mut Rng) {
        let cpu = &mut self.cpu;
        cpu.reset();
        cpu.wait_sipi = false;
        cpu.shared.attention.store(0, SeqCst);
        cpu.pending = Default::default();
        cpu.io.retire();
        cpu.io.queue.clear();
        for register in cpu.regs[..16].iter_mut() {
            *register = match rng.below(4) {
                0 => values::integer(rng),
                1 => rng.below(0x12_0000),
                _ => rng.below(RAM_BYTES as u64),
            };
        }
        let mode = rng.below(6);
        cpu.cr0 = cr0::ET | cr0::NE | if mode > 0 { cr0::PE } else { 0 };
        cpu.cr0 |= rng.u64() & (cr0::MP | cr0::EM | cr0::TS | cr0::WP | cr0::AM) & rng.u64();
        cpu.cr3 = TABLES as u64;
        cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | rng.u64() & 0x37_07ff & !(cr4::PAE | cr4::LA57 | cr4::PCIDE);
        if mode >= 3 && (mode >= 4 || rng.percent(50)) {
            cpu.cr0 |= cr0::PG;
            cpu.cr4 |= if rng.percent(50) || mode >= 4 { cr4::PAE } else { 0 };
        }
        cpu.efer = efer::SCE | efer::NXE | if mode >= 4 { efer::LME | efer::LMA } else { 0 };
        cpu.xcr0 = rng.pick(&[1, 3, 7]);
        self.segments(rng, mode);
        let cpu = &mut self.cpu;
        let mut flags = rng.u64() & (rflags::SYS | 0x8d5) & rng.u64() & !rflags::VM;
        flags |= if mode == 2 { rflags::VM } else { 0 };
        cpu.set_rflags(flags | 2);
        cpu.rip = rng.below(if mode == 0 || mode == 2 { 0x1_0000 } else { RAM_BYTES as u64 });
        cpu.dr[7] = if rng.percent(10) { rng.u64() & 0xffff_27ff | 0x400 } else { 0x400 };
        for index in 0..4 {
            cpu.dr[index] = rng.below(RAM_BYTES as u64);
        }
        cpu.load_pdptrs();
        cpu.flush_all();
        cpu.update_modes();
    }

    fn segments(&mut self, rng: &mut Rng, mode: u64) {
        let real = mode == 0 || mode == 2;
        let cpl = match mode {
            0 => 0,
            2 => 3,
            _ => rng.pick(&[0, 0, 0, 3, 3, 1]),
        };
        let cpu = &mut self.cpu;
        cpu.cpl = cpl;
        for index in 0..6 {
            let selector = if real { rng.below(0x3000) } else { rng.below(0x40) << 3 | cpl as u64 } as u16;
            let wide = rng.percent(70);
            cpu.segs[index] = Segment {
                base: if real { (selector as u64) << 4 } else { rng.pick(&[0, 0, 0, 0x1000, 0xffff_f000]) },
                limit: if real { 0xffff } else { rng.pick(&[u32::MAX, u32::MAX, 0xffff, 0xfff]) },
                selector,
                kind: if index == seg::CS { rng.pick(&[11, 11, 9, 15]) } else { rng.pick(&[3, 3, 1, 7]) },
                present: true,
                dpl: cpl,
                db: wide && !real && !(index == seg::CS && mode == 5),
                s: true,
                l: index == seg::CS && mode == 5,
                g: !real,
                avl: false,
                unusable: !real && index != seg::CS && rng.percent(10),
            };
        }
        cpu.gdtr = DescriptorTable { base: GDT as u64, limit: 0x1ff };
        cpu.idtr = DescriptorTable { base: if mode == 0 { 0 } else { IDT as u64 }, limit: 0xfff };
        cpu.tr = Segment { base: TSS as u64, limit: 0xfff, kind: 11, present: true, selector: 0x20, ..cpu.tr };
    }

    /// Steps, or runs by blocks, until something ends the case.
    fn execute(&mut self, rng: &mut Rng, ends: &mut BTreeMap<String, u64>) {
        let stepping = rng.percent(50);
        for _ in 0..STEPS {
            let end = if stepping { self.cpu.step() } else { Some(self.cpu.run()) };
            let name = match end {
                None => continue,
                Some(RunEnd::Exit(Exit::Mmio { write: None, .. } | Exit::Io { write: None, .. })) => {
                    self.cpu.io.complete(rng.u64());
                    continue;
                }
                Some(RunEnd::Exit(Exit::Mmio { .. } | Exit::Io { .. } | Exit::Hlt)) => {
                    self.cpu.halted = false;
                    continue;
                }
                Some(RunEnd::Exit(Exit::Internal(why))) => format!("internal: {why}"),
                Some(RunEnd::Exit(Exit::Debug { .. })) => continue,
                Some(RunEnd::Exit(exit)) => format!("{exit:?}"),
                Some(other) => format!("{other:?}"),
            };
            *ends.entry(name).or_default() += 1;
            return;
        }
        *ends.entry("steps used up".to_owned()).or_default() += 1;
    }
}

/// Random bytes that begin, mostly, as some instruction does.
fn instruction(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16);
    while rng.percent(25) {
        bytes.push(rng.pick(&[0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x48, 0x4f, 0x41]));
    }
    if rng.percent(92) {
        let codes = Code::values().len() as u64;
        let info = loop {
            let code = Code::try_from(rng.below(codes) as usize).unwrap_or_default();
            let info = code.op_code();
            if info.is_instruction() && info.encoding() == EncodingKind::Legacy {
                break info;
            }
        };
        bytes.extend(match info.mandatory_prefix() {
            MandatoryPrefix::P66 => Some(0x66),
            MandatoryPrefix::PF3 => Some(0xf3),
            MandatoryPrefix::PF2 => Some(0xf2),
            _ => None,
        });
        bytes.extend_from_slice(match info.table() {
            OpCodeTableKind::T0F => &[0x0f],
            OpCodeTableKind::T0F38 => &[0x0f, 0x38],
            OpCodeTableKind::T0F3A => &[0x0f, 0x3a],
            _ => &[],
        });
        let opcode = info.op_code().to_be_bytes();
        bytes.extend_from_slice(&opcode[4 - info.op_code_len() as usize..]);
        if let Ok(group) = u8::try_from(info.group_index()) {
            bytes.push(rng.u64() as u8 & 0xc7 | group << 3);
        }
    }
    for _ in 0..rng.below(8) {
        bytes.push(if rng.percent(40) { 0 } else { rng.u64() as u8 });
    }
    bytes
}

/// Runs cases until about `instructions` were retired. False when one panicked.
pub fn run(instructions: u64, seed: u64) -> Result<bool, String> {
    let shared = Arc::new(Shared::default());
    let (case, done) = (Arc::new(AtomicU64::new(seed)), Arc::new(AtomicBool::new(false)));
    let kicker = start_kicker(shared.clone(), case.clone(), done.clone());
    let mut machine = Machine::new(shared.clone());
    let mut ends = BTreeMap::new();
    let (mut retired, mut panics, first) = (0, 0, seed);
    while retired < instructions && panics < 20 {
        let number = case.load(SeqCst);
        let mut rng = Rng::new(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        machine.prepare(&mut rng);
        let before = machine.cpu.retired;
        let result = catch_unwind(AssertUnwindSafe(|| machine.execute(&mut rng, &mut ends)));
        retired += 1 + machine.cpu.retired.wrapping_sub(before);
        if result.is_err() {
            println!("panic in case {number}: run it again by --mode robust --seed {number} --instructions 1");
            panics += 1;
            machine = Machine::new(shared.clone());
        }
        case.store(number + 1, SeqCst);
    }
    done.store(true, SeqCst);
    kicker.join().map_err(|_| "the watchdog died".to_owned())?;
    println!("cases                    {:>12}", case.load(SeqCst) - first);
    println!("instructions retired     {retired:>12}");
    println!("panics                   {panics:>12}");
    for (end, count) in &ends {
        println!("{count:>12}  {end}");
    }
    Ok(panics == 0)
}

/// Ends cases that loop; ends the process, naming the case, when one cannot be ended.
fn start_kicker(shared: Arc<Shared>, case: Arc<AtomicU64>, done: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut last, mut kicks) = (u64::MAX, 0);
        while !done.load(SeqCst) {
            std::thread::sleep(KICK);
            let now = case.load(SeqCst);
            kicks = if now == last { kicks + 1 } else { 0 };
            if now == last {
                shared.raise(attention::KICK);
            }
            last = now;
            if kicks > HUNG {
                eprintln!("ostler-soft-fuzz: case {now} hangs: --mode robust --seed {now} --instructions 1");
                std::process::exit(1);
            }
        }
    })
}
