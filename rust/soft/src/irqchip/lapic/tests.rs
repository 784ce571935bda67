//! Tests of one local APIC: the state machine alone, and the handle's modes.

use super::super::tests::{read32, write32, FakeHost, Machine};
use super::regs::*;
use super::state::LapicState;
use super::timer::Clock;
use super::*;

/// A software-enabled APIC in xAPIC mode and the host it takes its time from.
struct Bench {
    host: Arc<FakeHost>,
    state: LapicState,
}

impl Bench {
    fn new() -> Self {
        let mut state = LapicState::new(1);
        state.svr = 0x1ff;
        Self { host: FakeHost::new(), state }
    }

    fn with<R>(&mut self, act: impl FnOnce(&mut LapicState, &Clock) -> R) -> R {
        let clock = Clock { host: &*self.host, vcpu: 1 };
        act(&mut self.state, &clock)
    }

    fn write(&mut self, offset: u32, value: u32) -> Outcome {
        self.with(|state, clock| state.mmio_write(offset, &value.to_le_bytes(), clock))
    }

    fn read(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.with(|state, clock| {
            if !state.mmio_read(offset, &mut data, clock) {
                state.report_error(ESR_ILLEGAL_ADDRESS);
            }
        });
        u32::from_le_bytes(data)
    }

    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<Outcome, Gp> {
        self.with(|state, clock| state.msr_write(msr, value, clock))
    }

    fn rdmsr(&mut self, msr: u32) -> Result<u64, Gp> {
        self.with(|state, clock| state.msr_read(msr, clock))
    }

    fn run_at(&mut self, now_ns: u64) {
        self.host.set_now(now_ns);
        self.with(|state, clock| state.run_timer(clock));
    }

    fn into_x2apic(mut self) -> Self {
        let base = self.state.base | APIC_BASE_EXTD;
        self.state.write_base(base).unwrap();
        self
    }
}

#[test]
fn test_reset_values_are_the_manuals() {
    let mut bench = Bench::new();
    bench.state.power_up();
    assert_eq!(bench.read(ID), 0x0100_0000);
    assert_eq!(bench.read(VERSION), 0x0005_0014);
    assert_eq!(bench.read(SVR), 0xff);
    assert_eq!(bench.read(DFR), !0);
    for offset in (LVT_TIMER..=LVT_ERROR).step_by(16) {
        assert_eq!(bench.read(offset), LVT_MASKED);
    }
    assert_eq!(bench.state.base, 0xfee0_0800);
    assert_eq!(LapicState::new(0).base, 0xfee0_0900);
    assert!(LapicState::new(0).admits_extint());
    assert!(!bench.state.admits_extint());
}

#[test]
fn test_priority_class_must_exceed_task_and_service() {
    let mut bench = Bench::new();
    bench.write(TPR, 0x45);
    bench.state.accept_vector(0x4f, false);
    assert_eq!(bench.state.deliverable(), None);
    bench.state.accept_vector(0x51, false);
    assert_eq!(bench.state.acknowledge(), Some(0x51));
    assert_eq!(bench.read(PPR), 0x50);
    bench.state.accept_vector(0x5f, false);
    assert_eq!(bench.state.deliverable(), None);
    bench.state.accept_vector(0x60, false);
    assert_eq!(bench.state.acknowledge(), Some(0x60));
    bench.write(EOI, 0);
    bench.write(EOI, 0);
    assert_eq!(bench.read(PPR), 0x45);
    assert_eq!(bench.state.acknowledge(), Some(0x5f));
    bench.write(EOI, 0);
    bench.write(TPR, 0);
    assert_eq!(bench.state.acknowledge(), Some(0x4f));
}

#[test]
fn test_eoi_reports_trigger_mode_of_the_highest() {
    let mut bench = Bench::new();
    bench.state.accept_vector(0x41, true);
    bench.state.accept_vector(0x52, false);
    assert_eq!(bench.read(TMR + 0x20), 0x0000_0002);
    bench.state.acknowledge();
    let eoi = bench.write(EOI, 0).eoi.unwrap();
    assert_eq!((eoi.vector, eoi.level), (0x52, false));
    bench.state.acknowledge();
    assert_eq!(bench.read(ISR + 0x20), 0x0000_0002);
    let eoi = bench.write(EOI, 0).eoi.unwrap();
    assert_eq!((eoi.vector, eoi.level), (0x41, true));
    assert_eq!(bench.write(EOI, 0).eoi, None);
}

#[test]
fn test_software_disable_masks_lvt_and_refuses_vectors() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0x30);
    bench.write(SVR, 0xff);
    assert_eq!(bench.read(LVT_TIMER), LVT_MASKED | 0x30);
    bench.write(LVT_TIMER, 0x30);
    assert_eq!(bench.read(LVT_TIMER), LVT_MASKED | 0x30);
    assert!(!bench.state.accept_vector(0x50, false));
}

#[test]
fn test_illegal_vectors_and_addresses_are_reported_in_esr() {
    let mut bench = Bench::new();
    bench.write(LVT_ERROR, 0xfe);
    assert_eq!(bench.write(ICR, 0x4005), Outcome::default());
    assert_eq!(bench.read(ESR), 0);
    assert_eq!(bench.state.acknowledge(), Some(0xfe));
    bench.write(EOI, 0);
    assert!(!bench.state.accept_vector(3, false));
    assert_eq!(bench.state.deliverable(), None);
    bench.read(0x3f0);
    bench.write(ESR, 0);
    let all = ESR_SEND_ILLEGAL_VECTOR | ESR_RECEIVED_ILLEGAL_VECTOR | ESR_ILLEGAL_ADDRESS;
    assert_eq!(bench.read(ESR), all);
    bench.write(ESR, 0);
    assert_eq!(bench.read(ESR), 0);
}

#[test]
fn test_page_access_other_than_aligned_dword_is_bounded() {
    let mut bench = Bench::new();
    bench.with(|state, clock| {
        let mut byte = [0];
        assert!(state.mmio_read(VERSION + 2, &mut byte, clock));
        assert_eq!(byte, [5]);
        let mut wide = [1; 8];
        assert!(state.mmio_read(VERSION, &mut wide, clock));
        assert_eq!(wide, [0; 8]);
        state.mmio_write(TPR, &[0xff], clock);
        state.mmio_write(TPR + 4, &[0xff; 4], clock);
        assert_eq!(state.tpr, 0);
    });
}

#[test]
fn test_one_shot_counts_down_and_fires_once() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0xee);
    bench.write(TIMER_DIVIDE, 0x3);
    bench.host.set_now(1000);
    bench.write(TIMER_INITIAL, 100);
    bench.host.set_now(1800);
    assert_eq!(bench.read(TIMER_CURRENT), 50);
    bench.run_at(2599);
    assert_eq!(bench.state.deliverable(), None);
    bench.run_at(2600);
    assert_eq!(bench.state.acknowledge(), Some(0xee));
    assert_eq!(bench.read(TIMER_CURRENT), 0);
    bench.run_at(9000);
    assert_eq!(bench.state.deliverable(), None);
}

#[test]
fn test_divider_encodings() {
    let mut bench = Bench::new();
    for (divide, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        bench.write(TIMER_DIVIDE, divide);
        bench.host.set_now(1000);
        bench.write(TIMER_INITIAL, 1000);
        assert_eq!(bench.state.timer.expiry_ns(), Some(1000 + 1000 * divisor));
    }
}

#[test]
fn test_divider_change_keeps_the_count() {
    let mut bench = Bench::new();
    bench.write(TIMER_DIVIDE, 0xb);
    bench.host.set_now(0);
    bench.write(TIMER_INITIAL, 1000);
    bench.host.set_now(400);
    bench.write(TIMER_DIVIDE, 0);
    assert_eq!(bench.read(TIMER_CURRENT), 600);
    assert_eq!(bench.state.timer.expiry_ns(), Some(1600));
}

#[test]
fn test_periodic_keeps_phase_merges_lost_ticks_and_is_clamped() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0x2_00ee);
    bench.write(TIMER_DIVIDE, 0xb);
    bench.host.set_now(0);
    bench.write(TIMER_INITIAL, 1_000_000);
    bench.run_at(3_500_000);
    assert_eq!(bench.state.acknowledge(), Some(0xee));
    assert_eq!(bench.state.timer.expiry_ns(), Some(4_000_000));
    bench.host.set_now(4_100_000);
    assert_eq!(bench.read(TIMER_CURRENT), 900_000);
    bench.write(TIMER_INITIAL, 1);
    assert_eq!(bench.state.timer.expiry_ns(), Some(4_100_000 + timer::MIN_PERIOD_NS));
}

#[test]
fn test_mode_change_one_shot_to_periodic_keeps_count_but_zero_stays() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0xee);
    bench.write(TIMER_DIVIDE, 0xb);
    bench.host.set_now(0);
    bench.write(TIMER_INITIAL, 1_000_000);
    bench.host.set_now(600_000);
    bench.write(LVT_TIMER, 0x2_00ee);
    assert_eq!(bench.read(TIMER_CURRENT), 400_000);
    bench.run_at(1_100_000);
    assert_eq!(bench.read(TIMER_CURRENT), 900_000);
    bench.write(LVT_TIMER, 0xee);
    bench.run_at(2_000_000);
    bench.write(LVT_TIMER, 0x2_00ee);
    assert_eq!(bench.read(TIMER_CURRENT), 0);
    bench.write(LVT_TIMER, 0x4_00ee);
    assert_eq!(bench.read(TIMER_INITIAL), 0);
    bench.write(TIMER_INITIAL, 5);
    assert_eq!(bench.read(TIMER_INITIAL), 0);
}

#[test]
fn test_timer_write_after_expiry_fires_what_the_thread_is_late_for() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0xee);
    bench.write(TIMER_DIVIDE, 0xb);
    bench.host.set_now(0);
    bench.write(TIMER_INITIAL, 1_000_000);
    bench.host.set_now(1_000_001);
    bench.write(LVT_TIMER, 0x2_00ed);
    assert_eq!(bench.read(TIMER_CURRENT), 0);
    assert_eq!(bench.state.acknowledge(), Some(0xee));
}

#[test]
fn test_tsc_deadline_past_fires_at_once_future_arms() {
    let mut bench = Bench::new();
    bench.host.set_now(5000);
    bench.with(|state, clock| state.write_tsc_deadline(1, clock));
    assert_eq!(bench.state.deliverable(), None);
    bench.write(LVT_TIMER, 0x4_00ef);
    bench.with(|state, clock| state.write_tsc_deadline(5000, clock));
    assert_eq!(bench.state.acknowledge(), Some(0xef));
    assert_eq!(bench.state.tsc_deadline(), 0);
    bench.write(EOI, 0);
    bench.with(|state, clock| state.write_tsc_deadline(7000, clock));
    assert_eq!(bench.state.tsc_deadline(), 7000);
    bench.run_at(6999);
    assert_eq!(bench.state.deliverable(), None);
    bench.run_at(7000);
    assert_eq!(bench.state.acknowledge(), Some(0xef));
    assert_eq!(bench.state.tsc_deadline(), 0);
    bench.with(|state, clock| {
        state.write_tsc_deadline(9000, clock);
        state.write_tsc_deadline(0, clock);
    });
    assert_eq!(bench.state.timer.expiry_ns(), None);
}

#[test]
fn test_apic_base_transitions_follow_the_state_diagram() {
    let mut state = LapicState::new(0);
    let base = 0xfee0_0000;
    let (off, xapic, x2apic, invalid) = (base, base | 0x800, base | 0xc00, base | 0x400);
    assert_eq!(state.write_base(invalid), Err(Gp));
    assert_eq!(state.write_base(xapic | 1), Err(Gp));
    assert_eq!(state.write_base(xapic | 1 << 46), Err(Gp));
    assert_eq!(state.write_base(x2apic), Ok(()));
    assert_eq!(state.write_base(xapic), Err(Gp));
    assert_eq!(state.write_base(off), Ok(()));
    assert_eq!(state.write_base(x2apic), Err(Gp));
    assert_eq!(state.write_base(invalid), Err(Gp));
    assert_eq!(state.write_base(xapic), Ok(()));
    assert_eq!(state.restore_base(x2apic), Ok(()));
    assert_eq!(state.restore_base(xapic), Ok(()));
    assert_eq!(state.restore_base(invalid), Err(Gp));
}

#[test]
fn test_features_absent_from_cpuid_are_refused() {
    let mut bench = Bench::new();
    bench.state.cpuid.x2apic = false;
    assert_eq!(bench.state.write_base(0xfee0_0c00), Err(Gp));
    bench.state.cpuid.tsc_deadline = false;
    bench.write(LVT_TIMER, 0x4_00ef);
    assert_eq!(bench.read(LVT_TIMER), 0xef);
    bench.state.cpuid.x2apic = true;
    let mut bench = bench.into_x2apic();
    assert_eq!(bench.wrmsr(0x832, 0x4_00ef), Err(Gp));
}

#[test]
fn test_disabled_apic_reads_as_ones_keeps_cr8_and_forgets_the_rest() {
    let machine = Machine::new(1);
    let lapic = &machine.lapics[0];
    lapic.set_cr8(5);
    write32(lapic, ID, 0x0700_0000);
    let base = lapic.apic_base();
    lapic.set_apic_base(base & !APIC_BASE_ENABLE).unwrap();
    assert_eq!(read32(lapic, VERSION), !0);
    write32(lapic, TPR, !0);
    assert_eq!(lapic.cr8(), 5);
    assert_eq!(machine.chip.signal_msi(0xfee0_0000, 0x41), -1);
    lapic.set_apic_base(0xfed4_0000 | base & 0xfff).unwrap();
    assert_eq!(lapic.mmio_base(), 0xfed4_0000);
    assert_eq!(read32(lapic, TPR), 0x50);
    assert_eq!(read32(lapic, ID), 0);
    assert_eq!(read32(lapic, SVR), 0xff);
}

#[test]
fn test_x2apic_identity_and_refused_accesses() {
    let mut bench = Bench::new().into_x2apic();
    assert_eq!(bench.rdmsr(0x802), Ok(1));
    assert_eq!(bench.rdmsr(0x80d), Ok(0x2));
    assert_eq!(bench.read(VERSION), !0);
    // Read-only: ID, version, PPR, LDR, ISR, TMR, IRR, current count.
    for msr in [0x802, 0x803, 0x80a, 0x80d, 0x810, 0x818, 0x820, 0x839] {
        assert!(bench.rdmsr(msr).is_ok());
        assert_eq!(bench.wrmsr(msr, 0), Err(Gp));
    }
    // Not there: APR, DFR, RRD, CMCI, ICR2, and past the end.
    for msr in [0x800, 0x809, 0x80c, 0x80e, 0x82f, 0x831, 0x83a, 0x840, 0x7ff] {
        assert_eq!(bench.rdmsr(msr), Err(Gp));
        assert_eq!(bench.wrmsr(msr, 0), Err(Gp));
    }
    // Write-only: EOI, SELF IPI.
    for msr in [0x80b, 0x83f] {
        assert_eq!(bench.rdmsr(msr), Err(Gp));
    }
    let reserved = [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 0x1000),
        (0x828, 1),
        (0x830, 0x2000),
        (0x830, 0x1_0000),
        (0x832, 0x8_0000),
        (0x837, 0x100),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ];
    for (msr, value) in reserved {
        assert_eq!(bench.wrmsr(msr, value), Err(Gp), "{msr:#x}");
    }
    let mut xapic = Bench::new();
    assert_eq!(xapic.rdmsr(0x802), Err(Gp));
    assert_eq!(xapic.wrmsr(0x80b, 0), Err(Gp));
}

#[test]
fn test_x2apic_icr_is_one_register_and_self_ipi_works() {
    let mut bench = Bench::new().into_x2apic();
    let outcome = bench.wrmsr(0x830, 0x0000_0103_0000_4041).unwrap();
    let message = outcome.ipi.unwrap().message;
    assert_eq!((message.destination, message.vector), (0x103, 0x41));
    assert_eq!(bench.rdmsr(0x830), Ok(0x0000_0103_0000_4041));
    bench.wrmsr(0x83f, 0x77).unwrap();
    assert_eq!(bench.state.acknowledge(), Some(0x77));
    assert!(bench.wrmsr(0x80b, 0).unwrap().eoi.is_some());
}

#[test]
fn test_x2apic_broadcast_and_logical_ipis_reach_their_targets() {
    let machine = Machine::new(3);
    for lapic in &machine.lapics {
        lapic.set_apic_base(lapic.apic_base() | APIC_BASE_EXTD).unwrap();
    }
    machine.lapics[0].msr_write(0x830, 0xffff_ffff_0000_40cf).unwrap();
    let got: Vec<_> = machine.lapics.iter().map(|lapic| lapic.ack_interrupt()).collect();
    assert_eq!(got, [Some(0xcf); 3]);
    machine.lapics[0].msr_write(0x830, 0x0000_0006_0000_48df).unwrap();
    let got: Vec<_> = machine.lapics.iter().map(|lapic| lapic.ack_interrupt()).collect();
    assert_eq!(got, [None, Some(0xdf), Some(0xdf)]);
}

#[test]
fn test_state_round_trip_keeps_registers_and_remaining_count() {
    let mut bench = Bench::new();
    bench.write(TPR, 0x20);
    bench.write(LDR, 0x0200_0000);
    bench.write(LVT_TIMER, 0xee);
    bench.write(TIMER_DIVIDE, 0xb);
    bench.host.set_now(0);
    bench.write(TIMER_INITIAL, 1000);
    bench.state.accept_vector(0x41, true);
    bench.host.set_now(300);
    let page = bench.with(|state, clock| state.save(false, clock));
    assert_eq!(page.regs[ID as usize + 3], 1);
    let mut copy = Bench::new();
    copy.host.set_now(5000);
    copy.with(|state, clock| state.restore(&page, false, clock)).unwrap();
    assert_eq!(copy.read(TIMER_CURRENT), 700);
    assert_eq!(copy.state.acknowledge(), Some(0x41));
    assert_eq!(copy.read(LDR), 0x0200_0000);
    assert_eq!(copy.read(TPR), 0x20);
}

#[test]
fn test_state_in_x2apic_mode_uses_the_chosen_id_format() {
    let mut bench = Bench::new().into_x2apic();
    let narrow = bench.with(|state, clock| state.save(false, clock));
    assert_eq!(narrow.regs[0x20..0x24], [0, 0, 0, 1]);
    let wide = bench.with(|state, clock| state.save(true, clock));
    assert_eq!(wide.regs[0x20..0x24], [1, 0, 0, 0]);
    bench.with(|state, clock| {
        assert!(state.restore(&wide, true, clock).is_ok());
        assert!(state.restore(&narrow, false, clock).is_ok());
        assert!(state.restore(&wide, false, clock).is_err());
    });
}

#[test]
fn test_restored_page_brings_no_exception_vectors() {
    let mut bench = Bench::new();
    let page = kvm_lapic_state { regs: [-1; 1024] };
    bench.with(|state, clock| state.restore(&page, false, clock)).unwrap();
    assert_eq!(bench.read(IRR), 0xffff_0000);
    assert_eq!(bench.read(ISR), 0xffff_0000);
}

#[test]
fn test_init_keeps_identity_and_mode_and_clears_the_rest() {
    let mut bench = Bench::new().into_x2apic();
    bench.wrmsr(0x808, 0x30).unwrap();
    bench.wrmsr(0x83f, 0x77).unwrap();
    bench.state.init();
    assert!(bench.state.x2apic());
    assert_eq!(bench.rdmsr(0x80d), Ok(0x2));
    assert_eq!(bench.rdmsr(0x808), Ok(0));
    assert_eq!(bench.state.deliverable(), None);
}
