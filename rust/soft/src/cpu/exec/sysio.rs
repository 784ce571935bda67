//! IN, OUT, INS, OUTS. SDM vol. 2; vol. 1, 19.5 for the permission check.
//!
//! INS and OUTS move one element per step; a repeated one ends each step with [`Stop::Again`], so
//! interrupts are taken between elements. INS checks its destination before it reads the port, as
//! a read may have effects.

use crate::cpu::access::Int;
use crate::cpu::bind::Binder;
use crate::cpu::op::{Handler, Op, ADDR16, ADDR32, REP, REPNE};
use crate::cpu::segment::system;
use crate::cpu::state::{cr0, rflags, seg};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, Stop, R};
use crate::rows;
use iced_x86::OpKind;

impl Cpu {
    /// IOPL, or the TSS's bitmap, allows the ports.
    #[inline]
    fn check_ports(&mut self, port: u16, size: usize) -> R {
        let open = self.cr0 & cr0::PE == 0 || self.cpl <= self.iopl() && !self.vm86();
        if open {
            return Ok(());
        }
        self.check_bitmap(port, size)
    }

    #[cold]
    fn check_bitmap(&mut self, port: u16, size: usize) -> R {
        let wide = self.tr.kind | system::BUSY == system::TSS32_BUSY;
        if self.tr.unusable || !wide || self.tr.limit < 0x67 {
            return Err(self.gp(0));
        }
        let map: u16 = self.rd_system(self.table_linear(self.tr.base, 0x66))?;
        let at = map as u64 + port as u64 / 8;
        // Two bytes are read whatever the size, so the bitmap ends in a byte of ones.
        if at + 1 > self.tr.limit as u64 {
            return Err(self.gp(0));
        }
        let bits: u16 = self.rd_system(self.table_linear(self.tr.base, at))?;
        if bits >> (port & 7) & ((1 << size) - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// Advances SI or DI (`register`) by one element under the address size.
    fn advance_index(&mut self, op: &Op, register: usize, size: u64) {
        let step = if self.sys_flags as u64 & rflags::DF != 0 { size.wrapping_neg() } else { size };
        self.set_address_register(op, register, self.regs[register].wrapping_add(step));
    }

    fn set_address_register(&mut self, op: &Op, register: usize, value: u64) {
        self.regs[register] = if op.has(ADDR16) {
            self.regs[register] & !0xffff | value & 0xffff
        } else if op.has(ADDR32) {
            value & 0xffff_ffff
        } else {
            value
        };
    }
}

/// A register under the address size.
fn address_register(cpu: &Cpu, op: &Op, register: usize) -> u64 {
    let mask = if op.has(ADDR16) {
        0xffff
    } else if op.has(ADDR32) {
        0xffff_ffff
    } else {
        u64::MAX
    };
    cpu.regs[register] & mask
}

unsafe fn input<T: Int, const DX: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let port = if DX { cpu.regs[2] as u16 } else { op.imm as u8 as u16 };
    cpu.check_ports(port, T::SIZE)?;
    let value = cpu.port_read(port, T::SIZE as u8)?;
    cpu.set_reg(0, T::from_u64(value as u64));
    cpu.port_breakpoint(port, T::SIZE as u64);
    Ok(())
}

unsafe fn output<T: Int, const DX: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let port = if DX { cpu.regs[2] as u16 } else { op.imm as u8 as u16 };
    cpu.check_ports(port, T::SIZE)?;
    let value = cpu.reg::<T>(0).to_u64() as u32;
    cpu.port_breakpoint(port, T::SIZE as u64);
    if cpu.port_write(port, T::SIZE as u8, value) {
        return Err(Stop::ExitAfter);
    }
    Ok(())
}

/// A repeated instruction with a count of zero does nothing; tells whether there is work.
fn has_count(cpu: &Cpu, op: &Op) -> bool {
    !op.has(REP | REPNE) || address_register(cpu, op, 1) != 0
}

/// One element is done: counts down and tells whether more follow.
fn more(cpu: &mut Cpu, op: &Op) -> bool {
    if !op.has(REP | REPNE) {
        return false;
    }
    let left = address_register(cpu, op, 1).wrapping_sub(1);
    cpu.set_address_register(op, 1, left);
    left != 0
}

unsafe fn ins<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let port = cpu.regs[2] as u16;
    cpu.check_ports(port, T::SIZE)?;
    if !has_count(cpu, op) {
        return Ok(());
    }
    let size = T::SIZE as u64;
    let offset = address_register(cpu, op, 7);
    let linear = cpu.linear(seg::ES, offset, size, true)?;
    cpu.probe_write(linear, size, seg::ES)?;
    let value = cpu.port_read(port, T::SIZE as u8)?;
    cpu.wr(linear, T::from_u64(value as u64), seg::ES)?;
    cpu.advance_index(op, 7, size);
    cpu.port_breakpoint(port, size);
    if more(cpu, op) {
        return Err(Stop::Again);
    }
    Ok(())
}

unsafe fn outs<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let port = cpu.regs[2] as u16;
    cpu.check_ports(port, T::SIZE)?;
    if !has_count(cpu, op) {
        return Ok(());
    }
    let size = T::SIZE as u64;
    let offset = address_register(cpu, op, 6);
    let linear = cpu.linear(op.seg(), offset, size, false)?;
    let value: T = cpu.rd(linear, op.seg())?;
    let seen = cpu.port_write(port, T::SIZE as u8, value.to_u64() as u32);
    cpu.advance_index(op, 6, size);
    cpu.port_breakpoint(port, size);
    match (more(cpu, op), seen) {
        (true, _) => Err(Stop::Again),
        (false, true) => Err(Stop::ExitAfter),
        _ => Ok(()),
    }
}

fn bind_in(b: &mut Binder) -> Option<Handler> {
    let dx = b.ins.op_kind(1) == OpKind::Register;
    Some(match (b.width(0), dx) {
        (1, true) => input::<u8, true>,
        (2, true) => input::<u16, true>,
        (_, true) => input::<u32, true>,
        (1, false) => input::<u8, false>,
        (2, false) => input::<u16, false>,
        _ => input::<u32, false>,
    })
}

fn bind_out(b: &mut Binder) -> Option<Handler> {
    let dx = b.ins.op_kind(0) == OpKind::Register;
    Some(match (b.ins.op_register(1).size(), dx) {
        (1, true) => output::<u8, true>,
        (2, true) => output::<u16, true>,
        (_, true) => output::<u32, true>,
        (1, false) => output::<u8, false>,
        (2, false) => output::<u16, false>,
        _ => output::<u32, false>,
    })
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    System "SDM vol. 2, IN OUT INS OUTS" {
        In => bind_in, Out => bind_out,
        Insb => |_| Some(ins::<u8>), Insw => |_| Some(ins::<u16>), Insd => |_| Some(ins::<u32>),
        Outsb => |_| Some(outs::<u8>), Outsw => |_| Some(outs::<u16>), Outsd => |_| Some(outs::<u32>),
    }
};

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::{handler, TSS};
    use crate::cpu::run::RunEnd;
    use crate::cpu::testing::Bench;
    use crate::cpu::Exit;

    const CODE: u64 = 0x1_0000;

    #[test]
    fn test_user_ports_follow_the_bitmap_to_its_last_bit() {
        // in ax, dx at 0x7f: ports 0x7f and 0x80
        for (bytes, allowed) in [([0x7f, 0xfe], true), ([0x7f, 0xff], false), ([0xff, 0xfe], false)] {
            let mut bench = Bench::new(1 << 20).long(CODE).user().code(&[0x66, 0xed]);
            bench.load(TSS + 0x68 + 0xf, &bytes);
            bench.cpu.regs[2] = 0x7f;
            let end = bench.cpu.step();
            if allowed {
                assert_eq!(end, Some(RunEnd::Exit(Exit::Io { port: 0x7f, size: 2, write: None })));
            } else {
                assert_eq!((end, bench.cpu.rip), (None, handler(13)));
            }
        }
    }

    #[test]
    fn test_rep_outsb_gives_every_byte_in_order() {
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0xf3, 0x6e]);
        bench.load(0x2_0000, b"abc");
        (bench.cpu.regs[1], bench.cpu.regs[2], bench.cpu.regs[6]) = (3, 0xe9, 0x2_0000);
        for byte in b"abc" {
            let exit = Exit::Io { port: 0xe9, size: 1, write: Some(*byte as u32) };
            assert_eq!(bench.cpu.run(), RunEnd::Exit(exit));
        }
        assert_eq!((bench.cpu.regs[1], bench.cpu.regs[6], bench.cpu.rip), (0, 0x2_0003, CODE + 2));
    }

    #[test]
    fn test_rep_insw_stores_what_user_space_gives() {
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0xf3, 0x66, 0x6d, 0x0f, 0x0b]);
        (bench.cpu.regs[1], bench.cpu.regs[2], bench.cpu.regs[7]) = (2, 0x1f0, 0x2_0000);
        for value in [0x1111, 0x2222] {
            assert_eq!(bench.cpu.run(), RunEnd::Exit(Exit::Io { port: 0x1f0, size: 2, write: None }));
            bench.cpu.io.complete(value);
        }
        while bench.cpu.rip < CODE + 3 {
            let _ = bench.cpu.step();
            bench.cpu.io.retire();
        }
        assert_eq!(bench.word(0x2_0000), 0x2222_1111);
    }

    #[test]
    fn test_ins_to_an_unmapped_page_faults_before_the_port_is_read() {
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0x6c]);
        bench.cpu.regs[7] = 0x4000_0000;
        bench.step();
        assert_eq!(bench.cpu.rip, handler(14));
    }
}
