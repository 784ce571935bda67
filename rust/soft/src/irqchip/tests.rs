//! Tests of the wired hardware: a guest's view through [`IrqChip`] and [`Lapic`], with time in hand.

use super::*;
use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irqchip, kvm_irqfd, KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE,
    KVM_IRQ_ROUTING_MSI, KVM_PIT_SPEAKER_DUMMY,
};
use proptest::prelude::*;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{mpsc, Arc};

/// A host whose time stands still until told: the TSC ticks once a nanosecond.
pub(super) struct FakeHost {
    now_ns: AtomicU64,
    kicks: Mutex<mpsc::Sender<usize>>,
    kicked: Mutex<mpsc::Receiver<usize>>,
}

impl FakeHost {
    pub(super) fn new() -> Arc<Self> {
        let (sender, receiver) = mpsc::channel();
        Arc::new(Self { now_ns: AtomicU64::new(1), kicks: Mutex::new(sender), kicked: Mutex::new(receiver) })
    }

    pub(super) fn set_now(&self, now_ns: u64) {
        self.now_ns.store(now_ns, SeqCst);
    }

    /// Blocks until somebody is kicked.
    fn wait_for_kick(&self) -> usize {
        lock(&self.kicked).recv().unwrap()
    }

    fn forget_kicks(&self) {
        while lock(&self.kicked).try_recv().is_ok() {}
    }
}

impl Host for FakeHost {
    fn now_ns(&self) -> u64 {
        self.now_ns.load(SeqCst)
    }
    fn guest_tsc(&self, _vcpu: usize) -> u64 {
        self.now_ns.load(SeqCst)
    }
    fn tsc_khz(&self) -> u64 {
        1_000_000
    }
    fn kick(&self, vcpu: usize) {
        let _ = lock(&self.kicks).send(vcpu);
    }
}

/// A VM with `vcpus` local APICs, software-enabled, LINT0 masked.
pub(super) struct Machine {
    pub host: Arc<FakeHost>,
    pub chip: Arc<IrqChip>,
    pub lapics: Vec<Arc<Lapic>>,
}

impl Machine {
    pub(super) fn new(vcpus: u32) -> Self {
        let host = FakeHost::new();
        let chip = IrqChip::new(host.clone()).unwrap();
        let lapics: Vec<_> = (0..vcpus).map(|id| chip.add_vcpu(id).unwrap()).collect();
        for lapic in &lapics {
            write32(lapic, 0xf0, 0x1ff);
            write32(lapic, 0x350, 0x1_0000);
        }
        Self { host, chip, lapics }
    }

    fn redirect(&self, pin: u8, entry: u64) {
        for (half, value) in [(1, entry >> 32), (0, entry & 0xffff_ffff)] {
            let select = 0x10 + 2 * pin + half;
            assert!(self.chip.mmio_write(0xfec0_0000, &[select, 0, 0, 0]));
            let data = (value as u32).to_le_bytes();
            assert!(self.chip.mmio_write(0xfec0_0010, &data));
        }
    }

    /// Programs both 8259s as firmware does and unmasks everything.
    fn start_pic(&self) {
        for (port, base) in [(0x20u16, 0x08), (0xa0, 0x70)] {
            for (port, value) in [(port, 0x11), (port + 1, base), (port + 1, 4), (port + 1, 1), (port + 1, 0)] {
                assert!(self.chip.pio_write(port, &[value]));
            }
        }
    }
}

pub(super) fn write32(lapic: &Lapic, offset: u32, value: u32) {
    lapic.mmio_write(offset, &value.to_le_bytes());
}

pub(super) fn read32(lapic: &Lapic, offset: u32) -> u32 {
    let mut data = [0; 4];
    lapic.mmio_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn eventfd() -> OwnedFd {
    // SAFETY: no pointers; the descriptor is fresh.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) }
}

fn signal(fd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight bytes are read from `one`.
    let written = unsafe { libc::write(fd.as_raw_fd(), std::ptr::from_ref(&one).cast(), 8) };
    assert_eq!(written, 8);
}

/// Blocks until the eventfd is signalled.
fn wait(fd: &OwnedFd) -> u64 {
    let mut count = 0u64;
    // SAFETY: eight bytes are written to `count`.
    let got = unsafe { libc::read(fd.as_raw_fd(), std::ptr::from_mut(&mut count).cast(), 8) };
    assert_eq!(got, 8);
    count
}

/// A host whose vCPU 0 runs the moment it is kicked, in the middle of what kicked it: it ends every interrupt at once.
struct QuickGuest {
    now_ns: AtomicU64,
    hardware: std::sync::OnceLock<(std::sync::Weak<IrqChip>, Arc<Lapic>)>,
    ended: Mutex<mpsc::Sender<u8>>,
}

impl Host for QuickGuest {
    fn now_ns(&self) -> u64 {
        self.now_ns.load(SeqCst)
    }
    fn guest_tsc(&self, _vcpu: usize) -> u64 {
        self.now_ns()
    }
    fn tsc_khz(&self) -> u64 {
        1_000_000
    }
    fn kick(&self, _vcpu: usize) {
        let Some((chip, lapic)) = self.hardware.get() else { return };
        let (Some(chip), Some(vector)) = (chip.upgrade(), lapic.ack_interrupt()) else { return };
        let _ = lock(&self.ended).send(vector);
        chip.pio_write(0x20, &[0x20]);
    }
}

#[test]
fn test_pit_ticks_that_wait_come_though_the_guest_ends_each_during_its_pulse() {
    let (sender, ended) = mpsc::channel();
    let host = Arc::new(QuickGuest {
        now_ns: AtomicU64::new(1),
        hardware: std::sync::OnceLock::new(),
        ended: Mutex::new(sender),
    });
    let chip = IrqChip::new(host.clone()).unwrap();
    let lapic = chip.add_vcpu(0).unwrap();
    write32(&lapic, 0xf0, 0x1ff);
    write32(&lapic, 0x350, 0x700);
    chip.create_pit(KVM_PIT_SPEAKER_DUMMY).unwrap();
    for value in [0x11, 0x30, 4, 1, 0xfe] {
        chip.pio_write(if value == 0x11 { 0x20 } else { 0x21 }, &[value]);
    }
    assert!(host.hardware.set((Arc::downgrade(&chip), lapic)).is_ok());
    // Mode 2, a millisecond.
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        chip.pio_write(port, &[value]);
    }

    host.now_ns.store(3_500_000, SeqCst);
    chip.fire_due();

    for _ in 0..3 {
        assert_eq!(ended.recv_timeout(std::time::Duration::from_secs(20)), Ok(0x30));
    }
}

#[test]
fn test_level_gsi_reinjects_into_same_lapic_until_lowered() {
    let machine = Machine::new(1);
    let lapic = &machine.lapics[0];
    machine.redirect(10, 0x8051);
    // The PIC, which nobody has masked, counts too.
    assert_eq!(machine.chip.set_irq(10, true), 2);
    for _ in 0..3 {
        assert!(lapic.has_interrupt());
        assert_eq!(lapic.ack_interrupt(), Some(0x51));
        assert!(!lapic.has_interrupt());
        write32(lapic, 0xb0, 0);
    }
    assert!(lapic.has_interrupt());
    machine.chip.set_irq(10, false);
    assert_eq!(lapic.ack_interrupt(), Some(0x51));
    write32(lapic, 0xb0, 0);
    assert!(!lapic.attention());
}

#[test]
fn test_simultaneous_interrupts_come_highest_first() {
    let machine = Machine::new(1);
    let lapic = &machine.lapics[0];
    machine.redirect(14, 0x78);
    machine.redirect(15, 0x66);
    for gsi in [15, 14] {
        machine.chip.set_irq(gsi, true);
        machine.chip.set_irq(gsi, false);
    }
    assert_eq!(lapic.ack_interrupt(), Some(0x78));
    assert_eq!(lapic.ack_interrupt(), None);
    write32(lapic, 0xb0, 0);
    assert_eq!(lapic.ack_interrupt(), Some(0x66));
}

#[test]
fn test_pic_reaches_boot_processor_through_lint0_only() {
    let machine = Machine::new(2);
    machine.start_pic();
    machine.chip.set_irq(4, true);
    assert!(!machine.lapics[0].has_interrupt());
    machine.host.forget_kicks();
    write32(&machine.lapics[0], 0x350, 0x700);
    assert_eq!(machine.host.wait_for_kick(), 0);
    assert!(machine.lapics[0].has_interrupt());
    assert!(!machine.lapics[1].has_interrupt());
    assert_eq!(machine.lapics[0].ack_interrupt(), Some(0x0c));
    assert_eq!(machine.lapics[0].ack_interrupt(), None);
}

#[test]
fn test_ack_interrupt_prefers_extint_over_the_apic() {
    let machine = Machine::new(1);
    let lapic = &machine.lapics[0];
    machine.start_pic();
    write32(lapic, 0x350, 0x700);
    machine.chip.signal_msi(0xfee0_0000, 0xf0);
    machine.chip.set_irq(1, true);
    assert_eq!(lapic.ack_interrupt(), Some(0x09));
    assert_eq!(lapic.ack_interrupt(), Some(0xf0));
}

#[test]
fn test_pit_ticks_through_ioapic_with_timer_override() {
    let machine = Machine::new(1);
    let lapic = &machine.lapics[0];
    assert!(!machine.chip.pio_write(0x43, &[0x34]));
    machine.chip.create_pit(KVM_PIT_SPEAKER_DUMMY).unwrap();
    assert!(machine.chip.create_pit(0).is_err());
    let mut entry = kvm_irq_routing_entry { type_: 1, ..Default::default() };
    entry.u.irqchip.irqchip = 2;
    entry.u.irqchip.pin = 2;
    machine.chip.set_routing(&[entry]).unwrap();
    machine.redirect(2, 0x30);
    for (port, value) in [(0x43, 0x34), (0x40, 0xe8), (0x40, 0x03)] {
        assert!(machine.chip.pio_write(port, &[value]));
    }
    // Two periods late: re-injection makes up for the lost tick when the first is ended.
    machine.host.set_now(2_000_000);
    machine.chip.fire_due();
    assert_eq!(lapic.ack_interrupt(), Some(0x30));
    write32(lapic, 0xb0, 0);
    assert_eq!(lapic.ack_interrupt(), Some(0x30));
    write32(lapic, 0xb0, 0);
    assert!(!lapic.has_interrupt());
    let mut speaker = [0];
    assert!(machine.chip.pio_read(0x61, &mut speaker));
}

#[test]
fn test_lapic_timer_fires_from_the_thread() {
    let machine = Machine::new(2);
    let lapic = &machine.lapics[1];
    machine.host.forget_kicks();
    write32(lapic, 0x320, 0xec);
    write32(lapic, 0x3e0, 0xb);
    write32(lapic, 0x380, 1000);
    // The thread's sleep is real time, the deadline fake time: move that to where it is due.
    machine.host.set_now(2000);
    assert_eq!(machine.host.wait_for_kick(), 1);
    assert_eq!(lapic.ack_interrupt(), Some(0xec));
    assert_eq!(read32(lapic, 0x390), 0);
}

#[test]
fn test_ipi_to_all_but_self_and_to_self() {
    let machine = Machine::new(3);
    write32(&machine.lapics[1], 0x300, 0x000c_4041);
    let got: Vec<_> = machine.lapics.iter().map(|lapic| lapic.ack_interrupt()).collect();
    assert_eq!(got, [Some(0x41), None, Some(0x41)]);
    write32(&machine.lapics[1], 0x300, 0x0004_4052);
    let got: Vec<_> = machine.lapics.iter().map(|lapic| lapic.ack_interrupt()).collect();
    assert_eq!(got, [None, Some(0x52), None]);
}

#[test]
fn test_init_then_sipi_starts_a_processor() {
    let machine = Machine::new(2);
    let [bsp, ap] = &machine.lapics[..] else { unreachable!() };
    write32(bsp, 0x310, 1 << 24);
    write32(bsp, 0x300, 0x0000_c500);
    assert!(ap.take_init());
    ap.init_reset();
    // Level de-assert is no INIT.
    write32(bsp, 0x300, 0x0000_8500);
    assert!(!ap.init_pending());
    write32(bsp, 0x300, 0x0000_4699);
    assert!(ap.sipi_pending());
    assert_eq!(ap.take_sipi(), Some(0x99));
    assert!(!ap.attention());
    assert!(!bsp.attention());
}

#[test]
fn test_nmi_ipis_merge_behind_the_one_in_progress() {
    let machine = Machine::new(1);
    let lapic = &machine.lapics[0];
    write32(lapic, 0x300, 0x0000_0400);
    assert!(lapic.take_nmi());
    for _ in 0..10 {
        write32(lapic, 0x300, 0x0000_0400);
    }
    assert!(!lapic.attention());
    lapic.nmi_done();
    assert!(lapic.take_nmi());
    lapic.nmi_done();
    assert!(!lapic.take_nmi());
}

#[test]
fn test_msi_physical_logical_and_lowest_priority() {
    let machine = Machine::new(2);
    assert_eq!(machine.chip.signal_msi(0xfee0_1000, 0x61), 1);
    assert_eq!(machine.lapics[1].ack_interrupt(), Some(0x61));
    assert_eq!(machine.chip.signal_msi(0xfee0_9000, 0x61), -1);
    for (index, lapic) in machine.lapics.iter().enumerate() {
        write32(lapic, 0xd0, 1 << (24 + index));
    }
    assert_eq!(machine.chip.signal_msi(0xfee0_3004, 0x0171), 1);
    assert_eq!(machine.lapics[1].ack_interrupt(), Some(0x71));
    assert_eq!(machine.chip.signal_msi(0xfee0_3004, 0x82), 2);
}

#[test]
fn test_pv_ipi_reaches_the_bitmap_from_its_base() {
    let machine = Machine::new(3);
    assert_eq!(machine.chip.send_pv_ipi([0b101, 0], 64, 1, 0x71).unwrap(), 1);
    assert_eq!(machine.lapics[1].ack_interrupt(), Some(0x71));
    assert_eq!(machine.chip.send_pv_ipi([0, 1], 1, 1, 0x72).unwrap(), 1);
    assert_eq!(machine.lapics[2].ack_interrupt(), Some(0x72));
    assert_eq!(machine.chip.send_pv_ipi([!0, !0], 64, !0, 0).unwrap(), 0);
    assert_eq!(machine.chip.send_pv_ipi([1, 0], 64, 0, 0x4_0071).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn test_msi_route_fires_on_rise_only() {
    let machine = Machine::new(1);
    let mut entry = kvm_irq_routing_entry { gsi: 30, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = 0xfee0_0000;
    entry.u.msi.data = 0x44;
    machine.chip.set_routing(&[entry]).unwrap();
    assert_eq!(machine.chip.set_irq(30, false), -1);
    assert_eq!(machine.chip.set_irq(30, true), 1);
    assert_eq!(machine.lapics[0].ack_interrupt(), Some(0x44));
    assert_eq!(machine.chip.set_irq(4000, true), -1);
}

#[test]
fn test_irqfd_edge_interrupts_and_stops_after_deassign() {
    let machine = Machine::new(1);
    machine.redirect(5, 0x55);
    let event = eventfd();
    let mut request = kvm_irqfd { fd: event.as_raw_fd() as u32, gsi: 5, ..Default::default() };
    machine.host.forget_kicks();
    machine.chip.irqfd(&request).unwrap();
    assert_eq!(machine.chip.irqfd(&request).unwrap_err().errno(), libc::EBUSY);
    signal(&event);
    machine.host.wait_for_kick();
    assert_eq!(machine.lapics[0].ack_interrupt(), Some(0x55));
    write32(&machine.lapics[0], 0xb0, 0);
    request.flags = KVM_IRQFD_FLAG_DEASSIGN;
    machine.chip.irqfd(&request).unwrap();
    signal(&event);
    drop(machine.chip);
    assert!(!machine.lapics[0].attention());
}

#[test]
fn test_irqfd_resample_lowers_line_and_signals_at_eoi() {
    let machine = Machine::new(1);
    let lapic = &machine.lapics[0];
    machine.redirect(11, 0x805b);
    let (event, resample) = (eventfd(), eventfd());
    let request = kvm_irqfd {
        fd: event.as_raw_fd() as u32,
        gsi: 11,
        flags: KVM_IRQFD_FLAG_RESAMPLE,
        resamplefd: resample.as_raw_fd() as u32,
        ..Default::default()
    };
    machine.host.forget_kicks();
    machine.chip.irqfd(&request).unwrap();
    signal(&event);
    machine.host.wait_for_kick();
    assert_eq!(lapic.ack_interrupt(), Some(0x5b));
    write32(lapic, 0xb0, 0);
    assert_eq!(wait(&resample), 1);
    assert!(!lapic.has_interrupt());
}

#[test]
fn test_irqfd_with_bad_descriptor_is_refused() {
    let machine = Machine::new(1);
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    for (fd, errno) in [(file.as_raw_fd(), libc::EINVAL), (-1, libc::EBADF)] {
        let request = kvm_irqfd { fd: fd as u32, ..Default::default() };
        assert_eq!(machine.chip.irqfd(&request).unwrap_err().errno(), errno);
    }
}

#[test]
fn test_irqchip_state_round_trips_and_unknown_chip_is_refused() {
    let machine = Machine::new(1);
    machine.redirect(3, 0x1234_0000_0001_0033);
    for chip_id in 0..3 {
        let mut state = kvm_irqchip { chip_id, ..Default::default() };
        machine.chip.state(&mut state).unwrap();
        machine.chip.set_state(&state).unwrap();
    }
    let mut state = kvm_irqchip { chip_id: 3, ..Default::default() };
    assert!(machine.chip.state(&mut state).is_err());
    assert_eq!(machine.chip.pit_state().unwrap_err().errno(), libc::ENXIO);
}

#[test]
fn test_add_vcpu_twice_or_out_of_range_is_refused() {
    let machine = Machine::new(1);
    assert_eq!(machine.chip.add_vcpu(0).err().unwrap().errno(), libc::EEXIST);
    assert_eq!(machine.chip.add_vcpu(4096).err().unwrap().errno(), libc::EINVAL);
}

#[test]
fn test_wide_port_access_reaches_following_ports() {
    let machine = Machine::new(1);
    machine.start_pic();
    assert!(machine.chip.pio_write(0x20, &[0x0b, 0x5a]));
    let mut data = [0; 4];
    assert!(machine.chip.pio_read(0x20, &mut data));
    assert_eq!(data, [0, 0x5a, 0xff, 0xff]);
    assert!(!machine.chip.pio_read(0x22, &mut data));
}

#[derive(Clone, Debug)]
enum Step {
    LapicWrite(usize, u32, u32),
    Msr(usize, u32, u64),
    Base(usize, u64),
    Deadline(usize, u64),
    Ioapic(u8, u32),
    Port(u16, u8),
    Line(u32, bool),
    Msi(u32, u32),
    Time(u64),
    Acknowledge(usize),
    Restore(usize, Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    let cpu = 0usize..3;
    prop_oneof![
        (cpu.clone(), (0u32..0x40).prop_map(|r| r << 4), any::<u32>()).prop_map(|(c, r, v)| Step::LapicWrite(c, r, v)),
        (cpu.clone(), 0x7f0u32..0x850, any::<u64>()).prop_map(|(c, r, v)| Step::Msr(c, r, v)),
        (cpu.clone(), 0u64..4).prop_map(|(c, mode)| Step::Base(c, 0xfee0_0000 | mode << 10)),
        (cpu.clone(), any::<u64>()).prop_map(|(c, v)| Step::Deadline(c, v)),
        (any::<u8>(), any::<u32>()).prop_map(|(r, v)| Step::Ioapic(r, v)),
        (prop::sample::select(vec![0x20u16, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x42, 0x43, 0x61]), any::<u8>())
            .prop_map(|(p, v)| Step::Port(p, v)),
        (0u32..30, any::<bool>()).prop_map(|(g, l)| Step::Line(g, l)),
        (any::<u32>(), any::<u32>()).prop_map(|(a, d)| Step::Msi(a, d)),
        (0u64..1 << 33).prop_map(Step::Time),
        cpu.clone().prop_map(Step::Acknowledge),
        (cpu, prop::collection::vec(any::<u8>(), 1024)).prop_map(|(c, p)| Step::Restore(c, p)),
    ]
}

fn take(machine: &Machine, step: Step) {
    let lapics = &machine.lapics;
    match step {
        Step::LapicWrite(cpu, offset, value) => {
            write32(&lapics[cpu], offset, value);
            read32(&lapics[cpu], offset);
        }
        Step::Msr(cpu, msr, value) => {
            let _ = lapics[cpu].msr_write(msr, value);
            let _ = lapics[cpu].msr_read(msr);
        }
        Step::Base(cpu, value) => {
            let _ = lapics[cpu].set_apic_base(value);
        }
        Step::Deadline(cpu, value) => lapics[cpu].set_tsc_deadline(value),
        Step::Ioapic(select, value) => {
            machine.chip.mmio_write(0xfec0_0000, &[select]);
            machine.chip.mmio_write(0xfec0_0010, &value.to_le_bytes());
        }
        Step::Port(port, value) => {
            machine.chip.pio_write(port, &[value]);
            machine.chip.pio_read(port, &mut [0; 2]);
        }
        Step::Line(gsi, level) => {
            machine.chip.set_irq(gsi, level);
        }
        Step::Msi(address, data) => {
            machine.chip.signal_msi(address.into(), data);
        }
        Step::Time(step_ns) => {
            machine.host.set_now(machine.host.now_ns() + step_ns);
            machine.chip.fire_due();
        }
        Step::Acknowledge(cpu) => {
            lapics[cpu].ack_interrupt();
            lapics[cpu].take_nmi();
            lapics[cpu].take_init();
            lapics[cpu].take_sipi();
        }
        Step::Restore(cpu, page) => {
            let mut state = lapics[cpu].state();
            for (slot, byte) in state.regs.iter_mut().zip(page) {
                *slot = byte as _;
            }
            let _ = lapics[cpu].set_state(&state);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn test_any_guest_never_panics_nor_deadlocks(steps in prop::collection::vec(step(), 0..200)) {
        let machine = Machine::new(3);
        machine.chip.create_pit(KVM_PIT_SPEAKER_DUMMY).unwrap();
        for step in steps {
            take(&machine, step);
            for lapic in &machine.lapics {
                if lapic.has_interrupt() {
                    prop_assert!(lapic.attention());
                }
            }
        }
    }
}

/// Deterministic random numbers, one stream per thread.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24
    }
}

#[test]
fn test_threads_interrupting_each_other_never_deadlock() {
    let machine = Machine::new(3);
    machine.chip.create_pit(KVM_PIT_SPEAKER_DUMMY).unwrap();
    for pin in 0..24 {
        machine.redirect(pin, 0x8030 + 8 * u64::from(pin));
    }
    let (event, resample) = (eventfd(), eventfd());
    let request = kvm_irqfd {
        fd: event.as_raw_fd() as u32,
        gsi: 11,
        flags: KVM_IRQFD_FLAG_RESAMPLE,
        resamplefd: resample.as_raw_fd() as u32,
        ..Default::default()
    };
    machine.chip.irqfd(&request).unwrap();
    std::thread::scope(|scope| {
        for cpu in 0..3 {
            let (machine, event) = (&machine, &event);
            scope.spawn(move || {
                let mut random = Lcg(cpu as u64);
                let lapic = &machine.lapics[cpu];
                for _ in 0..20_000 {
                    let value = random.next();
                    match value % 8 {
                        0 => write32(lapic, 0x300, 0x000c_4030 | (value >> 8) as u32 & 0xcf),
                        1 => drop(machine.chip.set_irq((value >> 8) as u32 % 24, value & 0x80 != 0)),
                        2 => signal(event),
                        3 => lapic.set_tsc_deadline(machine.host.now_ns() + (value >> 40)),
                        4 => drop(machine.chip.pio_write(0x40 + (value >> 8) as u16 % 4, &[value as u8])),
                        5 => machine.host.set_now(machine.host.now_ns() + 100_000),
                        _ => drop(lapic.ack_interrupt()),
                    }
                    write32(lapic, 0xb0, 0);
                    if value.is_multiple_of(64) {
                        machine.host.forget_kicks();
                    }
                }
            });
        }
    });
    drop(machine.chip);
}
