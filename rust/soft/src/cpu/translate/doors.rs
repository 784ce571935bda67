//! The doors of the vector registers: what puts the guest's into the host's, and back into the `Cpu`.

use super::asm::{cc, cell, group, Label, Rm, Vex};
use super::layout::{field, host::*};
use super::stubs::Builder;
use super::vector::open;
use crate::cpu::state::{cr0, cr4};
use crate::host::fpstate::{MXCSR, XMM, YMM_HIGH};
use crate::host::xsave::{AVX, SSE};

impl Builder {
    /// Vector registers to the `Cpu`, the host's MXCSR back. Changes RAX.
    pub(super) fn closing(&mut self) {
        self.align();
        self.asm.place(self.close);
        self.asm.load(RAX, cell(field::FP));
        for index in 0..16 {
            // movaps [rax + XMM + 16 * index], xmm
            self.asm.modrm(&[], false, false, &[0x0f, 0x29], index, Rm::Mem(RAX, (XMM + 16 * index as usize) as i32));
        }
        self.close_ymm();
        let done = self.asm.label();
        self.asm.cmp_byte(cell(field::MXCSR_CLOSED), 0);
        self.asm.jump_if(cc::NE, done);
        self.asm.modrm(&[], false, false, &[0x0f, 0xae], 3, Rm::Mem(RAX, MXCSR as i32)); // stmxcsr
        self.asm.bytes(&[0x0f, 0xae, 0x15]); // ldmxcsr [rip + displacement]: the region's first word
        let displacement = -(self.asm.here() as i32 + 4);
        self.asm.bytes(&displacement.to_le_bytes());
        self.asm.place(done);
        self.asm.modrm(&[0x66], false, false, &[0xc7], 0, cell(field::XMM_CLOSED));
        self.asm.bytes(&[1, 1]);
        self.ret();
    }

    /// RAX is the vector state's address. Upper halves left in use would slow down SSE instructions.
    fn close_ymm(&mut self) {
        let closed = self.asm.label();
        self.asm.cmp_byte(cell(field::YMM_CLOSED), 0);
        self.asm.jump_if(cc::NE, closed);
        for index in 0..16 {
            let half = Rm::Mem(RAX, (YMM_HIGH + 16 * index as usize) as i32);
            self.asm.vex(&Vex { map: 3, prefix: 1, long: true, wide: false, opcode: 0x19 }, index, 0, half); // vextractf128
            self.asm.bytes(&[1]);
        }
        self.asm.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
        self.asm.store_imm(1, cell(field::YMM_CLOSED), 1);
        self.asm.place(closed);
    }

    /// RAX is the vector state's address.
    fn open_ymm(&mut self) {
        let open = self.asm.label();
        self.asm.cmp_byte(cell(field::YMM_CLOSED), 0);
        self.asm.jump_if(cc::E, open);
        for index in 0..16 {
            let half = Rm::Mem(RAX, (YMM_HIGH + 16 * index as usize) as i32);
            let insert = Vex { map: 3, prefix: 1, long: true, wide: false, opcode: 0x18 };
            self.asm.vex(&insert, index, index, half); // vinsertf128
            self.asm.bytes(&[1]);
        }
        self.asm.store_imm(1, cell(field::YMM_CLOSED), 0);
        self.asm.place(open);
    }

    /// The doors. They change RAX and RCX, and keep the flags.
    pub(super) fn opening(&mut self) -> [usize; 4] {
        [0, 1, 2, 3].map(|door| {
            let start = self.align();
            self.asm.place(self.open[door]);
            let (done, no) = (self.asm.label(), self.asm.label());
            self.asm.bytes(&[0x9c]); // pushfq
            self.asm.load_imm(RCX, 1);
            self.test(field::CR0, (cr0::EM | cr0::TS) as u32);
            self.asm.jump_if(cc::NE, no);
            self.test(field::CR4, cr4::OSFXSR as u32);
            self.asm.jump_if(cc::E, no);
            let wanted = open::DOORS[door];
            if wanted & open::YMM != 0 {
                self.test(field::CR4, cr4::OSXSAVE as u32);
                self.asm.jump_if(cc::E, no);
                self.asm.load32(RAX, cell(field::XCR0));
                self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), (SSE | AVX) as i32);
                self.asm.alu_imm(false, group::CMP, Rm::Reg(RAX), (SSE | AVX) as i32);
                self.asm.jump_if(cc::NE, no);
            }
            self.open_xmm();
            if wanted & open::YMM != 0 {
                self.open_ymm();
            }
            if wanted & open::MXCSR != 0 {
                self.open_mxcsr(done, no);
            }
            self.asm.place(done);
            self.asm.alu(false, group::XOR, RCX, Rm::Reg(RCX));
            self.asm.place(no);
            self.asm.bytes(&[0x9d]); // popfq
            self.ret();
            start
        })
    }

    fn test(&mut self, at: i32, mask: u32) {
        self.asm.modrm(&[], false, false, &[0xf7], 0, cell(at));
        self.asm.bytes(&mask.to_le_bytes());
    }

    fn open_xmm(&mut self) {
        let open = self.asm.label();
        self.asm.load(RAX, cell(field::FP));
        self.asm.cmp_byte(cell(field::XMM_CLOSED), 0);
        self.asm.jump_if(cc::E, open);
        for index in 0..16 {
            self.asm.modrm(&[], false, false, &[0x0f, 0x28], index, Rm::Mem(RAX, (XMM + 16 * index as usize) as i32));
        }
        self.asm.store_imm(1, cell(field::XMM_CLOSED), 0);
        self.asm.place(open);
    }

    /// RAX is the vector state's address. Every exception must be masked.
    fn open_mxcsr(&mut self, done: Label, no: Label) {
        self.asm.cmp_byte(cell(field::MXCSR_CLOSED), 0);
        self.asm.jump_if(cc::E, done);
        self.asm.load32(RCX, Rm::Mem(RAX, MXCSR as i32));
        // ECX becomes nonzero where a mask bit is clear.
        self.asm.modrm(&[], false, false, &[0xf7], 2, Rm::Reg(RCX)); // not ecx
        self.asm.alu_imm(false, group::AND, Rm::Reg(RCX), 0x1f80);
        self.asm.jump_if(cc::NE, no);
        self.asm.modrm(&[], false, false, &[0x0f, 0xae], 2, Rm::Mem(RAX, MXCSR as i32)); // ldmxcsr
        self.asm.store_imm(1, cell(field::MXCSR_CLOSED), 0);
    }
}
