//! [`IrqChip`]: one VM's interrupt hardware wired together.
//!
//! See the module's head for the lock order. Functions here take one chip's lock at a time, let go
//! of it, and only then carry the consequences to the next chip.

use super::delivery::{self, Message};
use super::ioapic::{self, IoApic};
use super::irqfd::{self, Irqfds};
use super::lapic::{EndOfInterrupt, Lapic, LapicCell};
use super::pic::Pic;
use super::pit::Pit;
use super::routing::{Routing, MAX_GSIS};
use super::timers::{Slot, Timers, PIT_SLOT};
use super::{lock, read, write, Host, IrqError};
use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irqchip, kvm_irqfd, kvm_pit_state2, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;

/// KVM_MAX_VCPU_IDS.
const MAX_VCPU_ID: u32 = 4096;

/// Who holds a line up. A line is up while anybody does.
pub(crate) const SOURCE_USER: u8 = 1 << 0;
pub(crate) const SOURCE_RESAMPLE: u8 = 1 << 1;
const SOURCE_PIT: u8 = 1 << 2;

/// The GSI the PIT's channel 0 drives.
const PIT_GSI: u32 = 0;

/// What the handles and the threads share.
pub(crate) struct Shared {
    host: Arc<dyn Host>,
    timers: Arc<Timers>,
    pub(crate) lapics: RwLock<Vec<Arc<LapicCell>>>,
    pic: Mutex<Pic>,
    /// The PIC's INT output, for the vCPUs' polling.
    pic_output: Arc<AtomicBool>,
    ioapic: Mutex<IoApic>,
    /// Vectors the IOAPIC wants EOIs of, so that those of other vectors cost one load.
    ioapic_vectors: [AtomicU64; 4],
    pit: Mutex<Option<Pit>>,
    routing: RwLock<Routing>,
    pub(crate) irqfds: Irqfds,
    /// KVM_X2APIC_API_* in force.
    x2apic_api: AtomicU32,
}

impl Shared {
    /// Whether APIC IDs of 32 bits are in use towards the VMM.
    pub(crate) fn wide_ids(&self) -> bool {
        self.x2apic_api.load(SeqCst) & KVM_X2APIC_API_USE_32BIT_IDS != 0
    }

    fn deliver(&self, message: &Message) -> i32 {
        let quirk = self.x2apic_api.load(SeqCst) & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK == 0;
        delivery::deliver(&read(&self.lapics), message, quirk)
    }

    fn send_msi(&self, address: u64, data: u32) -> i32 {
        self.deliver(&Message::from_msi(address, data, self.wide_ids()))
    }

    fn with_ioapic<R>(&self, change: impl FnOnce(&mut IoApic, ioapic::Deliver) -> R) -> R {
        let mut ioapic = lock(&self.ioapic);
        let result = change(&mut ioapic, &mut |message| self.deliver(message));
        for (word, vectors) in self.ioapic_vectors.iter().zip(ioapic.vectors()) {
            word.store(vectors, SeqCst);
        }
        result
    }

    fn with_pic<R>(&self, change: impl FnOnce(&mut Pic) -> R) -> R {
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
    fn with_pit<R>(&self, change: impl FnOnce(&mut Pit, u64) -> R) -> Option<R> {
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

    fn pulse_pit(&self) {
        self.set_line(SOURCE_PIT, PIT_GSI, true);
        self.set_line(SOURCE_PIT, PIT_GSI, false);
        read(&self.lapics).iter().for_each(|cell| cell.pit_tick());
    }

    /// A pin became unmasked: ticks sent into the mask will never be acknowledged.
    fn unmasked(&self, gsi: Option<u32>) {
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

    fn read_pic(&self, port: u16) -> u8 {
        let (value, ended) = self.with_pic(|pic| pic.read(port));
        self.pic_inputs_ended(ended);
        value
    }

    fn write_pic(&self, port: u16, value: u8) {
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

/// One VM's interrupt hardware. Dropping it ends its threads.
pub struct IrqChip {
    shared: Arc<Shared>,
    timer_thread: Option<JoinHandle<()>>,
    irqfd_thread: Mutex<Option<JoinHandle<()>>>,
}

impl IrqChip {
    /// KVM_CREATE_IRQCHIP: PICs and IOAPIC with KVM's default routing; the PIT and the local APICs
    /// are added. Fails where the host refuses the timer thread.
    pub fn new(host: Arc<dyn Host>) -> std::io::Result<Arc<Self>> {
        let timers = Timers::new(host.clone());
        let shared = Arc::new(Shared {
            host,
            timers: timers.clone(),
            lapics: RwLock::new(Vec::new()),
            pic: Mutex::new(Pic::new()),
            pic_output: Arc::new(AtomicBool::new(false)),
            ioapic: Mutex::new(IoApic::new()),
            ioapic_vectors: Default::default(),
            pit: Mutex::new(None),
            routing: RwLock::new(Routing::default_x86()),
            irqfds: Irqfds::new()?,
            x2apic_api: AtomicU32::new(0),
        });
        let for_thread = shared.clone();
        let timer_thread = timers.spawn(move |slot| for_thread.timer_due(slot))?;
        Ok(Arc::new(Self { shared, timer_thread: Some(timer_thread), irqfd_thread: Mutex::new(None) }))
    }

    /// Adds the local APIC of a vCPU. `apic_id` is the vCPU's id; 0 is the boot processor.
    pub fn add_vcpu(&self, apic_id: u32) -> Result<Arc<Lapic>, IrqError> {
        if apic_id >= MAX_VCPU_ID {
            return Err(IrqError::VcpuIdTooLarge(apic_id));
        }
        let shared = &self.shared;
        let mut lapics = write(&shared.lapics);
        if lapics.iter().any(|cell| cell.vcpu() == apic_id) {
            return Err(IrqError::VcpuExists(apic_id));
        }
        let cell = Arc::new(LapicCell::new(
            apic_id,
            PIT_SLOT + 1 + lapics.len(),
            shared.host.clone(),
            shared.timers.clone(),
            shared.pic_output.clone(),
        ));
        lapics.push(cell.clone());
        Ok(Arc::new(Lapic::new(cell, shared.clone())))
    }

    /// KVM_CREATE_PIT2.
    pub fn create_pit(&self, flags: u32) -> Result<(), IrqError> {
        let mut pit = lock(&self.shared.pit);
        if pit.is_some() {
            return Err(IrqError::Pit("already exists"));
        }
        *pit = Some(Pit::new(flags & KVM_PIT_SPEAKER_DUMMY != 0));
        Ok(())
    }

    /// IN from `port`: fills `data` and returns true if the port is one of this hardware's. Wider
    /// accesses reach the following ports byte by byte, as on the ISA bus.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        if !self.decodes(port) {
            return false;
        }
        for (step, byte) in (0u16..).zip(data) {
            let port = port.wrapping_add(step);
            *byte = if Pic::decodes(port) {
                self.shared.read_pic(port)
            } else {
                let read = |pit: &mut Pit, now_ns| pit.decodes(port).then(|| pit.read(port, now_ns));
                self.shared.with_pit(read).flatten().unwrap_or(0xff)
            };
        }
        true
    }

    /// OUT to `port`; returns true if the port is one of this hardware's.
    pub fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        if !self.decodes(port) {
            return false;
        }
        for (step, &byte) in (0u16..).zip(data) {
            let port = port.wrapping_add(step);
            if Pic::decodes(port) {
                self.shared.write_pic(port, byte);
            } else {
                self.shared.with_pit(|pit, now_ns| {
                    if pit.decodes(port) {
                        pit.write(port, byte, now_ns);
                    }
                });
            }
        }
        true
    }

    fn decodes(&self, port: u16) -> bool {
        // Most port accesses are none of ours: decide that without a lock.
        if Pic::decodes(port) {
            return true;
        }
        matches!(port, 0x40..=0x43 | 0x61) && lock(&self.shared.pit).as_ref().is_some_and(|pit| pit.decodes(port))
    }

    /// A load from guest-physical `gpa`; returns true if that is the IOAPIC's window. (The local
    /// APIC's page is the vCPU's own: [`Lapic::mmio_base`].)
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some(offset) = ioapic_offset(gpa) else {
            return false;
        };
        lock(&self.shared.ioapic).read(offset, data);
        true
    }

    /// A store to guest-physical `gpa`; returns true if that is the IOAPIC's window.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let Some(offset) = ioapic_offset(gpa) else {
            return false;
        };
        let shared = &self.shared;
        let unmasked = shared.with_ioapic(|ioapic, deliver| ioapic.write(offset, data, deliver));
        if let Some(pin) = unmasked {
            let gsi = read(&shared.routing).gsi_of_ioapic_pin(pin);
            shared.unmasked(gsi);
        }
        true
    }

    /// KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS: sets user space's level of a GSI. Returns KVM's status:
    /// how many interrupts it caused, 0 if it merged, -1 if it was masked or is not routed.
    pub fn set_irq(&self, gsi: u32, level: bool) -> i32 {
        self.shared.set_line(SOURCE_USER, gsi, level)
    }

    /// KVM_SIGNAL_MSI. Returns how many local APICs took it, or -1 if it addresses none.
    pub fn signal_msi(&self, address: u64, data: u32) -> i32 {
        self.shared.send_msi(address, data)
    }

    /// KVM_SET_GSI_ROUTING: replaces the whole table.
    pub fn set_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), IrqError> {
        let routing = Routing::from_entries(entries, self.shared.wide_ids())?;
        *write(&self.shared.routing) = routing;
        Ok(())
    }

    /// KVM_IRQFD: assigns, or with KVM_IRQFD_FLAG_DEASSIGN removes, an eventfd of a GSI.
    /// After a removal returns, the eventfd interrupts no more.
    pub fn irqfd(&self, request: &kvm_irqfd) -> Result<(), IrqError> {
        let mut thread = lock(&self.irqfd_thread);
        if thread.is_none() {
            *thread = Some(irqfd::spawn(self.shared.clone())?);
        }
        drop(thread);
        self.shared.irqfds.request(request)
    }

    /// KVM_CAP_X2APIC_API: KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    pub fn set_x2apic_api(&self, flags: u32) {
        self.shared.x2apic_api.store(flags, SeqCst);
    }

    /// KVM_GET_IRQCHIP: fills in the chip that `chip.chip_id` names.
    pub fn state(&self, chip: &mut kvm_irqchip) -> Result<(), IrqError> {
        match chip.chip_id {
            index @ (KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE) => {
                chip.chip.pic = lock(&self.shared.pic).state(index as usize);
            }
            KVM_IRQCHIP_IOAPIC => chip.chip.ioapic = lock(&self.shared.ioapic).state(),
            _ => return Err(unknown_chip()),
        }
        Ok(())
    }

    /// KVM_SET_IRQCHIP.
    pub fn set_state(&self, chip: &kvm_irqchip) -> Result<(), IrqError> {
        match chip.chip_id {
            index @ (KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE) => {
                // SAFETY: every member of the union is plain integers, any bytes are valid.
                let state = unsafe { chip.chip.pic };
                self.shared.with_pic(|pic| pic.set_state(index as usize, &state))
            }
            KVM_IRQCHIP_IOAPIC => {
                // SAFETY: every member of the union is plain integers, any bytes are valid.
                let state = unsafe { chip.chip.ioapic };
                self.shared.with_ioapic(|ioapic, deliver| ioapic.set_state(&state, deliver))
            }
            _ => Err(unknown_chip()),
        }
    }

    /// KVM_GET_PIT2.
    pub fn pit_state(&self) -> Result<kvm_pit_state2, IrqError> {
        self.shared.with_pit(|pit, _| pit.state()).ok_or(NO_PIT)
    }

    /// KVM_SET_PIT2; the counts start anew.
    pub fn set_pit_state(&self, state: &kvm_pit_state2) -> Result<(), IrqError> {
        self.shared.with_pit(|pit, now_ns| pit.set_state(state, now_ns)).ok_or(NO_PIT)?
    }

    /// KVM_REINJECT_CONTROL: whether ticks the guest was too slow for are made up for.
    pub fn set_pit_reinject(&self, reinject: bool) -> Result<(), IrqError> {
        self.shared.with_pit(|pit, _| pit.set_reinject(reinject)).ok_or(NO_PIT)
    }

    /// KVM_CAP_IRQ_ROUTING: the number of GSIs.
    pub const fn max_gsis() -> u32 {
        MAX_GSIS
    }

    #[cfg(test)]
    pub(crate) fn fire_due(&self) {
        for slot in self.shared.timers.take_due() {
            self.shared.timer_due(slot);
        }
    }
}

const NO_PIT: IrqError = IrqError::Pit("does not exist");

fn unknown_chip() -> IrqError {
    IrqError::InvalidState { chip: "irqchip", reason: "chip_id is none of PIC master, PIC slave, IOAPIC" }
}

fn ioapic_offset(gpa: u64) -> Option<u64> {
    gpa.checked_sub(ioapic::BASE).filter(|&offset| offset < ioapic::SIZE)
}

impl Drop for IrqChip {
    fn drop(&mut self) {
        self.shared.timers.stop();
        self.shared.irqfds.stop();
        let irqfd_thread = lock(&self.irqfd_thread).take();
        for thread in self.timer_thread.take().into_iter().chain(irqfd_thread) {
            // A thread that panicked has ended too, and there is nobody left to tell.
            let _ = thread.join();
        }
    }
}
