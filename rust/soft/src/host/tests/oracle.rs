//! The host as oracle: runs one unchanged instruction with a whole register state loaded, so that
//! nothing of the thunks' register placement is shared with what it judges.

use crate::host::execmem::CodeWriter;
use crate::host::fpstate::{FpState, YMM_HIGH};
use crate::host::vex::host_has_all;

/// GPRs in x86 order (RSP is not loaded), then RFLAGS.
pub type Registers = [u64; 17];

/// An instruction between code that loads and stores everything.
pub struct Oracle {
    writer: CodeWriter,
    latest: Option<(Vec<u8>, std::ptr::NonNull<u8>)>,
}

const LOADED: [u8; 14] = [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Oracle {
    pub fn new() -> Self {
        Self { writer: CodeWriter::new(32 << 20).expect("code memory"), latest: None }
    }

    /// Runs `instruction`; the caller makes its memory operand valid and its exceptions masked.
    pub fn run(&mut self, instruction: &[u8], registers: &mut Registers, fp: &mut FpState) {
        let known = self.latest.take().filter(|(bytes, _)| bytes == instruction);
        let address = match known {
            Some((_, address)) => address,
            None => self.writer.push(&frame(instruction)).expect("room for the sweep"),
        };
        self.latest = Some((instruction.to_vec(), address));
        // SAFETY: `frame` preserves what the ABI demands and touches the two operands, the stack and
        // the instruction's own memory operand only.
        unsafe {
            let function: unsafe extern "sysv64" fn(*mut u64, *mut FpState) = std::mem::transmute(address);
            function(registers.as_mut_ptr(), fp);
        }
    }
}

fn frame(instruction: &[u8]) -> Vec<u8> {
    let mut code = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]; // push rbx..r15
    code.extend([0x48, 0x83, 0xEC, 0x08, 0x0F, 0xAE, 0x1C, 0x24]); // sub rsp, 8; stmxcsr [rsp]
    code.extend([0x57, 0x56, 0x48, 0x0F, 0xAE, 0x0E]); // push rdi; push rsi; fxrstor64 [rsi]
    let upper_halves = |code: &mut Vec<u8>, opcode: u8| {
        (0..16).filter(|_| host_has_all()).for_each(|register| upper_half(code, opcode, register));
    };
    upper_halves(&mut code, 0x18);
    code.extend([0xFF, 0xB7, 0x80, 0, 0, 0, 0x9D]); // push [rdi+128]; popfq
    LOADED.iter().for_each(|&r| gpr(&mut code, 0x8B, r));
    gpr(&mut code, 0x8B, 7);
    code.extend(instruction);
    code.extend([0x57, 0x48, 0x8B, 0x7C, 0x24, 0x10]); // push rdi; mov rdi, [rsp+16]
    LOADED.iter().for_each(|&r| gpr(&mut code, 0x89, r));
    code.extend([0x9C, 0x58, 0x48, 0x89, 0x87, 0x80, 0, 0, 0]); // pushfq; pop rax; mov [rdi+128], rax
    code.extend([0x58, 0x48, 0x89, 0x47, 0x38]); // pop rax; mov [rdi+56], rax
    code.extend([0x5E, 0x5F, 0x48, 0x0F, 0xAE, 0x06, 0xDB, 0xE3]); // pop rsi; pop rdi; fxsave64; fninit
    upper_halves(&mut code, 0x19);
    if host_has_all() {
        code.extend([0xC5, 0xF8, 0x77]); // vzeroupper
    }
    code.extend([0x0F, 0xAE, 0x14, 0x24, 0x48, 0x83, 0xC4, 0x08]); // ldmxcsr [rsp]; add rsp, 8
    code.extend([0x41, 0x5F, 0x41, 0x5E, 0x41, 0x5D, 0x41, 0x5C, 0x5D, 0x5B, 0xC3]); // pop r15..rbx; ret
    code
}

/// VINSERTF128 (18) or VEXTRACTF128 (19) of a register's upper half and `[rsi + YMM_HIGH + ..]`.
fn upper_half(code: &mut Vec<u8>, opcode: u8, register: u8) {
    let source = if opcode == 0x18 { !register & 15 } else { 15 };
    code.extend([0xC4, if register >= 8 { 0x63 } else { 0xE3 }, source << 3 | 5, opcode, 0x86 | (register & 7) << 3]);
    code.extend((YMM_HIGH as u32 + 16 * u32::from(register)).to_le_bytes());
    code.push(1);
}

/// `opcode register, [rdi + 8 * register]`.
fn gpr(code: &mut Vec<u8>, opcode: u8, register: u8) {
    let rex = if register >= 8 { 0x4C } else { 0x48 };
    code.extend([rex, opcode, 0x47 | (register & 7) << 3, register * 8]);
}
