//! A virtual machine: memory slots, interrupt hardware, clock, vCPUs.
//!
//! # Locks
//! `setup` (what must precede what) and `memory` (slot changes, dirty logs) are outermost; neither
//! is taken by a vCPU in guest code, so a request may hold `memory` while it waits for all vCPUs to
//! look up. The slot map's own lock is held for the time of a clone.

use crate::board::Local;
use crate::clock::{host_tsc, lock, realtime_ns, VmClock};
use crate::counters::Counters;
use crate::cpu::attention;
use crate::ioctl::caps::{self, CLOCK_FLAGS, MAX_VCPUS, MAX_VCPU_ID};
use crate::ioctl::memory::Memory;
use crate::ioctl::requests::*;
use crate::ioctl::{get, int, put, Answer};
use crate::ioeventfd::IoEvents;
use crate::irqchip::IrqChip;
use crate::mem::SlotMap;
use crate::peers::{Peer, Peers};
use crate::vcpu::Vcpu;
use kvm_bindings::*;
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

/// Highest address of the three pages that KVM_SET_TSS_ADDR names.
const MAX_TSS: u64 = 0xffff_ffff - 3 * 4096 + 1;

/// What the handles on a VM and its vCPUs share.
pub(crate) struct Machine {
    pub clock: VmClock,
    pub peers: Arc<Peers>,
    pub ioevents: IoEvents,
    /// Serialises creation: irqchip, boot vCPU, vCPUs.
    pub setup: Mutex<()>,
    /// Serialises slot changes and dirty-log requests.
    pub memory: Mutex<Memory>,
    slots: RwLock<Arc<SlotMap>>,
    irqchip: OnceLock<Arc<IrqChip>>,
    boot_vcpu: AtomicU32,
    host_khz: u32,
}

impl Machine {
    /// The slot map in force.
    pub fn slots(&self) -> Arc<SlotMap> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another in force, for those who come from now on.
    pub fn replace_slots(&self, map: Arc<SlotMap>) {
        *self.slots.write().unwrap_or_else(PoisonError::into_inner) = map;
    }

    /// The in-engine interrupt hardware, if it was created.
    #[inline]
    pub fn irqchip(&self) -> Option<&Arc<IrqChip>> {
        self.irqchip.get()
    }

    /// Keeps the one created; `false` when there is one.
    pub fn keep_irqchip(&self, chip: Arc<IrqChip>) -> bool {
        self.irqchip.set(chip).is_ok()
    }

    /// The vCPU that starts at reset.
    pub fn is_boot_vcpu(&self, id: u32) -> bool {
        self.boot_vcpu.load(Relaxed) == id
    }

    fn set_boot_vcpu(&self, id: u64) -> Answer {
        let _setup = lock(&self.setup);
        if self.peers.len() != 0 {
            return Err(libc::EBUSY);
        }
        let id = u32::try_from(id).map_err(|_| libc::EINVAL)?;
        self.boot_vcpu.store(id, Relaxed);
        Ok(0)
    }

    fn get_clock(&self, arg: &mut [u8]) -> Answer {
        let host_tsc = host_tsc();
        let clock = kvm_clock_data {
            clock: self.clock.ns_at(host_tsc),
            flags: CLOCK_FLAGS,
            realtime: realtime_ns(),
            host_tsc,
            ..Default::default()
        };
        put(arg, &clock)
    }

    fn set_clock(&self, arg: &[u8]) -> Answer {
        let clock: kvm_clock_data = get(arg)?;
        if clock.flags & !CLOCK_FLAGS != 0 {
            return Err(libc::EINVAL);
        }
        let mut ns = clock.clock;
        if clock.flags & KVM_CLOCK_REALTIME != 0 {
            // Time that passed since it was read, on whatever host; never backwards.
            ns = ns.wrapping_add(realtime_ns().saturating_sub(clock.realtime));
        }
        self.clock.set_ns(ns);
        self.peers.for_each(|peer| {
            peer.clock_stale.store(true, SeqCst);
            peer.look_up();
        });
        Ok(0)
    }

    fn enable_cap(&self, arg: &[u8]) -> Answer {
        let cap: kvm_enable_cap = get(arg)?;
        if cap.flags != 0 {
            return Err(libc::EINVAL);
        }
        match cap.cap {
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => self.set_manual_protect(cap.args[0]),
            KVM_CAP_X2APIC_API => {
                let known = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
                if cap.args[0] & !(known as u64) != 0 {
                    return Err(libc::EINVAL);
                }
                self.irqchip().ok_or(libc::EINVAL)?.set_x2apic_api(cap.args[0] as u32);
                Ok(0)
            }
            // Events carry their payload whether or not user space asked for it.
            KVM_CAP_EXCEPTION_PAYLOAD => Ok(0),
            _ => Err(libc::EINVAL),
        }
    }

    fn create_vcpu(self: &Arc<Self>, id: u32) -> Answer<Vcpu> {
        let _setup = lock(&self.setup);
        if id >= MAX_VCPU_ID || self.peers.len() >= MAX_VCPUS as usize {
            return Err(libc::EINVAL);
        }
        // No slot may change between the map being taken and the vCPU being told of changes.
        let _memory = lock(&self.memory);
        let peer = Peer::new(id, &self.clock);
        if !self.peers.add(peer.clone()) {
            return Err(libc::EEXIST);
        }
        let made = self.new_vcpu(peer);
        if made.is_err() {
            self.peers.remove(id);
        }
        made
    }

    fn new_vcpu(self: &Arc<Self>, peer: Arc<Peer>) -> Answer<Vcpu> {
        let lapic = match self.irqchip() {
            Some(chip) => Some(chip.add_vcpu(peer.id).map_err(|error| error.errno())?),
            None => None,
        };
        Vcpu::new(Arc::new(Local::new(self.clone(), peer, lapic)))
    }
}

/// A virtual machine; clones are handles on the same one.
#[derive(Clone)]
pub struct Vm {
    machine: Arc<Machine>,
}

impl Vm {
    pub(crate) fn new(host_khz: u32) -> Self {
        let machine = Machine {
            clock: VmClock::new(host_khz),
            peers: Peers::new(host_khz),
            ioevents: IoEvents::default(),
            setup: Mutex::default(),
            memory: Mutex::default(),
            slots: RwLock::default(),
            irqchip: OnceLock::new(),
            boot_vcpu: AtomicU32::new(0),
            host_khz,
        };
        Self { machine: Arc::new(machine) }
    }

    /// One request; `arg` holds its structure and is updated in place. Errors are errno values.
    pub fn ioctl(&self, request: u32, arg: &mut [u8]) -> Answer {
        let machine = &self.machine;
        match request {
            KVM_CHECK_EXTENSION => Ok(caps::check(int(arg)?)),
            KVM_ENABLE_CAP => machine.enable_cap(arg),
            KVM_SET_USER_MEMORY_REGION => machine.set_memory_region(arg),
            KVM_GET_DIRTY_LOG => machine.get_dirty_log(arg),
            KVM_CLEAR_DIRTY_LOG => machine.clear_dirty_log(arg),
            KVM_CREATE_IRQCHIP => machine.create_irqchip(),
            KVM_CREATE_PIT2 => machine.create_pit(arg),
            KVM_GET_IRQCHIP => machine.get_irqchip(arg),
            KVM_SET_IRQCHIP => machine.set_irqchip(arg),
            KVM_GET_PIT2 => machine.get_pit(arg),
            KVM_SET_PIT2 => machine.set_pit(arg),
            KVM_REINJECT_CONTROL => machine.reinject_control(arg),
            KVM_SET_GSI_ROUTING => machine.set_gsi_routing(arg),
            KVM_IRQ_LINE => machine.irq_line(arg, false),
            KVM_IRQ_LINE_STATUS => machine.irq_line(arg, true),
            KVM_SIGNAL_MSI => machine.signal_msi(arg),
            KVM_IRQFD => machine.irqfd(arg),
            KVM_IOEVENTFD => machine.ioevents.request(arg),
            KVM_GET_CLOCK => machine.get_clock(arg),
            KVM_SET_CLOCK => machine.set_clock(arg),
            KVM_SET_BOOT_CPU_ID => machine.set_boot_vcpu(int(arg)?),
            // Both addresses are for running real mode on Intel's virtualisation: nothing to do.
            KVM_SET_TSS_ADDR if int(arg)? > MAX_TSS => Err(libc::EINVAL),
            KVM_SET_TSS_ADDR => Ok(0),
            KVM_SET_IDENTITY_MAP_ADDR if machine.peers.len() != 0 => Err(libc::EINVAL),
            KVM_SET_IDENTITY_MAP_ADDR => int(arg).map(|_| 0),
            KVM_GET_TSC_KHZ => Ok(machine.host_khz as i64),
            _ => Err(libc::ENOTTY),
        }
    }

    /// KVM_CREATE_VCPU.
    pub fn create_vcpu(&self, id: u32) -> Answer<Vcpu> {
        self.machine.create_vcpu(id)
    }

    /// What its vCPUs did, together: each as it was when it last looked up, milliseconds ago at most while
    /// it runs with a timer.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.machine.peers.for_each(|peer| peer.shared.counters.add_to(&mut sum));
        sum
    }

    /// The host wrote `[gpa, gpa + size)`: code decoded from there is forgotten.
    pub fn invalidate(&self, gpa: u64, size: u64) {
        if self.machine.slots().invalidate(gpa, size) {
            self.machine.peers.for_each(|peer| peer.raise(attention::CODE));
        }
    }
}
