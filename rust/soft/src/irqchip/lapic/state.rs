//! The local APIC as a state machine: acceptance, priority, acknowledgement, reset
//! (Intel SDM volume 3, chapter "Advanced Programmable Interrupt Controller").
//!
//! No locks, threads or other APICs here: a write that concerns others returns an [`Outcome`]
//! that the owner carries out after it has let go of this APIC's lock.

use super::super::delivery::{Address, DeliveryMode, Ipi, Message};
use super::regs::*;
use super::timer::{Clock, Timer, TimerMode};

/// NMIs that can wait: one in delivery, one behind it.
const MAX_PENDING_NMIS: u8 = 2;

/// A set of 256 vectors, laid out as the registers are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vectors(pub [u32; 8]);

impl Vectors {
    pub(crate) fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    pub(crate) fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    pub(crate) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & (1 << (vector & 31)) != 0
    }

    pub(crate) fn highest(&self) -> Option<u8> {
        let word = (0..8).rev().find(|&index| self.0[index] != 0)?;
        Some((word as u8) << 5 | (31 - self.0[word].leading_zeros()) as u8)
    }
}

/// End of an interrupt, which the IOAPIC may want to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndOfInterrupt {
    pub vector: u8,
    pub level: bool,
}

/// What a register write asks of the rest of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub ipi: Option<Ipi>,
    pub eoi: Option<EndOfInterrupt>,
}

/// Signals that wait for the processor besides vectored interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PendingEvents {
    /// NMIs that wait, 0 to 2.
    pub nmis: u8,
    /// The processor is handling an NMI: it takes the next one after IRET.
    pub nmi_blocked: bool,
    /// INIT was received.
    pub init: bool,
    /// A start-up IPI with this vector was received after the last INIT.
    pub sipi: Option<u8>,
}

/// What the vCPU's CPUID says of its local APIC.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpuid {
    /// MAXPHYADDR: higher bits of IA32_APIC_BASE are reserved.
    pub physical_bits: u8,
    pub x2apic: bool,
    pub tsc_deadline: bool,
}

/// Everything one local APIC remembers.
#[derive(Clone, Debug)]
pub(crate) struct LapicState {
    /// APIC ID at power-up, also the x2APIC ID.
    pub initial_id: u32,
    pub base: u64,
    pub cpuid: Cpuid,
    pub xapic_id: u8,
    pub tpr: u8,
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub isr: Vectors,
    pub tmr: Vectors,
    pub irr: Vectors,
    pub esr: u32,
    /// Errors since the last write of ESR; that write makes them visible.
    pub esr_latch: u32,
    pub icr_low: u32,
    pub icr_high: u32,
    pub lvt: [u32; LVT_COUNT],
    pub timer: Timer,
    pub events: PendingEvents,
}

impl LapicState {
    pub(crate) fn new(initial_id: u32) -> Self {
        let mut state = Self {
            initial_id,
            base: 0,
            cpuid: Cpuid { physical_bits: 46, x2apic: true, tsc_deadline: true },
            xapic_id: initial_id as u8,
            tpr: 0,
            ldr: 0,
            dfr: !0,
            svr: 0xff,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            esr: 0,
            esr_latch: 0,
            icr_low: 0,
            icr_high: 0,
            lvt: [LVT_MASKED; LVT_COUNT],
            timer: Timer::default(),
            events: PendingEvents::default(),
        };
        state.power_up();
        state
    }

    fn is_bsp(&self) -> bool {
        self.initial_id == 0
    }

    /// Power-up or RESET: everything, IA32_APIC_BASE included.
    pub(crate) fn power_up(&mut self) {
        let bsp = if self.is_bsp() { APIC_BASE_BSP } else { 0 };
        self.base = DEFAULT_BASE | APIC_BASE_ENABLE | bsp;
        self.xapic_id = self.initial_id as u8;
        self.events = PendingEvents::default();
        self.init();
    }

    /// INIT: the registers, but neither the APIC ID nor IA32_APIC_BASE.
    pub(crate) fn init(&mut self) {
        self.tpr = 0;
        self.dfr = !0;
        self.svr = 0xff;
        self.isr = Vectors::default();
        self.tmr = Vectors::default();
        self.irr = Vectors::default();
        self.esr = 0;
        self.esr_latch = 0;
        self.icr_low = 0;
        self.icr_high = 0;
        self.lvt = [LVT_MASKED; LVT_COUNT];
        if self.is_bsp() {
            // Virtual wire mode, as firmware leaves it and as KVM's compatibility quirk has it:
            // the PIC reaches the boot processor before anybody programs LINT0.
            self.lvt[LINT0] = LVT_EXTINT;
        }
        self.timer = Timer::default();
        self.ldr = if self.x2apic() { self.x2apic_ldr() } else { 0 };
    }

    pub(crate) fn hardware_enabled(&self) -> bool {
        self.base & APIC_BASE_ENABLE != 0
    }

    pub(crate) fn x2apic(&self) -> bool {
        self.base & (APIC_BASE_ENABLE | APIC_BASE_EXTD) == APIC_BASE_ENABLE | APIC_BASE_EXTD
    }

    pub(crate) fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLED != 0
    }

    /// x2APIC logical identity: cluster in the upper half, a bit of 16 in the lower.
    pub(crate) fn x2apic_ldr(&self) -> u32 {
        ((self.initial_id & !0xf) << 12) | (1 << (self.initial_id & 0xf))
    }

    pub(crate) fn address(&self) -> Address {
        Address {
            initial_id: self.initial_id,
            xapic_id: self.xapic_id,
            ldr: self.ldr,
            dfr: self.dfr,
            hardware_enabled: self.hardware_enabled(),
            x2apic: self.x2apic(),
            software_enabled: self.software_enabled(),
        }
    }

    pub(crate) fn timer_mode(&self) -> TimerMode {
        TimerMode::from_lvt(self.lvt[TIMER])
    }

    /// Processor priority: the higher of the task's and of the interrupt in service.
    pub(crate) fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service {
            self.tpr
        } else {
            in_service
        }
    }

    /// The vector the processor may take now. Software disable does not stop what is pending.
    pub(crate) fn deliverable(&self) -> Option<u8> {
        if !self.hardware_enabled() {
            return None;
        }
        self.irr.highest().filter(|&vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// Whether the PIC's INTR reaches this processor: through LINT0, or past a disabled APIC.
    pub(crate) fn admits_extint(&self) -> bool {
        let lint0 = self.lvt[LINT0];
        !self.hardware_enabled()
            || (lint0 & LVT_MASKED == 0 && DeliveryMode::from_field(lint0 >> 8) == DeliveryMode::ExtInt)
    }

    /// Whether LINT0 is an NMI line, as Linux's old NMI watchdog used it with the PIT.
    pub(crate) fn lint0_is_nmi(&self) -> bool {
        let lint0 = self.lvt[LINT0];
        lint0 & LVT_MASKED == 0 && DeliveryMode::from_field(lint0 >> 8) == DeliveryMode::Nmi
    }

    /// Moves the deliverable vector from requested to in service.
    pub(crate) fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// Ends the highest interrupt in service.
    pub(crate) fn end_of_interrupt(&mut self) -> Option<EndOfInterrupt> {
        let vector = self.isr.highest()?;
        self.isr.remove(vector);
        Some(EndOfInterrupt { vector, level: self.tmr.contains(vector) })
    }

    /// Takes a message from the bus. Returns whether it was accepted.
    pub(crate) fn accept(&mut self, message: &Message) -> bool {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                (message.assert || !message.level) && self.accept_vector(message.vector, message.level)
            }
            DeliveryMode::Nmi => {
                self.accept_nmi();
                true
            }
            DeliveryMode::Init => {
                // A level de-assert only synchronised arbitration on old processors.
                let accepted = message.assert || !message.level;
                if accepted {
                    self.events.init = true;
                    self.events.sipi = None;
                }
                accepted
            }
            DeliveryMode::StartUp => {
                self.events.sipi = Some(message.vector);
                true
            }
            DeliveryMode::Smi | DeliveryMode::Reserved | DeliveryMode::ExtInt => false,
        }
    }

    pub(crate) fn accept_nmi(&mut self) {
        let limit = if self.events.nmi_blocked { 1 } else { MAX_PENDING_NMIS };
        self.events.nmis = (self.events.nmis + 1).min(limit);
    }

    /// A vectored interrupt arrives, from the bus or from the local vector table.
    pub(crate) fn accept_vector(&mut self, vector: u8, level: bool) -> bool {
        if !self.hardware_enabled() || !self.software_enabled() {
            return false;
        }
        if vector < FIRST_LEGAL_VECTOR {
            self.report_error(ESR_RECEIVED_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.insert(vector);
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        true
    }

    /// Latches an error; the first one since the last write of ESR interrupts.
    pub(crate) fn report_error(&mut self, error: u32) {
        let armed = self.esr_latch == 0;
        self.esr_latch |= error;
        let entry = self.lvt[ERROR];
        if armed && entry & LVT_MASKED == 0 {
            if entry as u8 >= FIRST_LEGAL_VECTOR {
                self.accept_vector(entry as u8, false);
            } else {
                self.esr_latch |= ESR_RECEIVED_ILLEGAL_VECTOR;
            }
        }
    }

    /// Raises the local interrupt of LVT entry `index`. Returns whether anything came of it.
    pub(crate) fn raise_local(&mut self, index: usize) -> bool {
        let entry = self.lvt[index];
        if !self.hardware_enabled() || entry & LVT_MASKED != 0 {
            return false;
        }
        let mode = match index {
            // These entries have no delivery mode field.
            TIMER | ERROR => DeliveryMode::Fixed,
            _ => DeliveryMode::from_field(entry >> 8),
        };
        match mode {
            DeliveryMode::Fixed => self.accept_vector(entry as u8, false),
            DeliveryMode::Nmi => {
                self.accept_nmi();
                true
            }
            DeliveryMode::Init => {
                self.events.init = true;
                self.events.sipi = None;
                true
            }
            _ => false,
        }
    }

    /// Lets the timer act on the time. Every write to it starts with this, because the timer
    /// thread may be late and what has expired must neither be lost nor be seen as running.
    pub(crate) fn run_timer(&mut self, clock: &Clock) {
        let mode = self.timer_mode();
        if self.timer.expire(mode, clock) {
            self.raise_local(TIMER);
        }
    }
}
