//! Tests of the interval timer with a clock in hand.

use super::*;
use proptest::prelude::*;

/// Just after `ticks` of the input clock.
fn at(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000).div_ceil(1_193_182) as u64
}

fn program(pit: &mut Pit, channel: u8, mode: u8, count: u16, now_ns: u64) {
    pit.write(0x43, channel << 6 | 0x30 | mode << 1, now_ns);
    let [low, high] = count.to_le_bytes();
    pit.write(0x40 + u16::from(channel), low, now_ns);
    pit.write(0x40 + u16::from(channel), high, now_ns);
}

fn count(pit: &mut Pit, channel: u8, now_ns: u64) -> u16 {
    pit.write(0x43, channel << 6, now_ns);
    let port = 0x40 + u16::from(channel);
    u16::from_le_bytes([pit.read(port, now_ns), pit.read(port, now_ns)])
}

fn status(pit: &mut Pit, channel: u8, now_ns: u64) -> u8 {
    pit.write(0x43, 0xe0 | 2 << channel, now_ns);
    pit.read(0x40 + u16::from(channel), now_ns)
}

#[test]
fn test_mode_0_goes_high_once_at_terminal_count() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 0, 1000, 0);
    assert_eq!(count(&mut pit, 0, at(400)), 600);
    assert_eq!(status(&mut pit, 0, at(999)), 0x30);
    assert_eq!(status(&mut pit, 0, at(1000)), 0xb0);
    assert_eq!(pit.deadline_ns(), Some(at(1000)));
    assert!(!pit.run(at(999)));
    assert!(pit.run(at(1000)));
    assert_eq!(pit.deadline_ns(), None);
    assert_eq!(count(&mut pit, 0, at(1001)), 0xffff);
}

#[test]
fn test_mode_2_repeats_and_is_low_in_the_last_tick() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 2, 1000, 0);
    assert_eq!(count(&mut pit, 0, at(1)), 999);
    assert_eq!(status(&mut pit, 0, at(998)) & 0x80, 0x80);
    assert_eq!(status(&mut pit, 0, at(999)) & 0x80, 0);
    assert_eq!(count(&mut pit, 0, at(1000)), 1000);
    assert!(pit.run(at(1000)));
    assert_eq!(pit.deadline_ns(), Some(at(2000)));
}

#[test]
fn test_mode_3_halves_and_counts_by_two() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 3, 1001, 0);
    assert_eq!(count(&mut pit, 0, at(10)), 980);
    assert_eq!(status(&mut pit, 0, at(500)) & 0x80, 0x80);
    assert_eq!(status(&mut pit, 0, at(501)) & 0x80, 0);
    assert_eq!(pit.deadline_ns(), Some(at(1001)));
}

#[test]
fn test_mode_4_strobes_low_for_one_tick() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 4, 500, 0);
    assert_eq!(status(&mut pit, 0, at(499)) & 0x80, 0x80);
    assert_eq!(status(&mut pit, 0, at(500)) & 0x80, 0);
    assert_eq!(pit.deadline_ns(), Some(at(501)));
}

#[test]
fn test_mode_1_starts_at_the_gate_and_restarts() {
    let mut pit = Pit::new(true);
    program(&mut pit, 2, 1, 100, 0);
    assert_eq!(status(&mut pit, 2, at(500)) & 0xc0, 0xc0);
    pit.write(0x61, 1, at(1000));
    assert_eq!(status(&mut pit, 2, at(1050)) & 0xc0, 0);
    pit.write(0x61, 0, at(1060));
    pit.write(0x61, 1, at(1080));
    assert_eq!(pit.read(0x61, at(1150)) & 0x20, 0);
    assert_eq!(pit.read(0x61, at(1181)) & 0x20, 0x20);
}

#[test]
fn test_speaker_gate_holds_mode_0_count() {
    let mut pit = Pit::new(true);
    pit.write(0x61, 1, 0);
    program(&mut pit, 2, 0, 1000, 0);
    pit.write(0x61, 0, at(300));
    assert_eq!(count(&mut pit, 2, at(5000)), 700);
    pit.write(0x61, 3, at(6000));
    assert_eq!(pit.read(0x61, at(6600)) & 0x23, 0x03);
    assert_eq!(pit.read(0x61, at(6701)) & 0x23, 0x23);
}

#[test]
fn test_bcd_counts_in_decimal() {
    let mut pit = Pit::new(true);
    pit.write(0x43, 0x31, 0);
    pit.write(0x40, 0x00, 0);
    pit.write(0x40, 0x10, 0);
    assert_eq!(count(&mut pit, 0, at(1)), 0x0999);
    assert_eq!(count(&mut pit, 0, at(1001)), 0x9999);
}

#[test]
fn test_latches_hold_until_read_status_first() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 2, 1000, 0);
    pit.write(0x43, 0xc2, at(100));
    pit.write(0x43, 0xc2, at(200));
    assert_eq!(pit.read(0x40, at(300)), 0xb4);
    assert_eq!(pit.read(0x40, at(300)), (900u16 & 0xff) as u8);
    assert_eq!(pit.read(0x40, at(300)), 3);
    assert_eq!(pit.read(0x40, at(300)), (700u16 & 0xff) as u8);
}

#[test]
fn test_single_byte_access_modes_use_one_half() {
    let mut pit = Pit::new(true);
    pit.write(0x43, 0x14, 0);
    pit.write(0x40, 0x80, 0);
    assert_eq!(pit.read(0x40, at(0x10)), 0x70);
    assert_eq!(pit.read(0x40, at(0x20)), 0x60);
    pit.write(0x43, 0x24, 0);
    pit.write(0x40, 0x80, 0);
    assert_eq!(pit.read(0x40, at(0x100)), 0x7f);
}

#[test]
fn test_tiny_period_is_clamped() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 2, 1, 0);
    assert!(pit.deadline_ns().unwrap() >= MIN_PERIOD_NS);
}

#[test]
fn test_reinjection_delivers_ticks_that_came_unacknowledged() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 2, 1000, 0);
    assert!(pit.run(at(1000)));
    assert!(!pit.run(at(2000)));
    assert!(!pit.run(at(3000)));
    assert!(pit.acknowledge());
    assert!(pit.acknowledge());
    assert!(!pit.acknowledge());
    assert!(pit.run(at(4000)));
}

#[test]
fn test_without_reinjection_every_tick_pulses() {
    let mut pit = Pit::new(true);
    pit.set_reinject(false);
    program(&mut pit, 0, 2, 1000, 0);
    assert!(pit.run(at(1000)));
    assert!(pit.run(at(9000)));
    assert!(!pit.acknowledge());
}

#[test]
fn test_set_state_restarts_the_count_and_refuses_nonsense() {
    let mut pit = Pit::new(true);
    program(&mut pit, 0, 2, 1000, 5);
    let state = pit.state();
    let mut copy = Pit::new(true);
    copy.set_state(&state, at(77)).unwrap();
    assert_eq!(copy.deadline_ns(), Some(at(77) + at(1000)));
    let mut bad = state;
    bad.channels[1].mode = 6;
    assert!(copy.set_state(&bad, 0).is_err());
    bad = state;
    bad.channels[0].count = 0x2_0000;
    assert!(copy.set_state(&bad, 0).is_err());
}

proptest! {
    #[test]
    fn test_any_accesses_never_panic(
        accesses in prop::collection::vec((0usize..5, any::<u8>(), 0u64..1 << 40), 0..300)
    ) {
        let mut pit = Pit::new(true);
        let mut now_ns = 0;
        for (port, value, step_ns) in accesses {
            let port = [0x40, 0x41, 0x42, 0x43, 0x61][port];
            now_ns += step_ns;
            pit.write(port, value, now_ns);
            pit.read(port, now_ns);
            let pulses = pit.run(now_ns);
            let again = pit.acknowledge();
            prop_assert!(pit.deadline_ns().is_none_or(|deadline_ns| deadline_ns > now_ns));
            prop_assert!(!(again && pulses && pit.pending == 0));
        }
    }
}
