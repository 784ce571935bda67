//! One vCPU's board: what the interpreter reaches beyond the CPU itself.
//!
//! [`Local`] is the state, shared between the vCPU's thread (as [`VcpuBoard`], the interpreter's
//! [`Board`]) and the requests of user space.

use crate::clock::host_tsc;
use crate::cpu::state::CpuidTable;
use crate::cpu::{attention, Board, Gp};
use crate::hypercalls;
use crate::ioctl::msrs::msr;
use crate::irqchip::lapic::PendingEvents;
use crate::irqchip::Lapic;
use crate::mce::Mce;
use crate::peers::Peer;
use crate::steal::Steal;
use crate::vm::Machine;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering::*};
use std::sync::Arc;

/// IA32_APIC_BASE at power-up, for vCPUs without an in-engine local APIC.
const APIC_BASE: u64 = 0xfee0_0800;
const APIC_BASE_BSP: u64 = 1 << 8;
/// The x2APIC registers' MSRs; beyond 0x83f they are reserved and fault.
const X2APIC: std::ops::Range<u32> = 0x800..0x900;
/// Bits of CPUID leaf 1's ECX.
const CPUID_X2APIC: u32 = 1 << 21;
const CPUID_TSC_DEADLINE: u32 = 1 << 24;
/// kvmclock MSRs: bit 0 switches it on.
const CLOCK_ON: u64 = 1;

/// State of one vCPU beside the interpreter's.
pub(crate) struct Local {
    pub machine: Arc<Machine>,
    pub peer: Arc<Peer>,
    lapic: Option<Arc<Lapic>>,
    /// KVM_SYSTEM_TIME as written, by the MSR it was written to.
    system_time: AtomicU64,
    wall_clock: AtomicU64,
    pub steal: Steal,
    pub mce: Mce,
    /// User space said that it stopped the guest (KVM_KVMCLOCK_CTRL).
    stopped: AtomicBool,
    /// Without an in-engine local APIC: CR8, IA32_APIC_BASE, NMIs that wait.
    cr8: AtomicU64,
    apic_base: AtomicU64,
    nmis: AtomicU8,
    /// Without one: user space wants to know when an interrupt can be taken, and now it can.
    pub window_wanted: AtomicBool,
    pub window_open: AtomicBool,
    /// An INIT was received since power-up (KVM_MP_STATE_INIT_RECEIVED).
    initialised: AtomicBool,
}

impl Local {
    /// A vCPU at power-up.
    pub fn new(machine: Arc<Machine>, peer: Arc<Peer>, lapic: Option<Arc<Lapic>>) -> Self {
        let bsp = if machine.is_boot_vcpu(peer.id) { APIC_BASE_BSP } else { 0 };
        if let Some(lapic) = &lapic {
            // The chip takes vCPU 0 for the boot processor; KVM_SET_BOOT_CPU_ID may differ.
            let _ = lapic.restore_apic_base(lapic.apic_base() & !APIC_BASE_BSP | bsp);
        }
        Self {
            machine,
            peer,
            lapic,
            system_time: AtomicU64::new(0),
            wall_clock: AtomicU64::new(0),
            steal: Steal::new(),
            mce: Mce::default(),
            stopped: AtomicBool::new(false),
            cr8: AtomicU64::new(0),
            apic_base: AtomicU64::new(APIC_BASE | bsp),
            nmis: AtomicU8::new(0),
            window_wanted: AtomicBool::new(false),
            window_open: AtomicBool::new(false),
            initialised: AtomicBool::new(false),
        }
    }

    /// The in-engine local APIC.
    pub fn lapic(&self) -> Option<&Lapic> {
        self.lapic.as_deref()
    }

    /// KVM_SET_CPUID2: what the model says of the local APIC.
    pub fn follow_cpuid(&self, physical_bits: u8, cpuid: &CpuidTable) {
        let Some(lapic) = self.lapic() else { return };
        let ecx = cpuid.entries.iter().find(|entry| entry.function == 1).map_or(0, |entry| entry.ecx);
        lapic.set_physical_bits(physical_bits);
        lapic.set_features(ecx & CPUID_X2APIC != 0, ecx & CPUID_TSC_DEADLINE != 0);
    }

    // ---- registers of the local APIC that the CPU shows ------------------------------------

    /// CR8.
    pub fn cr8(&self) -> u64 {
        self.lapic().map_or_else(|| self.cr8.load(Relaxed), Lapic::cr8)
    }

    /// MOV to CR8.
    pub fn set_cr8(&self, value: u64) {
        match self.lapic() {
            Some(lapic) => lapic.set_cr8(value),
            None => self.cr8.store(value & 15, Relaxed),
        }
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.lapic().map_or_else(|| self.apic_base.load(Relaxed), Lapic::apic_base)
    }

    fn write_apic_base(&self, value: u64) -> Result<(), Gp> {
        match self.lapic() {
            Some(lapic) => lapic.set_apic_base(value).map_err(|_| Gp),
            None => {
                self.apic_base.store(value, Relaxed);
                Ok(())
            }
        }
    }

    /// IA32_APIC_BASE as user space restores it.
    pub fn restore_apic_base(&self, value: u64) -> Result<(), Gp> {
        match self.lapic() {
            Some(lapic) if lapic.apic_base() != value => lapic.restore_apic_base(value).map_err(|_| Gp),
            Some(_) => Ok(()),
            None => self.write_apic_base(value),
        }
    }

    // ---- events ----------------------------------------------------------------------------

    fn events(&self) -> PendingEvents {
        self.lapic().map(Lapic::events).unwrap_or_default()
    }

    fn change_events(&self, change: impl FnOnce(&mut PendingEvents)) {
        if let Some(lapic) = self.lapic() {
            let mut events = lapic.events();
            change(&mut events);
            lapic.set_events(events);
        }
    }

    /// KVM_NMI.
    pub fn raise_nmi(&self) {
        match self.lapic() {
            Some(lapic) => lapic.raise_nmi(),
            None => {
                self.nmis.store(1, SeqCst);
                self.peer.raise(attention::EVENT);
            }
        }
    }

    /// NMIs that wait.
    pub fn nmis(&self) -> u8 {
        self.lapic().map_or_else(|| self.nmis.load(SeqCst), |lapic| lapic.events().nmis)
    }

    /// Restores them.
    pub fn set_nmis(&self, count: u8) {
        match self.lapic() {
            Some(_) => self.change_events(|events| events.nmis = count.min(2)),
            None => self.nmis.store(count.min(1), SeqCst),
        }
        self.peer.raise(attention::EVENT);
    }

    /// INIT waits.
    pub fn init_pending(&self) -> bool {
        self.events().init
    }

    /// Restores a latched INIT.
    pub fn set_init(&self) {
        self.change_events(|events| events.init = true);
        self.peer.raise(attention::EVENT);
    }

    /// Restores the vector of a start-up IPI; [`Local::raise_sipi`] makes it wait.
    pub fn set_sipi(&self, vector: u8) {
        self.change_events(|events| events.sipi = Some(vector));
    }

    /// KVM_MP_STATE_SIPI_RECEIVED.
    pub fn raise_sipi(&self) {
        self.change_events(|events| events.sipi = events.sipi.or(Some(0)));
        self.peer.raise(attention::EVENT);
    }

    /// An INIT was received since power-up.
    pub fn was_initialised(&self) -> bool {
        self.initialised.load(Relaxed)
    }

    /// Restores that.
    pub fn set_initialised(&self, yes: bool) {
        self.initialised.store(yes, Relaxed);
    }

    // ---- MSRs ------------------------------------------------------------------------------

    /// RDMSR of what the board keeps.
    pub fn msr_read(&self, index: u32) -> Option<Result<u64, Gp>> {
        Some(Ok(match index {
            msr::TSC => self.peer.tsc.now(),
            msr::TSC_ADJUST => self.peer.tsc.adjust(),
            msr::APIC_BASE => self.apic_base(),
            msr::TSC_DEADLINE => self.lapic().map_or(0, Lapic::tsc_deadline),
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => self.wall_clock.load(Relaxed),
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => self.system_time.load(Relaxed),
            msr::KVM_STEAL_TIME => self.steal.msr(),
            index if X2APIC.contains(&index) => {
                return Some(self.lapic().map_or(Err(Gp), |lapic| lapic.msr_read(index).map_err(|_| Gp)));
            }
            _ => return self.mce.read(index),
        }))
    }

    /// WRMSR of what the board keeps.
    pub fn msr_write(&self, index: u32, value: u64) -> Option<Result<(), Gp>> {
        match index {
            msr::TSC => self.change_tsc(|peer| peer.tsc.write(value)),
            msr::TSC_ADJUST => self.change_tsc(|peer| peer.tsc.write_adjust(value)),
            msr::APIC_BASE => return Some(self.write_apic_base(value)),
            msr::TSC_DEADLINE => {
                if let Some(lapic) = self.lapic() {
                    lapic.set_tsc_deadline(value);
                }
            }
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.wall_clock.store(value, Relaxed);
                if value != 0 {
                    self.machine.clock.publish_wall_clock(&self.machine.slots(), value);
                }
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.system_time.store(value, Relaxed);
                self.publish_clock();
            }
            msr::KVM_STEAL_TIME => return Some(if self.steal.set_msr(value) { Ok(()) } else { Err(Gp) }),
            index if X2APIC.contains(&index) => {
                return Some(self.lapic().map_or(Err(Gp), |lapic| lapic.msr_write(index, value).map_err(|_| Gp)));
            }
            _ => return self.mce.write(index, value, false),
        }
        Some(Ok(()))
    }

    /// KVM_SET_MSRS of what the board keeps: as a write, but nothing else moves along.
    pub fn msr_restore(&self, index: u32, value: u64) -> Option<Result<(), Gp>> {
        match index {
            msr::TSC => self.change_tsc(|peer| self.machine.clock.restore_tsc(&peer.tsc, value)),
            msr::TSC_ADJUST => self.peer.tsc.restore_adjust(value),
            msr::APIC_BASE => return Some(self.restore_apic_base(value)),
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => self.wall_clock.store(value, Relaxed),
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                // The guest's page may not be restored yet: it is written at the next entry.
                self.system_time.store(value, Relaxed);
                self.peer.clock_stale.store(true, SeqCst);
            }
            _ => return self.mce.write(index, value, true).or_else(|| self.msr_write(index, value)),
        }
        Some(Ok(()))
    }

    /// Changes the counter and what hangs on it: kvmclock's page, the deadline timer.
    pub fn change_tsc(&self, change: impl FnOnce(&Peer)) {
        change(&self.peer);
        self.peer.clock_stale.store(true, SeqCst);
        self.peer.look_up();
        if let Some(lapic) = self.lapic() {
            lapic.tsc_changed();
        }
    }

    // ---- kvmclock --------------------------------------------------------------------------

    /// Writes kvmclock's page, if the guest has one. For the vCPU's thread.
    pub fn publish_clock(&self) {
        let value = self.system_time.load(Relaxed);
        if value & CLOCK_ON != 0 {
            let stopped = self.stopped.swap(false, Relaxed);
            self.machine.clock.publish(&self.machine.slots(), value & !CLOCK_ON, &self.peer.tsc, stopped);
        }
    }

    /// Where [`Local::publish_clock`] writes, and how much.
    pub fn clock_page(&self) -> Option<(u64, usize)> {
        let value = self.system_time.load(Relaxed);
        (value & CLOCK_ON != 0).then_some((value & !CLOCK_ON, 32))
    }

    /// KVM_KVMCLOCK_CTRL: the guest learns at its next look that it was stopped.
    pub fn note_stopped(&self) -> bool {
        let on = self.system_time.load(Relaxed) & CLOCK_ON != 0;
        self.stopped.store(on, Relaxed);
        self.peer.clock_stale.store(on, SeqCst);
        on
    }
}

/// The interpreter's way to [`Local`].
pub(crate) struct VcpuBoard(pub Arc<Local>);

/// The low `size` bytes of a value.
fn bytes(value: u64, size: u8) -> ([u8; 8], usize) {
    (value.to_le_bytes(), (size as usize).min(8))
}

impl Board for VcpuBoard {
    fn mmio_read(&mut self, gpa: u64, size: u8) -> Option<u64> {
        let (mut data, size) = bytes(0, size);
        let data = &mut data;
        let lapic = self.0.lapic()?;
        let offset = gpa.wrapping_sub(lapic.mmio_base());
        if offset < 0x1000 {
            lapic.mmio_read(offset as u32, &mut data[..size]);
        } else if !self.0.machine.irqchip()?.mmio_read(gpa, &mut data[..size]) {
            return None;
        }
        Some(u64::from_le_bytes(*data))
    }

    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) -> bool {
        let (data, length) = bytes(value, size);
        if let Some(lapic) = self.0.lapic() {
            let offset = gpa.wrapping_sub(lapic.mmio_base());
            if offset < 0x1000 {
                lapic.mmio_write(offset as u32, &data[..length]);
                return true;
            }
        }
        let machine = &self.0.machine;
        machine.irqchip().is_some_and(|chip| chip.mmio_write(gpa, &data[..length]))
            || machine.ioevents.signal(false, gpa, size, value)
    }

    fn pio_read(&mut self, port: u16, size: u8) -> Option<u32> {
        let (mut data, length) = bytes(0, size.min(4));
        let chip = self.0.machine.irqchip()?;
        chip.pio_read(port, &mut data[..length]).then(|| u64::from_le_bytes(data) as u32)
    }

    fn pio_write(&mut self, port: u16, size: u8, value: u32) -> bool {
        let (data, length) = bytes(value as u64, size.min(4));
        let machine = &self.0.machine;
        machine.irqchip().is_some_and(|chip| chip.pio_write(port, &data[..length]))
            || machine.ioevents.signal(true, port as u64, size, value as u64)
    }

    fn msr_read(&mut self, msr: u32) -> Option<Result<u64, Gp>> {
        self.0.msr_read(msr)
    }

    fn msr_write(&mut self, msr: u32, value: u64) -> Option<Result<(), Gp>> {
        self.0.msr_write(msr, value)
    }

    fn cr8(&mut self) -> u64 {
        self.0.cr8()
    }

    fn set_cr8(&mut self, value: u64) {
        self.0.set_cr8(value);
    }

    fn has_interrupt(&self) -> bool {
        match self.0.lapic() {
            Some(lapic) => lapic.has_interrupt(),
            None => self.0.window_wanted.load(Relaxed),
        }
    }

    fn ack_interrupt(&mut self) -> Option<u8> {
        self.0.steal.look(host_tsc(), || self.0.machine.slots());
        match self.0.lapic() {
            Some(lapic) => lapic.ack_interrupt(),
            None => {
                // The CPU would take an interrupt: that is what user space waits for.
                if self.0.window_wanted.swap(false, Relaxed) {
                    self.0.window_open.store(true, Relaxed);
                    self.0.peer.look_up();
                }
                None
            }
        }
    }

    fn take_nmi(&mut self) -> bool {
        let Some(lapic) = self.0.lapic() else {
            return self.0.nmis.fetch_update(SeqCst, SeqCst, |nmis| nmis.checked_sub(1)).is_ok();
        };
        let taken = lapic.take_nmi();
        if taken {
            // How many it keeps while it handles one is the CPU's business.
            lapic.nmi_done();
        }
        taken
    }

    fn take_init(&mut self) -> bool {
        let Some(lapic) = self.0.lapic() else { return false };
        let taken = lapic.take_init();
        if taken {
            lapic.init_reset();
            self.0.set_initialised(true);
        }
        taken
    }

    fn is_bsp(&self) -> bool {
        self.0.machine.is_boot_vcpu(self.0.peer.id)
    }

    fn take_sipi(&mut self) -> Option<u8> {
        self.0.lapic()?.take_sipi()
    }

    fn has_irqchip(&self) -> bool {
        self.0.lapic().is_some()
    }

    fn tsc(&self) -> u64 {
        self.0.peer.tsc.at(host_tsc())
    }

    fn set_tsc(&mut self, value: u64) {
        self.0.change_tsc(|peer| peer.tsc.write(value));
    }

    fn code_page(&mut self, gpa: u64) -> bool {
        self.0.machine.peers.code_found(self.0.peer.id, gpa)
    }

    fn code_noticed(&self) -> bool {
        self.0.machine.peers.code_noticed(self.0.peer.id)
    }

    fn code_changed(&mut self) {
        self.0.machine.peers.code_changed(self.0.peer.id);
    }

    fn hypercall(&mut self, nr: u64, args: [u64; 4]) -> u64 {
        hypercalls::call(&self.0, nr, args)
    }
}
