//! Decoded blocks: found by physical address (as the slot's host address) and code size, so they survive CR3 writes, fork and
//! exec (engine brief, sections 2 and 3); valid while their page's generation stands (`mem`).
//!
//! A block is a straight run of at most 32 instructions within one page, ended by an instruction
//! that may transfer control or by a sentinel. An instruction that straddles two pages is a block
//! of its own that also records the second page. Three ways lead to a block, the faster first:
//! links from its predecessor within the page, the jump cache by RIP and context, the map by
//! physical address.

use super::bind::{bind, Thunks};
use super::mmu::canonical;
use super::op::Op;
use super::state::{seg, CodeSize};
use super::translate::Translation;
use super::{attention, Cpu, Exit, Stop, R};
use crate::host::table::Table;
use crate::mem::{granules, note_store, PAGE_SIZE};
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// Most instructions in a block.
const MAX_OPS: usize = 32;
/// Most bytes in a block, so that offsets fit `Op::end`.
pub(crate) const MAX_BYTES: usize = 240;
/// Longest x86 instruction.
const MAX_INSTRUCTION: usize = 15;
/// Entries of the jump cache.
const JUMPS: usize = 4096;
/// Operations per arena chunk.
const CHUNK_OPS: usize = 32 * 1024;
/// Bound on all operations cached, in chunks of a MiB, without a translator. Beyond it everything is dropped and
/// decoded anew.
const MAX_CHUNKS: usize = 24;

/// A successor within the same page: RIP relative to this block's start, and the block there.
#[derive(Clone, Copy)]
pub(crate) struct Link {
    pub delta: u64,
    pub block: *mut Block,
}

/// No successor yet. Near branches reach 2 GiB, so no RIP is this far from its block's start.
const NO_LINK: Link = Link { delta: 1 << 63, block: std::ptr::null_mut() };

/// A decoded block.
pub(crate) struct Block {
    /// The operations, then a sentinel.
    pub ops: *mut Op,
    /// Number of instructions.
    pub count: u32,
    /// The page's generation that it was decoded under.
    generation: u32,
    word: *const AtomicU64,
    /// Host address of its first byte.
    pub host: *const u8,
    /// Its translation.
    pub code: Translation,
    /// Executions of that until it is time for a trace.
    pub heat: i32,
    /// Ends in a near direct branch or falls through: successors may be linked.
    pub linkable: bool,
    pub bytes: u8,
    /// As `linkable`, but it may straddle.
    pub joins: bool,
    /// Host address of the second page's first byte, its word and generation, when it straddles.
    pub second: Option<(*const u8, *const AtomicU64, u32)>,
    pub links: [Link; 2],
}

impl Block {
    /// Its one instruction goes on in the next page.
    pub fn straddles(&self) -> bool {
        self.second.is_some()
    }

    /// The second page's generation stands, if there is one.
    pub fn second_valid(&self) -> bool {
        // SAFETY: as valid().
        self.second.is_none_or(|(_, word, generation)| unsafe { (*word).load(Relaxed) >> 32 == generation as u64 })
    }

    /// Its page's word, and the generation it was decoded under.
    pub fn stamp(&self) -> (*const AtomicU64, u32) {
        (self.word, self.generation)
    }

    #[inline(always)]
    pub fn valid(&self) -> bool {
        // SAFETY: the word belongs to a slot of the map the Cpu holds; blocks are dropped with it.
        unsafe { (*self.word).load(Relaxed) >> 32 == self.generation as u64 }
    }
}

#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    context: u64,
    block: *mut Block,
}

/// Multiplicative hashing of physical addresses; they need no protection against collisions made on
/// purpose, as the cache is bounded and private to a vCPU.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte as u64);
        }
    }
    fn write_u64(&mut self, key: u64) {
        self.0 = (self.0 ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

/// A jump cache that leads nowhere: no context is zero, as no address space number is.
fn no_jumps() -> Table<Jump> {
    // SAFETY: it is numbers and a pointer that is not followed before the context is the right one.
    unsafe { Table::always(JUMPS) }
}

/// Operations of blocks, which do not move. Memory of its own: it takes what was put into it, and goes when it does.
struct Chunk {
    ops: Table<MaybeUninit<Op>>,
    used: usize,
}

impl Chunk {
    fn new() -> Self {
        // SAFETY: any bytes will do.
        Self { ops: unsafe { Table::always(CHUNK_OPS) }, used: 0 }
    }

    /// Puts operations behind those there are; `None` where there is no room.
    fn put(&mut self, ops: &[Op]) -> Option<*mut Op> {
        let room = self.ops.get_mut(self.used..self.used + ops.len())?;
        for (to, &op) in room.iter_mut().zip(ops) {
            to.write(op);
        }
        self.used += ops.len();
        Some(room.as_mut_ptr().cast())
    }
}

/// All blocks of a vCPU.
pub struct Blocks {
    chunks: Vec<Chunk>,
    map: HashMap<u64, Box<Block>, BuildHasherDefault<KeyHasher>>,
    /// Blocks replaced while still linked to; kept until the cache is dropped.
    #[allow(clippy::vec_box, reason = "links point to the blocks: they must not move")]
    retired: Vec<Box<Block>>,
    jumps: Table<Jump>,
    /// The block in execution, so that a store into it can cut it short.
    pub(crate) current: *mut Block,
    pub(crate) thunks: Thunks,
    pub(crate) max_chunks: usize,
    /// Blocks decoded so far.
    pub decoded: u64,
    /// How often everything was dropped: pointers from before are void.
    pub(crate) clears: u64,
}

impl Default for Blocks {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            map: HashMap::default(),
            retired: Vec::new(),
            jumps: no_jumps(),
            current: std::ptr::null_mut(),
            thunks: Thunks::default(),
            max_chunks: MAX_CHUNKS,
            decoded: 0,
            clears: 0,
        }
    }
}

impl Blocks {
    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.chunks.clear();
        self.map.clear();
        self.retired.clear();
        self.thunks.clear();
        self.jumps.reset();
        self.current = std::ptr::null_mut();
        self.clears += 1;
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// Drops everything and keeps no memory for more.
    pub(crate) fn release(&mut self) {
        self.clear();
        self.chunks = Vec::new();
        self.map = HashMap::default();
        self.retired = Vec::new();
        self.thunks = Thunks::default();
    }

    /// The block with this key, if it is known and valid.
    pub(crate) fn at(&mut self, key: u64) -> Option<*mut Block> {
        let block = self.map.get_mut(&key)?;
        block.valid().then_some(&raw mut **block)
    }

    /// Moves operations into the arena.
    fn store(&mut self, ops: &[Op]) -> *mut Op {
        if let Some(at) = self.chunks.last_mut().and_then(|chunk| chunk.put(ops)) {
            return at;
        }
        let mut chunk = Chunk::new();
        let Some(at) = chunk.put(ops) else { unreachable!("a block is far shorter than a chunk") };
        self.chunks.push(chunk);
        at
    }
}

/// The sentinel: control falls through to the next instruction.
unsafe fn fall_through(cpu: &mut Cpu, op: &Op) -> R {
    cpu.rip = cpu.regs[17].wrapping_add(op.end as u64);
    if cpu.legacy {
        cpu.rip &= 0xffff_ffff;
    }
    Err(Stop::Branch)
}

/// Whether the decoder gave up because 15 bytes did not suffice, which it calls an invalid instruction too.
fn too_long(bits: u32, bytes: &[u8]) -> bool {
    let Some(short) = bytes.get(..MAX_INSTRUCTION - 1).filter(|_| bytes.len() >= MAX_INSTRUCTION) else { return false };
    let mut decoder = Decoder::new(bits, short, DecoderOptions::NONE);
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
}

/// An instruction of more than 15 bytes: #GP(0). SDM vol. 2, 2.3.11.
unsafe fn longer_than_15(cpu: &mut Cpu, _: &Op) -> R {
    Err(cpu.gp(0))
}

/// What a stale block's operations become: leave before executing this one.
unsafe fn cut(_: &mut Cpu, _: &Op) -> R {
    Err(Stop::Again)
}

/// Stands for the code size in the keys of such blocks.
const NEAR_THE_HOLE: u64 = 3;

/// How far around the addresses that are not canonical direct branches could lead there.
const MARGIN: u64 = 1 << 32;

/// Whether an address is so near to them.
pub(crate) fn near_the_hole(linear: u64) -> bool {
    !(canonical(linear.wrapping_add(MARGIN)) && canonical(linear.wrapping_sub(MARGIN)))
}

#[inline(always)]
fn jump_index(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & (JUMPS - 1)
}

/// Instructions after which the block must be left although they do not branch.
fn ends_block(ins: &Instruction) -> bool {
    match ins.flow_control() {
        FlowControl::Next => {
            matches!(ins.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq | Mnemonic::Hlt)
        }
        _ => true,
    }
}

/// Whether execution can only go on to the next instruction or a fixed near target.
fn links(ins: &Instruction) -> bool {
    matches!(
        ins.flow_control(),
        FlowControl::Next | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call
    ) && !ins.is_jmp_far()
        && !ins.is_call_far()
        && !matches!(ins.code(), Code::Syscall | Code::Sysenter | Code::Vmcall | Code::Vmmcall)
        && !ends_block_without_branch(ins)
}

fn ends_block_without_branch(ins: &Instruction) -> bool {
    ins.flow_control() == FlowControl::Next && ends_block(ins)
}

impl Cpu {
    /// What, beside RIP, decides which code an address holds.
    #[inline(always)]
    pub(crate) fn context(&self) -> u64 {
        self.asid | (self.tlb.mode as u64) << 12 | (self.code_size as u64) << 14 | self.exec_epoch << 16
    }

    /// The block at RIP.
    #[inline(always)]
    pub(crate) fn find_block(&mut self) -> R<*mut Block> {
        let context = self.context();
        let linear = self.rip.wrapping_add(self.seg_base[seg::CS]);
        let jump = &self.blocks.jumps[jump_index(linear)];
        // SAFETY: jump cache entries point to blocks of the map; both are cleared together.
        if jump.linear == linear && jump.context == context && unsafe { (*jump.block).valid() } {
            return Ok(jump.block);
        }
        self.find_block_slow(context)
    }

    #[inline(never)]
    fn find_block_slow(&mut self, context: u64) -> R<*mut Block> {
        let linear = self.code_linear(self.rip, 1)?;
        let host = self.fetch(linear)?;
        let key = self.key(host);
        let known = self.blocks.map.get_mut(&key).map(|block| &mut **block as *mut Block);
        let block = match known {
            // SAFETY: the map owns the block.
            Some(block) if unsafe { (*block).valid() } && self.second_page_stands(unsafe { &*block }, linear)? => block,
            _ => self.decode_block(linear)?,
        };
        // SAFETY: as above.
        let (straddles, bytes) = unsafe { ((*block).straddles(), (*block).bytes) };
        if self.legacy {
            self.code_linear(self.rip, bytes as u64)?;
        }
        if !straddles {
            let linear = self.rip.wrapping_add(self.seg_base[seg::CS]);
            self.note_code(linear);
            self.blocks.jumps[jump_index(linear)] = Jump { linear, context, block };
        }
        Ok(block)
    }

    /// The linear address of code at offset `rip`; #GP(0) beyond the limit or not canonical.
    fn code_linear(&mut self, rip: u64, size: u64) -> R<u64> {
        if !self.legacy {
            if !canonical(rip) {
                return Err(self.gp(0));
            }
            return Ok(rip);
        }
        let cs = self.segs[seg::CS];
        if rip + size - 1 > cs.limit as u64 {
            return Err(self.gp(0));
        }
        Ok((cs.base + rip) & 0xffff_ffff)
    }

    /// What a block is found by: a slot's host address stands for the physical one, as all blocks go
    /// when the slots change. Pages that are near the addresses that are not canonical have blocks of their own.
    pub(crate) fn key(&self, host: *const u8) -> u64 {
        let kind = match self.code_size {
            CodeSize::B64 if near_the_hole(self.rip) => NEAR_THE_HOLE,
            size => size as u64,
        };
        (host as u64) << 2 | kind
    }

    /// Host address of code, through the execute tag.
    fn fetch(&mut self, linear: u64) -> R<*const u8> {
        match self.fetch_page(linear)? {
            Some(host) => Ok(host),
            None => Err(self.fetch_outside()),
        }
    }

    /// Physical and host address of code that is about to be decoded.
    fn locate(&mut self, linear: u64) -> R<(u64, *const u8)> {
        match self.fetch_walk(linear)? {
            (gpa, Some(host)) => Ok((gpa, host)),
            (_, None) => Err(self.fetch_outside()),
        }
    }

    #[cold]
    fn fetch_outside(&mut self) -> Stop {
        self.exit = Some(Exit::Internal("instruction fetch from an address that is not RAM"));
        Stop::Exit
    }

    fn second_page_stands(&mut self, block: &Block, linear: u64) -> R<bool> {
        let Some((page, word, generation)) = block.second else { return Ok(true) };
        let now = self.fetch((linear & !0xfff).wrapping_add(PAGE_SIZE))?;
        // SAFETY: as Block::valid.
        Ok(now == page && unsafe { (*word).load(Relaxed) >> 32 == generation as u64 })
    }

    /// Decodes at most `limit` instructions from `bytes`.
    fn decode(&mut self, bytes: &[u8], limit: usize, ops: &mut Vec<Op>) -> (usize, bool, DecoderError) {
        let bits = match self.code_size {
            CodeSize::B16 => 16,
            CodeSize::B32 => 32,
            CodeSize::B64 => 64,
        };
        let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
        let mut ins = Instruction::default();
        let (mut end, mut linkable, mut error) = (0, true, DecoderError::None);
        while ops.len() < limit && end < bytes.len() {
            decoder.decode_out(&mut ins);
            error = decoder.last_error();
            if error == DecoderError::NoMoreBytes || end + ins.len() > MAX_BYTES {
                break;
            }
            let start = end;
            end += ins.len();
            let mut op = bind(&ins, &bytes[start..end], self.code_size, &mut self.blocks.thunks);
            if error == DecoderError::InvalidInstruction && too_long(bits, &bytes[start..]) {
                op.f = longer_than_15;
            }
            op.end = end as u8;
            ops.push(op);
            if error != DecoderError::None || ends_block(&ins) {
                linkable = error == DecoderError::None && links(&ins);
                break;
            }
        }
        (end, linkable, error)
    }

    /// Marks code on a page before it is trusted; gives the page's word and generation.
    fn mark_code(&mut self, gpa: u64, host: *const u8, size: usize) -> (*const AtomicU64, u32) {
        let Some(slot) = self.slots.find(gpa) else { unreachable!("code was fetched from this slot") };
        let word: *const AtomicU64 = slot.code_word(gpa);
        // SAFETY: the word belongs to a slot of the map the Cpu holds.
        let before = unsafe { (*word).fetch_or(granules(gpa & 0xfff, size as u64), AcqRel) };
        if before & 0xffff_ffff == 0 {
            self.flush_writes_of(host as usize & !0xfff);
            if self.board.code_page(gpa & !0xfff) {
                self.shared_code.insert(gpa & !0xfff);
            }
        }
        (word, (before >> 32) as u32)
    }

    fn decode_block(&mut self, linear: u64) -> R<*mut Block> {
        let (gpa, host) = self.locate(linear)?;
        let key = self.key(host);
        if self.blocks.chunks.len() >= self.blocks.max_chunks {
            self.blocks.clear();
        }
        let in_page = (PAGE_SIZE - (gpa & 0xfff)) as usize;
        let window = in_page.min(MAX_BYTES);
        let mut bytes = [0u8; MAX_BYTES + MAX_INSTRUCTION];
        let mut ops = Vec::with_capacity(MAX_OPS + 1);
        loop {
            copy(host, &mut bytes[..window]);
            ops.clear();
            let (end, linkable, _) = self.decode(&bytes[..window], MAX_OPS, &mut ops);
            if ops.is_empty() {
                return self.decode_straddling(key, linear, gpa, host, in_page);
            }
            let (word, generation) = self.mark_code(gpa, host, end);
            let mut again = [0u8; MAX_BYTES];
            copy(host, &mut again[..end]);
            if again[..end] == bytes[..end] {
                return Ok(self.keep(key, ops, end, linkable, (word, generation), None));
            }
        }
    }

    /// One instruction that begins at the end of a page and goes on in the next.
    fn decode_straddling(&mut self, key: u64, linear: u64, gpa: u64, host: *const u8, in_page: usize) -> R<*mut Block> {
        let (gpa2, host2) = self.locate((linear & !0xfff).wrapping_add(PAGE_SIZE))?;
        let (word, generation) = self.mark_code(gpa, host, in_page);
        let (word2, generation2) = self.mark_code(gpa2, host2, MAX_INSTRUCTION);
        let mut bytes = [0u8; MAX_INSTRUCTION];
        let first = in_page.min(MAX_INSTRUCTION);
        copy(host, &mut bytes[..first]);
        copy(host2, &mut bytes[first..]);
        let mut ops = Vec::with_capacity(2);
        let (end, linkable, _) = self.decode(&bytes, 1, &mut ops);
        if ops.is_empty() {
            return Err(self.gp(0));
        }
        Ok(self.keep(key, ops, end, linkable, (word, generation), Some((host2, word2, generation2))))
    }

    fn keep(
        &mut self,
        key: u64,
        mut ops: Vec<Op>,
        end: usize,
        linkable: bool,
        (word, generation): (*const AtomicU64, u32),
        second: Option<(*const u8, *const AtomicU64, u32)>,
    ) -> *mut Block {
        let count = ops.len() as u32;
        let mut sentinel = ops[ops.len() - 1];
        sentinel.f = fall_through;
        sentinel.len = 0;
        ops.push(sentinel);
        let block = Box::new(Block {
            ops: self.blocks.store(&ops),
            count,
            generation,
            word,
            host: (key >> 2) as *const u8,
            code: Translation::NONE,
            heat: 0,
            linkable: linkable && second.is_none(),
            joins: linkable,
            bytes: end as u8,
            second,
            links: [NO_LINK; 2],
        });
        self.blocks.decoded += 1;
        if let Some(old) = self.blocks.map.insert(key, block) {
            self.blocks.retired.push(old);
        }
        self.blocks.map.get_mut(&key).map_or(std::ptr::null_mut(), |block| &mut **block)
    }

    /// What a serialising instruction means for code: whatever others stored until now is what runs
    /// from here on. SDM vol. 3, 8.1.3 and 8.3. A vCPU that found code on a page does not wait for
    /// the others to notice; one that has not may have stored to it, so its code is decoded anew.
    #[inline]
    pub(crate) fn serialise(&mut self) {
        if self.shared.attention.load(SeqCst) & attention::CODE != 0 {
            // The code in execution may be among what changed: nothing of it goes on unlooked at.
            self.code_changed();
        }
        if !self.shared_code.is_empty() {
            self.decode_shared_code_anew();
        }
    }

    #[cold]
    fn decode_shared_code_anew(&mut self) {
        let pages = std::mem::take(&mut self.shared_code);
        if self.board.code_noticed() {
            return;
        }
        let mut any = false;
        for gpa in pages {
            if let Some(slot) = self.slots.find(gpa) {
                any |= note_store(slot.code_word(gpa), 0, PAGE_SIZE);
            }
        }
        if any {
            self.code_changed();
        }
    }

    /// After a store changed decoded code: if it was the running block, its remaining operations
    /// must not run.
    pub(crate) fn code_changed(&mut self) {
        self.counters.invalidations += 1;
        self.forget_returns();
        self.native.left = 1;
        let current = self.blocks.current;
        if current.is_null() {
            return;
        }
        // SAFETY: `current` is a block of the cache while it runs; its operations are this vCPU's own.
        unsafe {
            let stale = !(*current).valid()
                || (*current)
                    .second
                    .is_some_and(|(_, word, generation)| (*word).load(Relaxed) >> 32 != generation as u64);
            if stale {
                for index in 0..=(*current).count as usize {
                    let op = &mut *(*current).ops.add(index);
                    op.f = cut;
                }
            }
        }
    }

    /// Decodes the single instruction at RIP, uncached.
    pub(crate) fn decode_one(&mut self) -> R<Op> {
        let linear = self.code_linear(self.rip, 1)?;
        let host = self.fetch(linear)?;
        let in_page = ((PAGE_SIZE - (linear & 0xfff)) as usize).min(MAX_INSTRUCTION);
        let mut bytes = [0u8; MAX_INSTRUCTION];
        copy(host, &mut bytes[..in_page]);
        let mut ops = Vec::with_capacity(1);
        let (mut end, _, _) = self.decode(&bytes[..in_page], 1, &mut ops);
        if ops.is_empty() && in_page < MAX_INSTRUCTION {
            let host2 = self.fetch((linear & !0xfff).wrapping_add(PAGE_SIZE))?;
            copy(host2, &mut bytes[in_page..]);
            end = self.decode(&bytes, 1, &mut ops).0;
        }
        let Some(op) = ops.pop() else { return Err(self.gp(0)) };
        self.code_linear(self.rip, end as u64)?;
        Ok(op)
    }

    /// Takes a new slot map: all translations and blocks go.
    pub(crate) fn set_slots(&mut self, slots: std::sync::Arc<crate::mem::SlotMap>) {
        self.blocks.clear();
        self.unsettled = super::stored::Unsettled::NONE;
        self.slots = slots;
        self.flush_all();
    }

    /// Another vCPU found code on these pages: drop write translations of them, and count what may
    /// have been stored through those since as a change of code. Pages this vCPU could not store to
    /// unnoticed are left alone, or two vCPUs running the same code would undo each other's blocks
    /// for ever.
    pub(crate) fn forget_code_pages(&mut self) {
        let pages = match self.shared.code_pages.lock() {
            Ok(mut pages) => std::mem::take(&mut *pages),
            Err(_) => return,
        };
        let slots = self.slots.clone();
        let lost = std::mem::take(&mut self.tlb.writes_lost);
        let mut changed = false;
        for gpa in pages {
            if let (Some(slot), Some(host)) = (slots.find(gpa), slots.host(gpa)) {
                if self.flush_writes_of(host as usize) || lost {
                    changed |= note_store(slot.code_word(gpa), 0, PAGE_SIZE);
                }
            }
        }
        if changed {
            self.forget_returns();
            self.board.code_changed();
        }
    }
}

/// Copies guest bytes that another CPU may be writing.
pub(crate) fn copy(host: *const u8, into: &mut [u8]) {
    for (index, byte) in into.iter_mut().enumerate() {
        // SAFETY: the caller stays within the page of `host`.
        *byte = unsafe { std::ptr::read_volatile(host.add(index)) };
    }
}
