//! Speed of the interpreter on a register loop: `cargo run --release --example loop`.

use ostler_soft::cpu::testing::Bench;
use std::time::Instant;

/// l: add rax, rcx; xor rdx, rax; lea rsi, [rax+rdx]; shl rsi, 3; cmp rsi, rdx; dec rcx; jnz l; ud2
const LOOP: &[u8] = &[
    0x48, 0x01, 0xc8, 0x48, 0x31, 0xc2, 0x48, 0x8d, 0x34, 0x10, 0x48, 0xc1, 0xe6, 0x03, 0x48, 0x39, 0xd6, 0x48, 0xff,
    0xc9, 0x75, 0xea, 0x0f, 0x0b,
];

fn main() {
    for _ in 0..5 {
        let mut bench = Bench::new(1 << 20).long_mode(0x10_000, false);
        bench.load(0x10_000, LOOP);
        bench.cpu.regs[1] = 30_000_000;
        let start = Instant::now();
        let _ = bench.cpu.run_raw(u64::MAX / 2);
        let seconds = start.elapsed().as_secs_f64();
        println!("{:.1} M instructions/s", bench.cpu.retired as f64 / seconds / 1e6);
    }
}
