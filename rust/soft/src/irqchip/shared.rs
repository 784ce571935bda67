//! What the handles and the threads of one VM's interrupt hardware share: the chips, and the wires
//! between them.
//!
//! See the module's head for the lock order. Functions here take one chip's lock at a time, let go
//! of it, and only then carry the consequences to the next chip.

use super::delivery::{self, Message};
use super::ioapic::{self, IoApic};
use super::irqfd::Irqfds;
use super::lapic::{EndOfInterrupt, LapicCell};
use super::pic::Pic;
use super::pit::Pit;
use super::routing::Routing;
use super::timers::{Slot, Timers, PIT_SLOT};
use super::{lock, read, Host};
use kvm_bindings::{KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, RwLock};

/// Who holds a line up. A line is up while anybody does.
pub(crate) const SOURCE_USER: u8 = 1 << 0;
pub(crate) const SOURCE_RESAMPLE: u8 = 1 << 1;
const SOURCE_PIT: u8 = 1 << 2;

/// The GSI the PIT's channel 0 drives.
const PIT_GSI: u32 = 0;

/// What the handles and the threads share.
pub(crate) struct Shared {
    pub(super) host: Arc<dyn Host>,
    pub(super) timers: Arc<Timers>,
    pub(crate) lapics: RwLock<Vec<Arc<LapicCell>>>,
    pub(super) pic: Mutex<Pic>,
    /// The PIC's INT output, for the vCPUs' polling.
    pub(super) pic_output: Arc<AtomicBool>,
    pub(super) ioapic: Mutex<IoApic>,
    /// Vectors the IOAPIC wants EOIs of, so that those of other vectors cost one load.
    pub(super) ioapic_vectors: [AtomicU64; 4],
    pub(super) pit: Mutex<Option<Pit>>,
    pub(super) routing: RwLock<Routing>,
    pub(crate) irqfds: Irqfds,
    /// KVM_X2APIC_API_* in force.
    pub(super) x2apic_api: AtomicU32,
}

impl Shared {
    pub(super) fn new(host: Arc<dyn Host>) -> std::io::Result<Self> {
        Ok(Self {
            timers: Timers::new(host.clone()),
            host,
            lapics: RwLock::new(Vec::new()),
            pic: Mutex::new(Pic::new()),
            pic_output: Arc::new(AtomicBool::new(false)),
            ioapic: Mutex::new(IoApic::new()),
            ioapic_vectors: Default::default(),
            pit: Mutex::new(None),
            routing: RwLock::new(Routing::default_x86()),
            irqfds: Irqfds::new()?,
            x2apic_api: AtomicU32::new(0),
        })
    }

    /// Whether APIC IDs of 32 bits are in use towards the VMM.
    pub(crate) fn wide_ids(&self) -> bool {
        self.x2apic_api.load(SeqCst) & KVM_X2APIC_API_USE_32BIT_IDS != 0
    }

    fn deliver(&self, message: &Message) -> i32 {
        let quirk = self.x2apic_api.load(SeqCst) & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK == 0;
        delivery::deliver(&read(&self.lapics), message, quirk)
    }

    pub(super) fn send_msi(&self, address: u64, data: u32) -> i32 {
        self.deliver(&Message::from_msi(address, data, self.wide_ids()))
    }

    pub(super) fn with_ioapic<R>(&self, change: impl FnOnce(&mut IoApic, ioapic::Deliver) -> R) -> R {
        let mut ioapic = lock(&self.ioapic);
        let result = change(&mut ioapic, &mut |message| self.deliver(message));
        for (word, vectors) in self.ioapic_vectors.iter().zip(ioapic.vectors()) {
            word.store(vectors, SeqCst);
        }
        result
    }

    pub(super) fn with_pic<R>(&self, change: impl FnOnce(&mut Pic) -> R) -> R {
        let mut pic = lock(&self.pic);
        let result = change(&mut pic);
        let output = pic.output();
        self.pic_output.store(output, SeqCst);
        drop(pic);
        if output {
            read(&self.lapics).iter().for_each(|cell| cell.pic_raised());
        }
        result
    }

    /// Runs `change` on the PIT, if there is one, and tells the timer thread of a new deadline.
    pub(super) fn with_pit<R>(&self, change: impl FnOnce(&mut Pit, u64) -> R) -> Option<R> {
        let mut guard = lock(&self.pit);
        let pit = guard.as_mut()?;
        let before_ns = pit.deadline_ns();
        let result = change(pit, self.host.now_ns());
        if pit.deadline_ns() != before_ns {
            self.timers.arm(PIT_SLOT, pit.deadline_ns());
        }
        Some(result)
    }

    /// Raises or lowers `source`'s contribution to a GSI. Returns how many interrupts that caused,
    /// 0 if it merged with one that waits, -1 if it was masked or goes nowhere.
    pub(crate) fn set_line(&self, source: u8, gsi: u32, level: bool) -> i32 {
        let targets = read(&self.routing).targets(gsi);
        let mut result = -1;
        let mut count = |outcome: i32| {
            if outcome >= 0 {
                result = result.max(0) + outcome;
            }
        };
        for input in targets.pic_inputs() {
            count(self.with_pic(|pic| pic.set_line(input, source, level)));
        }
        if let Some(pin) = targets.ioapic_pin() {
            count(self.with_ioapic(|ioapic, deliver| ioapic.set_line(pin, source, level, deliver)));
        }
        if let Some((address, data)) = targets.msi.filter(|_| level) {
            count(self.send_msi(address, data));
        }
        result
    }

    /// A local APIC ended an interrupt. No lock is held here.
    pub(crate) fn end_of_interrupt(&self, eoi: EndOfInterrupt) {
        let vector = eoi.vector;
        let word = self.ioapic_vectors[usize::from(vector >> 6)].load(SeqCst);
        if word & 1 << (vector & 63) == 0 {
            return;
        }
        let pins = lock(&self.ioapic).pins_with(vector);
        for pin in (0..ioapic::PINS as u8).filter(|pin| pins & 1 << pin != 0) {
            // Before remote IRR falls, so that a resampled line is down or up again by then.
            let gsi = read(&self.routing).gsi_of_ioapic_pin(pin);
            self.acknowledged(gsi);
        }
        if eoi.level {
            self.with_ioapic(|ioapic, deliver| ioapic.end_of_interrupt(vector, pins, deliver));
        }
    }

    /// The PIC's part of an interrupt acknowledge cycle, if it still asks for one.
    pub(crate) fn acknowledge_pic(&self) -> Option<u8> {
        let (vector, ended) = self.with_pic(|pic| pic.output().then(|| pic.acknowledge()))?;
        self.pic_inputs_ended(ended);
        Some(vector)
    }

    fn pic_inputs_ended(&self, ended: u16) {
        for input in (0..16).filter(|input| ended & 1 << input != 0) {
            let gsi = read(&self.routing).gsi_of_pic_input(input);
            self.acknowledged(gsi);
        }
    }

    /// The guest ended an interrupt of `gsi`. No chip's lock is held here.
    fn acknowledged(&self, gsi: Option<u32>) {
        let Some(gsi) = gsi else { return };
        if gsi == PIT_GSI && self.with_pit(|pit, _| pit.acknowledge()) == Some(true) {
            self.pulse_pit();
        }
        self.irqfds.acknowledged(self, gsi);
    }

    /// One tick. Each chip sees the line rise and fall under one hold of its lock: a guest that ends
    /// the interrupt before the line is down again gets its next tick from another thread, and that
    /// one must find an edge to make. Lost once, it would be waited for for ever.
    fn pulse_pit(&self) {
        let targets = read(&self.routing).targets(PIT_GSI);
        for input in targets.pic_inputs() {
            self.with_pic(|pic| [true, false].map(|level| pic.set_line(input, SOURCE_PIT, level)));
        }
        if let Some(pin) = targets.ioapic_pin() {
            self.with_ioapic(|ioapic, deliver| {
                [true, false].map(|level| ioapic.set_line(pin, SOURCE_PIT, level, deliver))
            });
        }
        if let Some((address, data)) = targets.msi {
            self.send_msi(address, data);
        }
        read(&self.lapics).iter().for_each(|cell| cell.pit_tick());
    }

    /// A pin became unmasked: ticks sent into the mask will never be acknowledged.
    pub(super) fn unmasked(&self, gsi: Option<u32>) {
        if gsi == Some(PIT_GSI) {
            self.with_pit(|pit, _| pit.reset_reinjection());
        }
    }

    /// The timer thread: a deadline has come.
    pub(crate) fn timer_due(&self, slot: Slot) {
        if slot != PIT_SLOT {
            let cell = read(&self.lapics).get(slot - 1).cloned();
            if let Some(cell) = cell {
                cell.timer_due();
            }
            return;
        }
        let pulses = lock(&self.pit).as_mut().is_some_and(|pit| {
            let pulses = pit.run(self.host.now_ns());
            self.timers.arm(PIT_SLOT, pit.deadline_ns());
            pulses
        });
        if pulses {
            self.pulse_pit();
        }
    }

    pub(super) fn read_pic(&self, port: u16) -> u8 {
        let (value, ended) = self.with_pic(|pic| pic.read(port));
        self.pic_inputs_ended(ended);
        value
    }

    pub(super) fn write_pic(&self, port: u16, value: u8) {
        let (ended, unmasks_timer) = self.with_pic(|pic| {
            let masked = pic.masks_timer();
            let ended = pic.write(port, value);
            (ended, masked && !pic.masks_timer())
        });
        self.pic_inputs_ended(ended);
        if unmasks_timer {
            let gsi = read(&self.routing).gsi_of_pic_input(0);
            self.unmasked(gsi);
        }
    }
}
