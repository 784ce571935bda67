//! Two- and one-operand integer arithmetic. SDM vol. 2, ADD ADC AND CMP DEC INC NEG NOT OR SBB SUB
//! TEST XOR.

use crate::cpu::alu::*;
use crate::cpu::bind::{Binder, Kind};
use crate::cpu::op::{Handler, Op, LOCK};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, R};
use crate::{rows, sized};

unsafe fn rr<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op) -> R {
    let r = O::run(cpu.reg::<T>(op.dst), cpu.reg(op.src), &mut cpu.flags);
    if O::STORES {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

unsafe fn ri<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op) -> R {
    let r = O::run(cpu.reg::<T>(op.dst), T::from_u64(op.imm), &mut cpu.flags);
    if O::STORES {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

unsafe fn rm<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op) -> R {
    let b: T = cpu.rd_op(op)?;
    let r = O::run(cpu.reg::<T>(op.dst), b, &mut cpu.flags);
    if O::STORES {
        cpu.set_reg(op.dst, r);
    }
    Ok(())
}

#[inline(always)]
fn memory2<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op, b: T) -> R {
    let linear = cpu.lin(op, T::SIZE as u64, O::STORES)?;
    if !O::STORES {
        let a: T = cpu.rd(linear, op.seg())?;
        O::run(a, b, &mut cpu.flags);
        return Ok(());
    }
    cpu.rmw(linear, op.seg(), |cpu, a: T| O::run(a, b, &mut cpu.flags))
}

unsafe fn mr<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op) -> R {
    let b: T = cpu.reg(op.src);
    memory2::<T, O>(cpu, op, b)
}

unsafe fn mi<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op) -> R {
    memory2::<T, O>(cpu, op, T::from_u64(op.imm))
}

unsafe fn locked_mr<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op) -> R {
    let b: T = cpu.reg(op.src);
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    cpu.atomic_rmw(linear, op.seg(), |a: T, flags| O::run(a, b, flags)).map(|_| ())
}

unsafe fn locked_mi<T: AluInt, O: Alu2>(cpu: &mut Cpu, op: &Op) -> R {
    let b = T::from_u64(op.imm);
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    cpu.atomic_rmw(linear, op.seg(), |a: T, flags| O::run(a, b, flags)).map(|_| ())
}

fn bind2<O: Alu2>(b: &mut Binder) -> Option<Handler> {
    let width = b.width(0);
    let locked = b.op.has(LOCK);
    match (b.kind(0), b.kind(1)) {
        (Kind::Mem, Kind::Reg) if locked && O::LOCKABLE => sized!(width, locked_mr, O),
        (Kind::Mem, Kind::Imm) if locked && O::LOCKABLE => sized!(width, locked_mi, O),
        _ if locked => None,
        (Kind::Reg, Kind::Reg) => sized!(width, rr, O),
        (Kind::Reg, Kind::Imm) => sized!(width, ri, O),
        (Kind::Reg, Kind::Mem) => sized!(width, rm, O),
        (Kind::Mem, Kind::Reg) => sized!(width, mr, O),
        (Kind::Mem, Kind::Imm) => sized!(width, mi, O),
        _ => None,
    }
}

unsafe fn r1<T: AluInt, O: Alu1>(cpu: &mut Cpu, op: &Op) -> R {
    let r = O::run(cpu.reg::<T>(op.dst), &mut cpu.flags);
    cpu.set_reg(op.dst, r);
    Ok(())
}

unsafe fn m1<T: AluInt, O: Alu1>(cpu: &mut Cpu, op: &Op) -> R {
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    cpu.rmw(linear, op.seg(), |cpu, a: T| O::run(a, &mut cpu.flags))
}

unsafe fn locked_m1<T: AluInt, O: Alu1>(cpu: &mut Cpu, op: &Op) -> R {
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    cpu.atomic_rmw(linear, op.seg(), |a: T, flags| O::run(a, flags)).map(|_| ())
}

fn bind1<O: Alu1>(b: &mut Binder) -> Option<Handler> {
    let width = b.width(0);
    match (b.kind(0), b.op.has(LOCK)) {
        (Kind::Reg, false) => sized!(width, r1, O),
        (Kind::Mem, false) => sized!(width, m1, O),
        (Kind::Mem, true) => sized!(width, locked_m1, O),
        _ => None,
    }
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 2A-2B, general-purpose arithmetic" {
        Add => bind2::<Add>, Or => bind2::<Or>, Adc => bind2::<Adc>, Sbb => bind2::<Sbb>,
        And => bind2::<And>, Sub => bind2::<Sub>, Xor => bind2::<Xor>, Cmp => bind2::<Cmp>,
        Test => bind2::<Test>,
        Inc => bind1::<Inc>, Dec => bind1::<Dec>, Neg => bind1::<Neg>, Not => bind1::<Not>,
    }
};
