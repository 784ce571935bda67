//! AVX loads and stores of chosen elements: VMASKMOVPx, VPMASKMOVx and the gathers. SDM vol. 2C.
//!
//! They are done here, not by the host, because elements that are not chosen must not be accessed, and
//! because a gather has as many addresses as elements. A gather that faults has loaded the elements
//! before the one that faults, and their mask bits say so: it goes on where it was.

use crate::cpu::access::Int;
use crate::cpu::bind::{Binder, Kind};
use crate::cpu::op::{Handler, Op, LOCK};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, R, ZERO};
use crate::rows;

/// A YMM register's bytes.
type Ymm = [u8; 32];

fn get(cpu: &Cpu, register: u8) -> Ymm {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&cpu.fp.xmm(register.into()).to_le_bytes());
    bytes[16..].copy_from_slice(&cpu.fp.ymm_high(register.into()).to_le_bytes());
    bytes
}

fn set(cpu: &mut Cpu, register: u8, bytes: &Ymm) {
    let (low, high) = bytes.split_at(16);
    cpu.fp.set_xmm(register.into(), low.try_into().map_or(0, u128::from_le_bytes));
    cpu.fp.set_ymm_high(register.into(), high.try_into().map_or(0, u128::from_le_bytes));
}

/// Element `index` is chosen: its sign bit in the mask is set.
fn chosen<T: Int>(mask: &Ymm, index: usize) -> bool {
    mask[(index + 1) * T::SIZE - 1] >> 7 != 0
}

/// The memory operand moved on by `offset` bytes.
fn moved(op: &Op, offset: i64) -> Op {
    Op { disp: op.disp.wrapping_add(offset), ..*op }
}

/// The address of element `index`. The address size is that of the operand's start.
fn linear<T: Int>(cpu: &mut Cpu, op: &Op, index: usize, write: bool) -> R<u64> {
    let offset = cpu.effective_masked(op).wrapping_add((index * T::SIZE) as u64);
    cpu.linear(op.seg(), offset, T::SIZE as u64, write)
}

// ---- VMASKMOV, VPMASKMOV: `imm` is the vector's bytes | the mask's register << 8 ---------------

unsafe fn masked_load<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.avx_available()?;
    let (bytes, mask) = (op.imm as usize & 0xff, get(cpu, (op.imm >> 8) as u8));
    let mut value = [0; 32];
    for index in (0..bytes / T::SIZE).filter(|&index| chosen::<T>(&mask, index)) {
        let at = linear::<T>(cpu, op, index, false)?;
        let element: T = cpu.rd(at, op.seg())?;
        let place = index * T::SIZE;
        value[place..place + T::SIZE].copy_from_slice(&element.to_u64().to_le_bytes()[..T::SIZE]);
    }
    set(cpu, op.dst, &value);
    Ok(())
}

unsafe fn masked_store<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.avx_available()?;
    let (bytes, mask) = (op.imm as usize & 0xff, get(cpu, (op.imm >> 8) as u8));
    let elements = || (0..bytes / T::SIZE).filter(|&index| chosen::<T>(&mask, index));
    for index in elements() {
        let at = linear::<T>(cpu, op, index, true)?;
        cpu.probe_write(at, T::SIZE as u64, op.seg())?;
    }
    let value = get(cpu, op.dst);
    for index in elements() {
        let at = linear::<T>(cpu, op, index, true)?;
        let mut element = [0; 8];
        element[..T::SIZE].copy_from_slice(&value[index * T::SIZE..(index + 1) * T::SIZE]);
        cpu.wr(at, T::from_u64(u64::from_le_bytes(element)), op.seg())?;
    }
    Ok(())
}

/// `op, mask, m` loads; `m, mask, op` stores.
fn bind_masked<T: Int>(b: &mut Binder) -> Option<Handler> {
    let store = b.kind(0) == Kind::Mem;
    let data = b.ins.op_register(if store { 2 } else { 0 });
    b.op.dst = data.number() as u8;
    b.op.imm = data.size() as u64 | (b.ins.op_register(1).number() as u64) << 8;
    let handler: Handler = if store { masked_store::<T> } else { masked_load::<T> };
    (!b.op.has(LOCK)).then_some(handler)
}

// ---- gathers: `dst` is the destination, `src` the mask, `imm` the index | elements << 8 ---------

unsafe fn gather<T: Int, const WIDE_INDEX: bool>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.avx_available()?;
    let (indices, count) = (get(cpu, op.imm as u8), (op.imm >> 8) as usize);
    let (mut value, old) = (get(cpu, op.dst), get(cpu, op.src));
    let mut mask = [0; 32];
    for (index, element) in mask.chunks_mut(T::SIZE).enumerate().take(count) {
        element.fill(if chosen::<T>(&old, index) { 0xff } else { 0 });
    }
    let mut result = Ok(());
    for index in 0..count {
        let place = index * T::SIZE..(index + 1) * T::SIZE;
        if mask[place.start] != 0 {
            match element::<T, WIDE_INDEX>(cpu, op, &indices, index) {
                Ok(element) => value[place.clone()].copy_from_slice(&element.to_u64().to_le_bytes()[..T::SIZE]),
                Err(stop) => {
                    result = Err(stop);
                    break;
                }
            }
            mask[place].fill(0);
        }
    }
    value[count * T::SIZE..].fill(0);
    set(cpu, op.dst, &value);
    set(cpu, op.src, &mask);
    result
}

fn element<T: Int, const WIDE_INDEX: bool>(cpu: &mut Cpu, op: &Op, indices: &Ymm, index: usize) -> R<T> {
    let size = if WIDE_INDEX { 8 } else { 4 };
    let mut raw = [0; 8];
    raw[..size].copy_from_slice(&indices[index * size..(index + 1) * size]);
    let raw = i64::from_le_bytes(raw);
    let offset = if WIDE_INDEX { raw } else { raw as i32 as i64 } << (op.scale_seg & 3);
    let at = cpu.lin(&moved(op, offset), T::SIZE as u64, false)?;
    cpu.rd(at, op.seg())
}

fn bind_gather<T: Int, const WIDE_INDEX: bool>(b: &mut Binder) -> Option<Handler> {
    let (to, mask, index) = (b.ins.op_register(0), b.ins.op_register(2), b.ins.memory_index());
    let distinct = to.number() != mask.number() && to.number() != index.number() && mask.number() != index.number();
    if !distinct || b.op.has(LOCK) {
        return None;
    }
    let count = (to.size() / T::SIZE).min(index.size() / if WIDE_INDEX { 8 } else { 4 });
    (b.op.dst, b.op.src, b.op.index) = (to.number() as u8, mask.number() as u8, ZERO);
    b.op.imm = index.number() as u64 | (count as u64) << 8;
    Some(gather::<T, WIDE_INDEX>)
}

/// Rows of the opcode table; those of the thunks are added by `table.rs`.
pub const ROWS: &[Row] = rows! {
    Simd "SDM vol. 2C, VMASKMOV, VPMASKMOV" {
        Vmaskmovps => bind_masked::<u32>, Vmaskmovpd => bind_masked::<u64>,
        Vpmaskmovd => bind_masked::<u32>, Vpmaskmovq => bind_masked::<u64>,
    }
    Simd "SDM vol. 2C, VGATHER, VPGATHER" {
        Vgatherdps => bind_gather::<u32, false>, Vgatherdpd => bind_gather::<u64, false>,
        Vgatherqps => bind_gather::<u32, true>, Vgatherqpd => bind_gather::<u64, true>,
        Vpgatherdd => bind_gather::<u32, false>, Vpgatherdq => bind_gather::<u64, false>,
        Vpgatherqd => bind_gather::<u32, true>, Vpgatherqq => bind_gather::<u64, true>,
    }
};
