//! The translator: native code for blocks of 64-bit code that run often (engine brief, section 3).
//!
//! Guest and host have the same instruction set, so most instructions are copied with other
//! registers; memory operands go through the software TLB, and whatever is rare or complicated is
//! done by the interpreter's handler, called from the translated code. The interpreter remains the
//! reference: every fast path that does not apply ends in the same handlers.
//!
//! | stage | file | what |
//! |---|---|---|
//! | decode | `shape.rs` | an encoding taken apart |
//! | analyse | `classes.rs`, `vector.rs` | what is done with an instruction, what it does to the flags |
//! | emit | `emit.rs`; `copies.rs`, `moves.rs`, `memory.rs`, `near.rs`, `group.rs`, `again.rs`, `branch.rs`, `trace.rs`, `system.rs`, `exits.rs` | host code, by `asm.rs` |
//! | link | `link.rs`, `run.rs` | pieces joined together, and the loop around them |
//!
//! `layout.rs` says where registers and fields are, `stubs.rs`, `lookups.rs` and `doors.rs` hold the fixed pieces of code.

mod again;
pub mod asm;
mod branch;
mod classes;
mod copies;
mod doors;
pub mod dump;
mod emit;
mod exits;
mod group;
pub mod layout;
pub(crate) mod link;
mod lookups;
mod memory;
mod moves;
mod near;
mod run;
mod shape;
mod stubs;
mod system;
#[cfg(test)]
mod tests;
mod trace;
mod vector;

use super::block::Block;
use crate::counters::Counters;
use crate::host::execmem::CodeWriter;
use crate::host::table::Table;
use iced_x86::InstructionInfoFactory;
use link::{Exit, Jump, Sites};
use std::any::Any;
use std::collections::HashMap;
use stubs::Stubs;

/// Bytes that a VM's translations take, with all that belongs to them, where nobody says otherwise.
pub const MEMORY: usize = 128 << 20;
/// A vCPU gets no less.
const LEAST: usize = 8 << 20;

/// How much a vCPU keeps before everything is dropped and made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of code.
    pub(crate) region: usize,
    /// MiB of decoded operations.
    pub(crate) chunks: usize,
}

impl Budget {
    /// For one of `vcpus` that share `bytes`. Besides code and operations each block takes some 200 bytes: 7 of 16
    /// parts are code, 4 operations, the rest are blocks, links and tables.
    pub fn share(bytes: usize, vcpus: usize) -> Self {
        let share = (bytes / vcpus.max(1)).max(LEAST);
        Self { region: share / 16 * 7, chunks: (share >> 20) / 4 }
    }
}

/// How often a block runs before it is translated.
pub const HOT: u32 = 4;
/// The same for a vCPU that idles: what runs now and then is not worth its translation's memory.
const HOT_AT_REST: u32 = 256;

/// How often its code runs before it gets a trace; for translators that do not wait, [`EAGER`].
pub const WARM: i32 = 500;
/// See [`WARM`].
const EAGER: i32 = 1;

/// What the translator did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Blocks translated.
    pub translated: u64,
    /// Traces among them.
    pub traces: u64,
    /// Bytes of code made.
    pub code_bytes: u64,
    /// Direct exits linked.
    pub linked: u64,
    /// Times translated code was entered.
    pub entries: u64,
    /// Returns for a direct exit that was not linked yet.
    pub exits_direct: u64,
    /// Returns because the jump table did not know an address.
    pub exits_unknown: u64,
    /// Returns because a handler stopped.
    pub exits_stop: u64,
    /// Times everything was dropped.
    pub flushes: u64,
}

impl Stats {
    /// Puts what others want to know where they look.
    pub(crate) fn count(&self, into: &mut Counters) {
        (into.translations, into.code_bytes) = (self.translated, self.code_bytes);
        (into.flushes, into.entries) = (self.flushes, self.entries);
    }
}

/// What `OSTLER_DEBUG_ENGINE` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dumps {
    /// `blocks`: every translation.
    Blocks,
    /// `stats`: at the end, what was done.
    Stats,
}

fn dumps() -> Option<Dumps> {
    match std::env::var("OSTLER_DEBUG_ENGINE").ok()?.as_str() {
        "blocks" => Some(Dumps::Blocks),
        "stats" => Some(Dumps::Stats),
        _ => None,
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        if self.dumps != Some(Dumps::Stats) {
            return;
        }
        eprintln!("{:#?}\n{:#?}, {} of {} bytes used", self.seen, self.stats, self.writer.used(), self.region_bytes);
        let mut calls: Vec<_> = self.handlers.iter().map(|(&handler, &count)| (count, handler)).collect();
        calls.sort_unstable_by(|a, b| b.cmp(a));
        let here = stubs::build as *const () as usize;
        for (count, handler) in calls.iter().take(60) {
            eprintln!("{count:>12} calls of the handler at {:#x} from build()", handler.wrapping_sub(here) as isize);
        }
    }
}

/// Translated code of one vCPU.
pub struct Translator {
    writer: CodeWriter,
    region_bytes: usize,
    stubs: Stubs,
    exits: Vec<Exit>,
    jumps: Table<Jump>,
    sites: Sites,
    factory: InstructionInfoFactory,
    /// `Blocks::clears` when the code was made.
    clears: u64,
    hot: u32,
    at_rest: bool,
    /// Where `Block::heat` begins.
    warm: i32,
    /// The linear address of a block that turned out to be hot.
    hot_at: Option<u64>,
    /// What a handler panicked with.
    panic: Option<Box<dyn Any + Send>>,
    /// How often each handler was called, where that is asked for.
    handlers: HashMap<usize, u64>,
    /// What is printed on standard error.
    dumps: Option<Dumps>,
    /// There was no room for a piece.
    full: bool,
    /// Blocks see to it that they can run whole within `Out::limit`, for lockstep.
    pub(crate) counted: bool,
    /// What it did.
    pub stats: Stats,
    /// What its vCPU had done when it published that last.
    pub(crate) seen: Counters,
}

// SAFETY: the pointers in `jumps` and `sites` lead into memory that moves with the Cpu's ownership.
unsafe impl Send for Translator {}

/// A block's native code.
#[derive(Clone, Copy)]
pub(crate) struct Translation {
    /// Entry with flags in the `Cpu`; null: none yet.
    pub entry: *const u8,
    /// Entry with flags in RFLAGS, as an offset in the region.
    host_entry: u32,
    /// `entry` as such an offset.
    memory_entry: u32,
    /// Instructions that it counts at its start.
    pub count: u32,
    /// Executions so far, while there is none.
    runs: u32,
}

impl Translation {
    pub const NONE: Self = Self { entry: std::ptr::null(), host_entry: 0, memory_entry: 0, count: 0, runs: 0 };
}

impl Translator {
    /// An empty one; `None` where no code memory is to be had.
    pub fn new(hot: u32, region_bytes: usize) -> Option<Box<Self>> {
        let (writer, stubs) = Self::region(region_bytes)?;
        Some(Box::new(Self {
            writer,
            region_bytes,
            stubs,
            exits: Vec::new(),
            jumps: link::no_jumps()?,
            sites: Sites::default(),
            factory: InstructionInfoFactory::new(),
            clears: 0,
            hot,
            at_rest: false,
            warm: if hot < HOT { EAGER } else { WARM },
            hot_at: None,
            panic: None,
            dumps: dumps(),
            handlers: HashMap::new(),
            full: false,
            counted: false,
            stats: Stats::default(),
            seen: Counters::default(),
        }))
    }

    fn region(bytes: usize) -> Option<(CodeWriter, Stubs)> {
        let mut writer = CodeWriter::new(bytes).ok()?;
        let (code, stubs) = stubs::build(run::call_out);
        writer.push(&code)?;
        Some((writer, stubs))
    }

    /// Drops all code and makes little more until [`Self::stir`]; the blocks that lead to it are gone.
    pub(crate) fn rest(&mut self, clears: u64) {
        self.flush(clears);
        self.at_rest = true;
    }

    /// The vCPU has something to do.
    pub(crate) fn stir(&mut self) {
        self.at_rest = false;
    }

    fn threshold(&self) -> u32 {
        if self.at_rest {
            self.hot.max(HOT_AT_REST)
        } else {
            self.hot
        }
    }

    /// Drops all code; the blocks that lead to it are gone.
    fn flush(&mut self, clears: u64) {
        self.clears = clears;
        self.exits = Vec::new();
        self.sites = Sites::default();
        self.forget_jumps();
        self.stats.flushes += 1;
        if let Some((writer, stubs)) = Self::region(self.region_bytes) {
            (self.writer, self.stubs) = (writer, stubs);
        }
    }

    pub(crate) fn forget_jumps(&mut self) {
        link::forget(&mut self.jumps);
        self.sites.forget();
    }

    /// Translates a block. `false`: there is no room, or it cannot be.
    fn translate(&mut self, block: &mut Block, bytes: &[u8], array: Option<i32>) -> bool {
        let second = block.second.map(|(_, word, generation)| (word, generation));
        block.heat = self.warm;
        let heat = second.is_none().then_some(&raw mut block.heat);
        let (linkable, page, counted) = (block.joins, block.host as usize & !0xfff, self.counted);
        let parts = [emit::Part::of(block, bytes)];
        let Some(code) = self.emit(emit::Source { parts: &parts, page, linkable, second, counted, array, heat }) else {
            return false;
        };
        block.code = code;
        true
    }

    /// Translates a trace, to which the code of its first block leads from now on.
    fn translate_trace(&mut self, head: &mut Block, parts: &[emit::Part], linkable: bool, array: Option<i32>) {
        let (page, counted) = (head.host as usize & !0xfff, self.counted);
        let source = emit::Source { parts, page, linkable, second: None, counted, array, heat: None };
        match self.emit(source) {
            Some(code) => {
                self.stats.traces += 1;
                for (from, to) in [(head.code.host_entry, code.host_entry), (head.code.memory_entry, code.memory_entry)]
                {
                    self.writer.patch_jump(from as usize, to as usize);
                }
                head.code = code;
            }
            None => self.full |= self.writer.used() > self.region_bytes / 2,
        }
    }

    /// Code for `source`; `None` where there is no room, or it cannot be.
    fn emit(&mut self, source: emit::Source) -> Option<Translation> {
        let origin = self.writer.position();
        let count = source.parts.iter().map(|part| part.ops.len() as u32).sum();
        let listings = self.dumps.map_or(Vec::new(), |_| {
            source.parts.iter().map(|part| (part.offset, dump::listing(part.bytes, part.offset as u64))).collect()
        });
        let piece =
            emit::translate(source, &self.stubs, origin, self.exits.len(), (&mut self.factory, &mut self.sites));
        let piece = piece?;
        if self.dumps == Some(Dumps::Blocks) {
            for (offset, listing) in listings {
                eprintln!("block at page offset {offset:#x}\n{listing}becomes");
            }
            eprintln!("{}", dump::listing(&piece.code, origin as u64));
        }
        let address = self.writer.push(&piece.code)?;
        self.exits.extend(piece.exits);
        self.stats.translated += 1;
        self.stats.code_bytes += piece.code.len() as u64;
        Some(Translation {
            // SAFETY: the entry lies within the piece.
            entry: unsafe { address.as_ptr().add(piece.entry) },
            host_entry: (origin + piece.host_entry) as u32,
            memory_entry: (origin + piece.entry) as u32,
            count,
            runs: 0,
        })
    }

    /// Makes exit `exit` lead to `code`.
    fn link(&mut self, exit: u32, code: &Translation, block: &Block) {
        let Some(Exit::Link { at, target, page, flags_in_host }) = self.exits.get(exit as usize).copied() else {
            return;
        };
        if page != block.host as usize & !0xfff {
            return;
        }
        let entry = match (block.straddles(), flags_in_host) {
            (true, _) => match self.bridge(target, flags_in_host) {
                Some(bridge) => bridge,
                None => return,
            },
            (_, true) => code.host_entry,
            (_, false) => code.memory_entry,
        };
        self.writer.patch(at as usize, entry as i32 - (at as i32 + 4));
        self.stats.linked += 1;
    }

    /// A way to page offset `target` by the jump table: what follows a straddling block's first page
    /// is not the same wherever that page is mapped.
    fn bridge(&mut self, target: u16, flags_in_host: bool) -> Option<u32> {
        let origin = self.writer.position();
        let code = exits::bridge(&self.stubs, origin, target, flags_in_host);
        self.writer.push(&code)?;
        Some(origin as u32)
    }
}
