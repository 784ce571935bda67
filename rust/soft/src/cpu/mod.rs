//! One virtual CPU: its architectural state and the interpreter that advances it.
//!
//! Control flows through [`Stop`]: an instruction's handler returns `Ok(())` to go on to the next
//! one of its block, or why it does not. A handler that returns [`Stop::Fault`] or [`Stop::Exit`]
//! has changed nothing a guest can see; it will be executed again from its start.
//!
//! | file | what |
//! |---|---|
//! | `alu.rs` | integer arithmetic with exact flags, by the host's own instructions |
//! | `state.rs` | segments, control registers' bits, flags image, resets |
//! | `segment.rs`, `task.rs` | descriptors, loads of segment registers, task switches |
//! | `event.rs`, `interrupt.rs` | which event is delivered, and how its handler is entered |
//! | `debug.rs` | breakpoints, single step, guest debugging |
//! | `cpuid.rs`, `msr.rs` | CPUID, model-specific registers |
//! | `mmu.rs`, `walk.rs` | the software TLB, page walks |
//! | `operand.rs`, `access.rs`, `stack.rs` | operands and guest memory accesses of handlers |
//! | `io.rs` | port and MMIO accesses, in-engine or as exits |
//! | `op.rs`, `bind.rs`, `table.rs` | decoded operations and the opcode table |
//! | `block.rs`, `run.rs` | decoded blocks and the main loop |
//! | `exec/` | the handlers |
//! | `translate/` | native code for blocks that run often |

pub mod access;
pub mod alu;
pub mod atomic;
pub mod bind;
pub mod block;
pub mod cpuid;
pub mod debug;
pub mod event;
pub mod exec;
#[cfg(test)]
pub(crate) mod fixture;
pub mod interrupt;
pub mod io;
pub(crate) mod lockstep;
pub mod mmu;
pub mod msr;
pub mod op;
pub mod operand;
pub mod run;
pub mod segment;
pub mod stack;
pub mod state;
pub(crate) mod stored;
pub mod table;
pub mod task;
pub mod testing;
pub mod translate;
pub mod walk;

use crate::counters::{Counters, Published};
use crate::mem::SlotMap;
use mmu::Tlb;
use state::{CodeSize, DescriptorTable, Segment};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::*};
use std::sync::{Arc, Mutex};

/// Why a handler does not go on to the next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    /// Control was transferred: `Cpu::rip` holds where to.
    Branch,
    /// `Cpu::fault` holds an exception; nothing was changed.
    Fault,
    /// `Cpu::exit` needs user space before the instruction can be executed (again).
    Exit,
    /// The instruction is complete and `Cpu::exit` is for user space to see.
    ExitAfter,
    /// One step of a repeated instruction is complete; RIP stays on it.
    Again,
    /// The instruction is complete, but the block must be left (modes, code or mappings changed).
    Leave,
}

/// What every handler returns.
pub type R<T = ()> = Result<T, Stop>;

/// An exception to deliver. SDM vol. 3, 6.15.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Vector 0-31.
    pub vector: u8,
    /// Its error code, for the vectors that push one.
    pub error: Option<u32>,
    /// For #PF: the linear address that goes into CR2; for #DB: the DR6 bits to set.
    pub payload: u64,
}

/// Exception vectors.
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// What `run` gives back to user space; becomes a `kvm_run` exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A port access; the data of a write is here, that of a read comes by `Cpu::io.complete`.
    Io {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
        /// The value written, or `None` for a read.
        write: Option<u32>,
    },
    /// A guest-physical access outside of all slots.
    Mmio {
        /// Guest-physical address.
        gpa: u64,
        /// 1 to 8 bytes.
        size: u8,
        /// The value written, or `None` for a read.
        write: Option<u64>,
    },
    /// HLT without an in-engine irqchip.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// A guest-debug event (`KVM_EXIT_DEBUG`).
    Debug {
        /// 1 (#DB) or 3 (#BP).
        exception: u8,
        /// Linear address of the instruction.
        pc: u64,
        /// DR6 as the guest would see it.
        dr6: u64,
        /// DR7 in force.
        dr7: u64,
    },
    /// The interpreter met something it cannot represent.
    Internal(&'static str),
}

/// Bits of [`Shared::attention`]: what makes a running vCPU leave its fast loop.
#[allow(missing_docs)]
pub mod attention {
    /// The local APIC (or PIC) may have an interrupt to deliver.
    pub const IRQ: u32 = 1;
    /// NMI, INIT or SIPI arrived.
    pub const EVENT: u32 = 2;
    /// `run` must return with EINTR.
    pub const KICK: u32 = 4;
    /// The memory slots changed: take the new map, forget all translations.
    pub const SLOTS: u32 = 8;
    /// Forget write translations (dirty log read, code found on pages).
    pub const WRITES: u32 = 16;
    /// MMIO writes are queued in `Cpu::io`.
    pub const QUEUED: u32 = 32;
    /// Code changed somewhere: leave loops of translated code and look for it anew.
    pub const CODE: u32 = 128;
    /// TF, debug registers or guest debugging: one instruction at a time.
    pub const SINGLE: u32 = 64;
}

/// The part of a vCPU that other threads touch.
#[derive(Default)]
pub struct Shared {
    /// Bits of [`attention`].
    pub attention: AtomicU32,
    /// The vCPU's thread is executing guest code (not blocked in HLT, not in user space).
    pub in_guest: AtomicBool,
    /// The slot map to take; see [`attention::SLOTS`].
    pub new_slots: Mutex<Option<Arc<SlotMap>>>,
    /// Physical pages on which another vCPU found code; see [`attention::WRITES`].
    pub code_pages: Mutex<Vec<u64>>,
    /// What the vCPU did so far.
    pub counters: Published,
}

impl Shared {
    /// Sets attention bits; the vCPU sees them before its next block.
    pub fn raise(&self, bits: u32) {
        self.attention.fetch_or(bits, SeqCst);
    }
}

/// #GP(0), from an MSR access the board refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gp;

/// What a vCPU needs of its board: the irqchip, in-engine devices, clocks, the other vCPUs.
/// `board.rs` implements it.
#[allow(missing_docs)]
pub trait Board: Send {
    /// In-engine MMIO (IOAPIC, local APIC page): `None` when the address is user space's.
    fn mmio_read(&mut self, gpa: u64, size: u8) -> Option<u64>;
    /// As `mmio_read`; also matches ioeventfds. `false` when it is user space's.
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) -> bool;
    /// In-engine ports (PIC, PIT, 0x61).
    fn pio_read(&mut self, port: u16, size: u8) -> Option<u32>;
    fn pio_write(&mut self, port: u16, size: u8, value: u32) -> bool;
    /// Local APIC MSRs (APIC_BASE, 0x800-0x83f, TSC_DEADLINE) and kvmclock's; `None`: not the board's.
    fn msr_read(&mut self, msr: u32) -> Option<Result<u64, Gp>>;
    fn msr_write(&mut self, msr: u32, value: u64) -> Option<Result<(), Gp>>;
    fn cr8(&mut self) -> u64;
    fn set_cr8(&mut self, value: u64);
    /// An interrupt could be accepted now (cheap: one atomic load).
    fn has_interrupt(&self) -> bool;
    /// Accepts it.
    fn ack_interrupt(&mut self) -> Option<u8>;
    fn take_nmi(&mut self) -> bool;
    fn take_init(&mut self) -> bool;
    fn is_bsp(&self) -> bool;
    fn take_sipi(&mut self) -> Option<u8>;
    /// HLT and waiting for SIPI are handled inside (there is an irqchip).
    fn has_irqchip(&self) -> bool;
    /// The guest's time-stamp counter now.
    fn tsc(&self) -> u64;
    /// WRMSR IA32_TSC.
    fn set_tsc(&mut self, value: u64);
    /// The first decoded code on page `gpa` (page address): every other vCPU must drop its write
    /// translations of it.
    /// `true`: one of them may go on storing unnoticed until [`Board::code_noticed`].
    fn code_page(&mut self, gpa: u64) -> bool;
    /// Whether every other vCPU has dropped what `code_page` was about.
    fn code_noticed(&self) -> bool {
        true
    }
    /// This vCPU changed code: the others must not stay in what they made of it.
    fn code_changed(&mut self) {}
    /// Random bits for RDRAND and RDSEED; `None` where the host has none just now.
    fn random(&mut self) -> Option<u64> {
        let mut bytes = [0u8; 8];
        // SAFETY: the buffer is valid for its length; up to 256 bytes are never cut short.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        (got == bytes.len() as isize).then(|| u64::from_le_bytes(bytes))
    }
    /// The CPU, with `retired` instructions behind it, looks for events, for these attention bits.
    fn attending(&mut self, _bits: u32, _retired: u64) {}
    /// Hypercall (VMCALL/VMMCALL): nr, a0..a3 -> result.
    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64;
}

/// Slots of the register file: the 16 GPRs, then a constant zero and the block's base.
pub const ZERO: u8 = 16;
/// The linear address (RIP) of the running block's first byte: RIP-relative operands add to it.
pub const RIP_BASE: u8 = 17;

/// A virtual CPU.
///
/// What translated code touches comes first, within reach of a one-byte displacement; see
/// `translate/layout.rs`.
#[repr(C)]
pub struct Cpu {
    /// GPRs in encoding order, [`ZERO`], [`RIP_BASE`].
    pub regs: [u64; 18],
    /// The TLB array of the current mode.
    pub(crate) tlb_now: *mut mmu::Entry,
    /// The address space number in force, in the low 12 bits of every tag.
    pub(crate) asid: u64,
    /// Instructions retired.
    pub retired: u64,
    /// Arithmetic flags: high byte as LAHF gives it, low byte OF (0 or 1).
    pub flags: u16,
    /// What translated code keeps.
    pub(crate) native: translate::layout::Native,
    /// Effective segment bases by segment number ES CS SS DS FS GS: zero in 64-bit mode but for FS, GS.
    pub seg_base: [u64; 8],
    /// And what it hands out.
    pub(crate) native_out: translate::layout::Out,
    /// Segmentation needs checks (not 64-bit mode).
    pub(crate) legacy: bool,
    /// The other RFLAGS bits (TF IF DF IOPL NT RF VM AC VIF VIP ID).
    pub sys_flags: u32,
    /// Next instruction (offset in CS). Exact between blocks and whenever a handler stops.
    pub rip: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// Code size by CS and EFER.LMA.
    pub code_size: CodeSize,
    /// Interrupts are held off for one instruction (STI, MOV SS, POP SS).
    pub shadow: u8,
    /// NMIs are held off until IRET.
    pub nmi_blocked: bool,
    /// Segment registers ES CS SS DS FS GS.
    pub segs: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base and PCID.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// Rights of user pages by protection key. It is no XSAVE component here, nor part of a
    /// saved state, and so is no default model's.
    pub pkru: u32,
    /// Debug registers 0-3, then DR6 and DR7 in slots 6 and 7.
    pub dr: [u64; 8],
    /// Model-specific registers the CPU itself keeps.
    pub msr: state::Msrs,
    /// What CPUID answers.
    pub cpuid: state::CpuidTable,
    /// MAXPHYADDR of the model.
    pub phys_bits: u8,
    /// The exception behind [`Stop::Fault`].
    pub fault: Fault,
    /// An event to deliver before the next instruction (injected or restored).
    pub pending: state::Pending,
    /// The exit behind [`Stop::Exit`] and [`Stop::ExitAfter`].
    pub exit: Option<Exit>,
    /// The MMIO and port accesses of the instruction in progress.
    pub io: io::Io,
    /// HLT was executed: nothing runs until an event.
    pub halted: bool,
    /// Application processor that waits for SIPI.
    pub wait_sipi: bool,
    /// `kvm_guest_debug.control`.
    pub guest_debug: u32,
    /// `kvm_guest_debug` DR0-3 and DR7 when KVM_GUESTDBG_USE_HW_BP.
    pub guest_debug_dr: [u64; 8],
    /// Debugging state of the instruction in progress.
    pub(crate) trace: debug::Trace,
    /// PAUSEs executed: spinning must end in a yield now and then.
    pub(crate) pauses: u32,
    /// What it did, but for what is counted where it happens: see [`Cpu::publish_counters`].
    pub(crate) counters: Counters,
    /// Changes whenever a linear address may translate otherwise; part of the jump cache's key.
    pub exec_epoch: u64,
    /// PAE page-directory pointers, loaded with CR3.
    pub(crate) pdptr: [u64; 4],
    pub(crate) tlb: Tlb,
    pub(crate) blocks: block::Blocks,
    /// Pages with code that other vCPUs may still store to unnoticed, see [`Cpu::serialise`].
    pub(crate) shared_code: std::collections::HashSet<u64>,
    /// The store that was prepared last, see `stored.rs`.
    pub(crate) unsettled: stored::Unsettled,
    /// Translated code; `None` where only the interpreter runs.
    pub(crate) translator: Option<Box<translate::Translator>>,
    /// x87, MMX, SSE and AVX state.
    pub fp: Box<crate::host::fpstate::FpState>,
    /// Where thunks find their memory operand; taken while one runs.
    pub(crate) scratch: Option<Box<crate::host::thunk::Scratch>>,
    pub(crate) slots: Arc<SlotMap>,
    /// What other threads see of this vCPU.
    pub shared: Arc<Shared>,
    /// The board around it.
    pub board: Box<dyn Board>,
}

// SAFETY: `tlb_now` points into `tlb`'s heap allocation, which moves with the Cpu's ownership.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A vCPU in its reset state.
    pub fn new(id: u32, slots: Arc<SlotMap>, shared: Arc<Shared>, board: Box<dyn Board>) -> Box<Self> {
        let mut tlb = Tlb::default();
        let tlb_now = tlb.array(0);
        let mut cpu = Box::new(Self {
            regs: [0; 18],
            tlb_now,
            asid: 1,
            retired: 0,
            flags: 0x0200,
            native: translate::layout::Native::new(&shared.attention),
            seg_base: [0; 8],
            native_out: translate::layout::Out::new(),
            legacy: true,
            sys_flags: 0,
            rip: 0,
            cpl: 0,
            code_size: CodeSize::B16,
            shadow: 0,
            nmi_blocked: false,
            segs: Default::default(),
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            pkru: 0,
            dr: [0; 8],
            msr: state::Msrs::default(),
            cpuid: state::CpuidTable::default(),
            phys_bits: 40,
            fault: Fault::default(),
            pending: state::Pending::default(),
            exit: None,
            io: io::Io::default(),
            halted: false,
            wait_sipi: id != 0,
            guest_debug: 0,
            guest_debug_dr: [0; 8],
            trace: debug::Trace::default(),
            pauses: 0,
            counters: Counters::default(),
            exec_epoch: 0,
            unsettled: stored::Unsettled::NONE,
            pdptr: [0; 4],
            tlb,
            blocks: block::Blocks::default(),
            shared_code: std::collections::HashSet::new(),
            translator: None,
            fp: Box::default(),
            scratch: None,
            slots,
            shared,
            board,
        });
        cpu.reset();
        cpu
    }

    // ---- faults -------------------------------------------------------------------------

    /// Stops with an exception.
    #[cold]
    pub fn raise(&mut self, vector: u8, error: Option<u32>) -> Stop {
        self.fault = Fault { vector, error, payload: 0 };
        Stop::Fault
    }

    /// Stops with #GP(error).
    #[cold]
    pub fn gp(&mut self, error: u32) -> Stop {
        self.raise(vector::GP, Some(error))
    }

    /// Stops with #UD.
    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.raise(vector::UD, None)
    }

    /// Stops with #PF(error) at `linear`; CR2 is written when it is delivered.
    #[cold]
    pub fn pf(&mut self, linear: u64, error: u32) -> Stop {
        self.fault = Fault { vector: vector::PF, error: Some(error), payload: linear };
        Stop::Fault
    }

    /// The instruction needs CPL 0, else #GP(0).
    #[inline]
    pub fn need_cpl0(&mut self) -> R {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.gp(0))
        }
    }
}
