//! [`IrqChip`]: one VM's interrupt hardware as the VMM and the vCPUs reach it. How the chips are
//! wired together is in `shared`.

use super::delivery::{self, PvIpi};
use super::ioapic;
use super::irqfd;
use super::lapic::{Lapic, LapicCell};
use super::pic::Pic;
use super::pit::Pit;
use super::routing::{Routing, MAX_GSIS};
use super::shared::{Shared, SOURCE_USER};
use super::timers::PIT_SLOT;
use super::{lock, read, write, Host, IrqError};
use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irqchip, kvm_irqfd, kvm_pit_state2, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// KVM_MAX_VCPU_IDS.
const MAX_VCPU_ID: u32 = 4096;

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
        let shared = Arc::new(Shared::new(host)?);
        let for_thread = shared.clone();
        let timer_thread = shared.timers.spawn(move |slot| for_thread.timer_due(slot))?;
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

    /// The hypercall KVM_HC_SEND_IPI: an IPI to up to 128 APIC IDs from `min` on, `bits_per_word`
    /// (64 or, outside 64-bit mode, 32) in each half of the bitmap. Returns how many were reached.
    pub fn send_pv_ipi(&self, bitmap: [u64; 2], bits_per_word: u32, min: u32, icr: u32) -> Result<u64, IrqError> {
        let ipi = PvIpi { bitmap, bits_per_word, min };
        delivery::send_pv_ipi(&read(&self.shared.lapics), &ipi, icr).ok_or(IrqError::PvIpi(icr))
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
