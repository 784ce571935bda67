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
