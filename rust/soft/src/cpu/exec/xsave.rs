//! XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS: the checks and memory accesses around the
//! images of `host::xsave`. SDM vol. 1, 13.7-13.12.
//!
//! The write of an image probes its last byte first and its parts as they come; guests keep their
//! areas within mapped memory, and a fault between parts only leaves an image that will be rewritten.

use crate::cpu::bind::{Binder, Kind};
use crate::cpu::op::{Handler, Op, LOCK, OP64};
use crate::cpu::state::{cr0, cr4, CodeSize};
use crate::cpu::table::Row;
use crate::cpu::{vector, Cpu, R};
use crate::host::fxsave::Format;
use crate::host::xsave::{area_bytes, restore_bytes, xrstor, xsave, Restore, Save};
use crate::rows;

/// Room for x87, SSE and AVX in either format.
const AREA: usize = 1024;
const HEADER: u64 = 512;
const HEADER_BYTES: usize = 64;

/// Save kinds as const parameters: 0 XSAVE, 1 XSAVEOPT, 2 XSAVEC, 3 XSAVES.
const SUPERVISOR: u8 = 3;

fn format(cpu: &Cpu, op: &Op) -> Format {
    Format { wide_pointers: op.has(OP64), sixteen_registers: cpu.code_size == CodeSize::B64 }
}

/// EDX:EAX.
fn requested(cpu: &Cpu) -> u64 {
    cpu.regs[2] << 32 | cpu.regs[0] & 0xffff_ffff
}

fn checks(cpu: &mut Cpu, op: &Op, supervisor: bool, size: usize, write: bool) -> R<u64> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(vector::NM, None));
    }
    if supervisor && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let linear = cpu.lin(op, size as u64, write)?;
    if linear & 63 != 0 {
        return Err(cpu.gp(0));
    }
    Ok(linear)
}

unsafe fn save<const KIND: u8>(cpu: &mut Cpu, op: &Op) -> R {
    let linear = checks(cpu, op, KIND == SUPERVISOR, HEADER as usize + HEADER_BYTES, true)?;
    let enabled = cpu.xcr0 | if KIND == SUPERVISOR { cpu.msr.xss } else { 0 };
    let wanted = requested(cpu) & enabled;
    let kind = [Save::Plain, Save::Optimized, Save::Compacted, Save::Compacted][KIND as usize];
    let mut image = [0u8; AREA];
    let segment = op.seg();
    let last = area_bytes(wanted, kind == Save::Compacted) as u64 - 1;
    cpu.probe_write(linear.wrapping_add(last), 1, segment)?;
    cpu.probe_write(linear, HEADER + 16, segment)?;
    cpu.rd_bytes(linear.wrapping_add(HEADER), &mut image[HEADER as usize..HEADER as usize + 16], segment)?;
    let format = format(cpu, op);
    let written = xsave(&cpu.fp, &mut image, wanted, format, kind);
    for part in written.parts() {
        cpu.wr_bytes(linear.wrapping_add(part.start as u64), &image[part.clone()], segment)?;
    }
    Ok(())
}

unsafe fn restore<const SUPERVISOR: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let linear = checks(cpu, op, SUPERVISOR, HEADER as usize + HEADER_BYTES, false)?;
    let enabled = cpu.xcr0 | if SUPERVISOR { cpu.msr.xss } else { 0 };
    let wanted = requested(cpu);
    let segment = op.seg();
    let mut image = [0u8; AREA];
    let header = HEADER as usize..HEADER as usize + HEADER_BYTES;
    cpu.rd_bytes(linear, &mut image[..header.end], segment)?;
    let bytes = restore_bytes(&image[header.clone()], wanted & enabled).min(AREA);
    if bytes > header.end {
        cpu.rd_bytes(linear.wrapping_add(header.end as u64), &mut image[header.end..bytes], segment)?;
    }
    let kind = if SUPERVISOR { Restore::Supervisor } else { Restore::User };
    let format = format(cpu, op);
    match xrstor(&mut cpu.fp, &image, wanted, enabled, format, kind) {
        Ok(()) => Ok(()),
        Err(_) => Err(cpu.gp(0)),
    }
}

fn bind(b: &mut Binder, handler: Handler, wide: bool) -> Option<Handler> {
    if b.kind(0) != Kind::Mem || b.op.has(LOCK) {
        return None;
    }
    b.op.flags |= if wide { OP64 } else { 0 };
    Some(handler)
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 1, 13: XSAVE family" {
        Xsave => |b| bind(b, save::<0>, false), Xsave64 => |b| bind(b, save::<0>, true),
        Xsaveopt => |b| bind(b, save::<1>, false), Xsaveopt64 => |b| bind(b, save::<1>, true),
        Xsavec => |b| bind(b, save::<2>, false), Xsavec64 => |b| bind(b, save::<2>, true),
        Xrstor => |b| bind(b, restore::<false>, false), Xrstor64 => |b| bind(b, restore::<false>, true),
    }
    System "SDM vol. 1, 13: XSAVES, XRSTORS" {
        Xsaves => |b| bind(b, save::<SUPERVISOR>, false), Xsaves64 => |b| bind(b, save::<SUPERVISOR>, true),
        Xrstors => |b| bind(b, restore::<true>, false), Xrstors64 => |b| bind(b, restore::<true>, true),
    }
};
