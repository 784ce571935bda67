//! Tests of the two 8259As alone.

use super::*;
use proptest::prelude::*;

const SOURCE: u8 = 1;

/// Both chips initialised as a PC's firmware does: vectors 0x08 and 0x70, all unmasked.
fn ready(icw4: u8) -> Pic {
    let mut pic = Pic::new();
    for (port, base) in [(0x20, 0x08), (0xa0, 0x70)] {
        pic.write(port, 0x11);
        pic.write(port + 1, base);
        pic.write(port + 1, if port == 0x20 { 4 } else { 2 });
        pic.write(port + 1, icw4);
        pic.write(port + 1, 0);
    }
    pic
}

fn pulse(pic: &mut Pic, input: u8) {
    pic.set_line(input, SOURCE, true);
    pic.set_line(input, SOURCE, false);
}

#[test]
fn test_edge_is_delivered_once_and_ended_by_eoi() {
    let mut pic = ready(1);
    pulse(&mut pic, 1);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), (0x09, 0));
    assert!(!pic.output());
    assert_eq!(pic.write(0x20, 0x20), 1 << 1);
    assert!(!pic.output());
}

#[test]
fn test_set_line_reports_coalesced_and_masked() {
    let mut pic = ready(1);
    assert_eq!(pic.set_line(3, SOURCE, true), 1);
    pic.set_line(3, SOURCE, false);
    assert_eq!(pic.set_line(3, SOURCE, true), 0);
    pic.write(0x21, 0x10);
    assert_eq!(pic.set_line(4, SOURCE, true), -1);
    assert_eq!(pic.set_line(2, SOURCE, true), -1);
}

#[test]
fn test_slave_interrupt_cascades_and_needs_both_eois() {
    let mut pic = ready(1);
    pulse(&mut pic, 12);
    assert_eq!(pic.acknowledge(), (0x74, 0));
    pulse(&mut pic, 14);
    assert!(!pic.output());
    assert_eq!(pic.write(0xa0, 0x20), 1 << 12);
    assert_eq!(pic.write(0x20, 0x20), 0);
    assert_eq!(pic.acknowledge(), (0x76, 0));
}

#[test]
fn test_special_fully_nested_lets_slave_interrupt_itself() {
    let mut pic = ready(0x11);
    pulse(&mut pic, 12);
    pic.acknowledge();
    pulse(&mut pic, 8);
    assert_eq!(pic.acknowledge().0, 0x70);
}

#[test]
fn test_higher_priority_nests_and_lower_waits() {
    let mut pic = ready(1);
    pulse(&mut pic, 5);
    pic.acknowledge();
    pulse(&mut pic, 6);
    assert!(!pic.output());
    pulse(&mut pic, 0);
    assert_eq!(pic.acknowledge().0, 0x08);
}

#[test]
fn test_vanished_level_interrupt_is_spurious_irq_7_and_15() {
    let mut pic = ready(1);
    pic.write(0x4d0, 0xff);
    pic.write(0x4d1, 0xff);
    assert_eq!(pic.read(0x4d0).0, 0xf8);
    assert_eq!(pic.read(0x4d1).0, 0xde);
    pic.set_line(5, SOURCE, true);
    pic.set_line(5, SOURCE, false);
    assert_eq!(pic.acknowledge(), (0x0f, 0));
    assert_eq!(pic.chips[0].isr, 0);
    assert_eq!(pic.acknowledge_slave(&mut 0), 0x77);
}

#[test]
fn test_level_interrupt_repeats_while_the_line_is_up() {
    let mut pic = ready(1);
    pic.write(0x4d1, 0x08);
    pic.set_line(11, SOURCE, true);
    assert_eq!(pic.acknowledge().0, 0x73);
    pic.write(0xa0, 0x20);
    pic.write(0x20, 0x20);
    assert!(pic.output());
    pic.set_line(11, SOURCE, false);
    assert!(!pic.output());
}

#[test]
fn test_rotation_on_eoi_gives_lowest_priority() {
    let mut pic = ready(1);
    pulse(&mut pic, 3);
    pic.acknowledge();
    pic.write(0x20, 0xa0);
    pulse(&mut pic, 3);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge().0, 0x0c);
    pic.write(0x20, 0x64);
    // Set priority: input 6 lowest, so 7 is highest.
    pic.write(0x20, 0xc6);
    pulse(&mut pic, 7);
    assert_eq!(pic.acknowledge().0, 0x0f);
}

#[test]
fn test_automatic_eoi_ends_at_acknowledgement() {
    let mut pic = ready(0x03);
    pic.write(0x20, 0x80);
    pulse(&mut pic, 0);
    assert_eq!(pic.acknowledge(), (0x08, 1));
    assert_eq!(pic.chips[0].isr, 0);
    assert_eq!(pic.chips[0].top, 1);
}

#[test]
fn test_special_mask_mode_admits_lower_priorities() {
    let mut pic = ready(1);
    pulse(&mut pic, 1);
    pic.acknowledge();
    pic.write(0x21, 0x02);
    pulse(&mut pic, 4);
    assert!(!pic.output());
    pic.write(0x20, 0x68);
    assert_eq!(pic.acknowledge().0, 0x0c);
}

#[test]
fn test_poll_acknowledges_and_register_select_reads_irr_and_isr() {
    let mut pic = ready(1);
    pulse(&mut pic, 6);
    pic.write(0x20, 0x0a);
    assert_eq!(pic.read(0x20).0, 0x40);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20).0, 0x86);
    pic.write(0x20, 0x0b);
    assert_eq!(pic.read(0x20).0, 0x40);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20).0, 0);
}

#[test]
fn test_initialisation_clears_service_and_mask() {
    let mut pic = ready(1);
    pulse(&mut pic, 6);
    pic.acknowledge();
    pic.write(0x21, 0xff);
    assert_eq!(pic.write(0x20, 0x11), 0x40);
    assert_eq!(pic.chips[0].imr, 0);
    assert_eq!(pic.chips[0].isr, 0);
}

#[test]
fn test_set_state_round_trips_and_refuses_bad_priority() {
    let mut pic = ready(1);
    pulse(&mut pic, 9);
    pic.acknowledge();
    let state = pic.state(1);
    let mut copy = ready(1);
    copy.set_state(1, &state).unwrap();
    assert_eq!(copy.state(1), state);
    let bad = kvm_pic_state { priority_add: 8, ..state };
    assert!(copy.set_state(1, &bad).is_err());
}

proptest! {
    #[test]
    fn test_any_accesses_never_panic(accesses in prop::collection::vec((0usize..6, any::<u8>(), 0u8..20), 0..300)) {
        let mut pic = Pic::new();
        for (port, value, input) in accesses {
            let port = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][port];
            pic.write(port, value);
            pic.read(port);
            pic.set_line(input, SOURCE, value & 1 != 0);
            if pic.output() {
                pic.acknowledge();
            }
        }
    }
}
