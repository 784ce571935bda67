//! That equal engines are found equal, and that a difference is found.

use super::*;
use crate::cpu::testing::{Bench, NoBoard};

const CODE: u64 = 0x10_000;
const DATA: u64 = 0x20_000;

/// mov ecx, 100000; l: add rbx, [DATA]; rol ebx, 7; mov [DATA + 8], rbx; rdtsc; dec ecx; jnz l; out 0x80, al; hlt
const PROGRAM: &[u8] = &[
    0xb9, 0xa0, 0x86, 1, 0, 0x48, 3, 0x1c, 0x25, 0, 0, 2, 0, 0xc1, 0xc3, 7, 0x48, 0x89, 0x1c, 0x25, 8, 0, 2, 0, 0x0f,
    0x31, 0xff, 0xc9, 0x75, 0xe7, 0xe6, 0x80, 0xf4,
];

fn pair() -> (Bench, Box<Lockstep>) {
    let mut bench = Bench::new(1 << 20).long_mode(CODE, false);
    bench.load(CODE, PROGRAM);
    bench.load(DATA, &7u64.to_le_bytes());
    let (lockstep, board) = Lockstep::new(Box::new(NoBoard), Box::new(|_, _| false)).unwrap();
    bench.cpu.board = board;
    (bench, lockstep)
}

#[test]
fn test_lockstep_of_a_loop_to_its_exits_finds_no_difference() {
    let (mut bench, mut lockstep) = pair();

    let exits: Vec<RunEnd> = (0..2).map(|_| lockstep.run(&mut bench.cpu)).collect();

    assert!(matches!(exits[0], RunEnd::Exit(Exit::Io { port: 0x80, .. })), "{exits:?}");
    assert_eq!(exits[1], RunEnd::Exit(Exit::Hlt));
    assert!(!lockstep.failed && lockstep.figures.registers > 300, "{}", lockstep.figures.registers);
    let translated = lockstep.follower.translator.as_ref().map_or(0, |t| t.stats.translated);
    assert!(translated > 0);
    assert_eq!(lockstep.follower.slots.host(DATA).map(|at| unsafe { *(at as *const u64) }), Some(7));
}

#[test]
fn test_lockstep_of_different_memory_stops_the_guest() {
    let (mut bench, mut lockstep) = pair();
    lockstep.take_slots(&bench.cpu);
    lockstep.next_memory = u64::MAX;
    assert!(lockstep.follower.slots.write(DATA, &8u64.to_le_bytes()));

    let end = lockstep.run(&mut bench.cpu);

    assert!(matches!(end, RunEnd::Exit(Exit::Internal(_))), "{end:?}");
    assert!(bench.cpu.retired < 10 * SLICE);
}

#[test]
fn test_lockstep_of_memory_that_is_never_read_is_compared_too() {
    let (mut bench, mut lockstep) = pair();
    lockstep.take_slots(&bench.cpu);
    assert!(lockstep.follower.slots.write(DATA + 0x1000, &[1]));

    let end = lockstep.run(&mut bench.cpu);

    assert!(matches!(end, RunEnd::Exit(Exit::Internal(_))), "{end:?}");
}
