//! Tests of the IOAPIC alone: messages are collected instead of delivered.

use super::*;
use proptest::prelude::*;

const SOURCE: u8 = 1;

/// An IOAPIC whose messages are always taken by one APIC, and remembered.
struct Bench {
    chip: IoApic,
    sent: Vec<Message>,
}

impl Bench {
    fn new() -> Self {
        Self { chip: IoApic::new(), sent: Vec::new() }
    }

    fn write(&mut self, register: u8, value: u32) -> Option<u8> {
        let sent = &mut self.sent;
        let mut deliver = |message: &Message| {
            sent.push(*message);
            1
        };
        self.chip.write(IOREGSEL, &[register], &mut deliver);
        self.chip.write(IOWIN, &value.to_le_bytes(), &mut deliver)
    }

    fn read(&mut self, register: u8) -> u32 {
        self.write_select(register);
        let mut data = [0; 4];
        self.chip.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn write_select(&mut self, register: u8) {
        self.chip.write(IOREGSEL, &[register], &mut |_| -1);
    }

    fn line(&mut self, pin: u8, level: bool) -> i32 {
        let sent = &mut self.sent;
        self.chip.set_line(pin, SOURCE, level, &mut |message| {
            sent.push(*message);
            1
        })
    }

    fn eoi(&mut self, vector: u8) {
        let sent = &mut self.sent;
        let pins = self.chip.pins_with(vector);
        self.chip.end_of_interrupt(vector, pins, &mut |message| {
            sent.push(*message);
            1
        });
    }

    fn low(&mut self, pin: u8) -> u32 {
        self.read(REG_REDIRECTION + 2 * pin)
    }
}

#[test]
fn test_registers_after_reset_are_version_and_masked_pins() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(REG_VERSION), 0x0017_0011);
    assert_eq!(bench.low(23), 0x0001_0000);
    assert_eq!(bench.read(0x40), !0);
    bench.write(REG_ID, 0xff00_0000);
    assert_eq!(bench.read(REG_ID), 0x0f00_0000);
    assert_eq!(bench.read(REG_ARBITRATION), 0x0f00_0000);
}

#[test]
fn test_edge_pin_sends_once_per_rise() {
    let mut bench = Bench::new();
    bench.write(REG_REDIRECTION + 9, 0x0500_0000);
    bench.write(REG_REDIRECTION + 8, 0x0000_0041);
    assert_eq!(bench.line(4, true), 1);
    assert_eq!(bench.line(4, true), 0);
    bench.line(4, false);
    bench.line(4, true);
    assert_eq!(bench.sent.len(), 2);
    assert_eq!(bench.sent[0].vector, 0x41);
    assert_eq!(bench.sent[0].destination, 5);
}

#[test]
fn test_masked_edge_is_lost_and_masked_level_is_kept() {
    let mut bench = Bench::new();
    assert_eq!(bench.line(4, true), -1);
    assert_eq!(bench.line(5, true), -1);
    assert_eq!(bench.write(REG_REDIRECTION + 8, 0x0041), Some(4));
    bench.write(REG_REDIRECTION + 10, 0x8042);
    assert_eq!(bench.sent.len(), 1);
    assert_eq!(bench.sent[0].vector, 0x42);
}

#[test]
fn test_level_pin_waits_for_eoi_and_interrupts_again() {
    let mut bench = Bench::new();
    bench.write(REG_REDIRECTION + 20, 0x8051);
    bench.line(10, true);
    assert_eq!(bench.low(10), 0xc051);
    assert_eq!(bench.line(10, true), -1);
    bench.eoi(0x51);
    assert_eq!(bench.sent.len(), 2);
    bench.line(10, false);
    bench.eoi(0x51);
    assert_eq!(bench.low(10), 0x8051);
    assert_eq!(bench.sent.len(), 2);
}

#[test]
fn test_remote_irr_is_read_only_and_cleared_by_edge_mode() {
    let mut bench = Bench::new();
    bench.write(REG_REDIRECTION, 0x8000 | 0x4000 | 0x31);
    assert_eq!(bench.low(0), 0x8031);
    bench.line(0, true);
    bench.write(REG_REDIRECTION, 0x1_8031);
    assert_eq!(bench.low(0), 0x1_c031);
    bench.write(REG_REDIRECTION, 0x1_0031);
    assert_eq!(bench.low(0), 0x1_0031);
}

#[test]
fn test_shared_line_falls_with_its_last_source() {
    let mut bench = Bench::new();
    bench.write(REG_REDIRECTION, 0x8031);
    bench.line(0, true);
    bench.chip.set_line(0, 2, true, &mut |_| 1);
    bench.line(0, false);
    bench.eoi(0x31);
    assert_eq!(bench.sent.len(), 2);
}

#[test]
fn test_level_nobody_took_sets_no_remote_irr() {
    let mut bench = Bench::new();
    bench.write(REG_REDIRECTION, 0x8031);
    bench.chip.set_line(0, SOURCE, true, &mut |_| -1);
    assert_eq!(bench.low(0), 0x8031);
}

#[test]
fn test_set_state_round_trips_and_refuses_foreign_base() {
    let mut bench = Bench::new();
    bench.write(REG_REDIRECTION + 20, 0x8051);
    bench.line(10, true);
    let state = bench.chip.state();
    let mut copy = IoApic::new();
    copy.set_state(&state, &mut |_| 1).unwrap();
    assert_eq!(copy.redirection, bench.chip.redirection);
    assert_eq!(copy.lines, bench.chip.lines);
    let foreign = kvm_ioapic_state { base_address: 0x1000, ..state };
    assert!(copy.set_state(&foreign, &mut |_| 1).is_err());
}

proptest! {
    #[test]
    fn test_any_accesses_never_panic(
        accesses in prop::collection::vec((any::<u8>(), any::<u32>(), 0usize..9, any::<u8>()), 0..200)
    ) {
        let mut chip = IoApic::new();
        for (offset, value, length, pin) in accesses {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&value.to_le_bytes());
            chip.write(offset.into(), &bytes[..length], &mut |_| 1);
            chip.write(IOWIN, &bytes[..length], &mut |_| 1);
            chip.read(offset.into(), &mut bytes[..length]);
            chip.read(IOWIN, &mut bytes[..length]);
            chip.set_line(pin, SOURCE, value & 1 != 0, &mut |_| 0);
            let pins = chip.pins_with(value as u8);
            chip.end_of_interrupt(value as u8, pins, &mut |_| 1);
        }
    }
}
