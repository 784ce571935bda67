//! The software TLB: linear page -> host page, per privilege mode, tagged by address space.
//!
//! Three direct-mapped arrays: user, supervisor with SMAP in force, supervisor without (and one that
//! stays empty, for when every access must take the slow path). An entry
//! has one tag each for reading, writing and execution: the linear page, with the address space
//! number in its low 12 bits. `(address + size - 1) & !0xfff | asid` equals the tag only when the
//! access is allowed, lies within one page and that page is RAM, so one comparison decides the
//! fast path. What an entry displaces waits behind it, at the same slot of the array's second half, as two pages
//! that share a slot often are both in use. Whatever needs more (MMIO, clean pages under a dirty log, pages with decoded code,
//! page-crossing accesses) has no matching tag and takes the slow path.
//!
//! PCIDs (and CR3 values without PCID) map to address space numbers; forgetting a PCID gives it a
//! new number. INVLPG clears by slot whatever the number.
//!
//! Supervisor accesses under SMAP never meet user pages, and nearly all else is global: their array
//! has one number for all address spaces, [`KERNEL_ASID`], so that a kernel finds its own pages in
//! every process. What is not global there is noted, and goes with the next load of CR3.

use super::state::{cr0, cr4, rflags};
use super::walk::Page;
use super::{attention, Cpu};
use crate::host::table::Table;
use crate::mem::Slot;
use std::sync::atomic::Ordering::Relaxed;

/// Entries per array that accesses look at.
pub const ENTRIES: usize = 4096;
/// With those they displaced: those of slot `n` are entries `n` and `n + ENTRIES`.
const ALL: usize = 2 * ENTRIES;
/// Stands for no page (0xfff is never an address space number).
pub const INVALID: u64 = u64::MAX;
/// A tag that matches no access: address space numbers begin at 1. Zero, so that arrays take only the memory of what
/// was put into them.
const NONE: u64 = 0;

/// The address space number of supervisor accesses under SMAP.
const KERNEL_ASID: u64 = 0xffe;
/// Notes of pages that are not global, before all of their array goes.
const LOCALS: usize = 64;

/// One TLB entry.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    pub(crate) r: u64,
    pub(crate) w: u64,
    pub(crate) x: u64,
    /// Host address minus linear address (wrapping).
    pub(crate) addend: usize,
}

const EMPTY: Entry = Entry { r: NONE, w: NONE, x: NONE, addend: 0 };

/// The array that stays empty.
const NEVER: usize = 3;

/// Which array: who accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// CPL 3.
    User,
    /// Supervisor that may not touch user pages (SMAP, AC clear) .
    Smap,
    /// Supervisor that may.
    Super,
}

/// The three arrays, and the one that stays empty, where translated code of processes finds theirs by a displacement if
/// the host has room there.
fn arrays() -> Table<[Entry; ALL]> {
    // SAFETY: entries are integers.
    unsafe { Table::low(NEVER + 1).unwrap_or_else(|| Table::always(NEVER + 1)) }
}

/// The three arrays and the address space numbers.
pub struct Tlb {
    arrays: Table<[Entry; ALL]>,
    /// Nothing is in the array of processes.
    user_empty: bool,
    pub(crate) mode: Mode,
    /// The pages that the jump caches may lead to.
    pub(crate) code: Filter,
    /// The 2 MiB regions of which a large page has been cached: INVLPG forgets all fragments of one.
    large: Filter,
    /// The host pages that a write tag has led to: of others none need be looked for.
    written: Filter,
    /// Slots of the SMAP array that may hold pages which are not global; more than [`LOCALS`]: any may.
    locals: Vec<u16>,
    /// There was code on such pages.
    local_code: bool,
    /// The SMAP array has [`KERNEL_ASID`]; not where most pages turned out to be local, as those of a
    /// kernel that hides from its processes are.
    shared_kernel: bool,
    asid_of_pcid: Box<[u16; 4096]>,
    /// The number of CR3's PCID.
    user_asid: u64,
    next_asid: u16,
    /// A write tag went while [`attention::WRITES`] waited: which page's is not known any more.
    pub(crate) writes_lost: bool,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            arrays: arrays(),
            user_empty: true,
            mode: Mode::Super,
            code: Filter::default(),
            large: Filter::default(),
            written: Filter::default(),
            locals: Vec::with_capacity(LOCALS + 1),
            local_code: false,
            shared_kernel: true,
            asid_of_pcid: Box::new([0; 4096]),
            user_asid: 1,
            next_asid: 1,
            writes_lost: false,
        }
    }
}

impl Tlb {
    /// The first entry of a mode's array.
    pub(crate) fn array(&mut self, mode: usize) -> *mut Entry {
        self.arrays[mode].as_mut_ptr()
    }

    /// The address of the array of processes, where all of it is within a displacement's reach.
    pub(crate) fn low_user_array(&self) -> Option<i32> {
        let array = &self.arrays[Mode::User as usize];
        i32::try_from(array.as_ptr_range().end as usize).ok().map(|end| end - size_of_val(array) as i32)
    }

    fn clear(&mut self) {
        self.arrays.reset();
        self.large.clear();
        self.written.clear();
        self.locals.clear();
        self.shared_kernel = true;
    }

    /// Forgets the SMAP array's pages that are not global; tells whether a store could go to one.
    fn drop_locals(&mut self) -> bool {
        let array = &mut self.arrays[Mode::Smap as usize];
        let any = if self.locals.len() > LOCALS {
            array.fill(EMPTY);
            self.shared_kernel = false;
            true
        } else {
            self.locals
                .iter()
                .flat_map(|&slot| [slot as usize, slot as usize + ENTRIES])
                .fold(false, |any, at| any | (std::mem::replace(&mut array[at], EMPTY).w != NONE))
        };
        self.locals.clear();
        any
    }

    fn drop_writes(&mut self) {
        for entry in self.arrays.iter_mut().flatten().filter(|entry| entry.w != NONE) {
            entry.w = NONE;
        }
        self.written.clear();
    }
}

/// A set of page or region numbers that may say yes where it should say no.
pub(crate) struct Filter(Box<[u64; 1024]>);

impl Default for Filter {
    fn default() -> Self {
        Self(Box::new([0; 1024]))
    }
}

impl Filter {
    fn bit(number: u64) -> (usize, u64) {
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        (hash as usize >> 6, 1 << (hash & 63))
    }

    /// Puts a number in.
    #[inline]
    pub fn note(&mut self, number: u64) {
        let (word, bit) = Self::bit(number);
        self.0[word] |= bit;
    }

    fn has(&self, number: u64) -> bool {
        let (word, bit) = Self::bit(number);
        self.0[word] & bit != 0
    }

    pub(crate) fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// The slot of a linear address.
#[inline(always)]
pub fn index(linear: u64) -> usize {
    (linear >> 12) as usize & (ENTRIES - 1)
}

/// Sign-extended 48-bit address.
#[inline(always)]
pub fn canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

impl Cpu {
    /// The tag an access of `size` bytes at `linear` must find.
    #[inline(always)]
    pub(crate) fn tag(&self, linear: u64, size: u64) -> u64 {
        (linear.wrapping_add(size - 1) & !0xfff) | self.asid
    }

    /// The entry of `linear` in the array of the current mode.
    #[inline(always)]
    pub(crate) fn entry(&mut self, linear: u64) -> &mut Entry {
        // SAFETY: tlb_now points at an array of ENTRIES and index() is below it.
        unsafe { &mut *self.tlb_now.add(index(linear)) }
    }

    /// Chooses the array after a change of CPL, SMAP or AC.
    pub fn update_mmu_mode(&mut self) {
        let mode = if self.cpl == 3 {
            Mode::User
        } else if self.cr4 & cr4::SMAP != 0 && self.sys_flags as u64 & rflags::AC == 0 {
            Mode::Smap
        } else {
            Mode::Super
        };
        self.use_mode(mode);
    }

    pub(crate) fn use_mode(&mut self, mode: Mode) {
        self.tlb.mode = mode;
        let array = if self.uncached() { NEVER } else { mode as usize };
        if array == NEVER && !std::mem::replace(&mut self.tlb.user_empty, true) {
            // Translated code of processes looks there whatever `tlb_now` says.
            self.note_lost_write();
            self.tlb.arrays[Mode::User as usize].fill(EMPTY);
        }
        self.tlb_now = self.tlb.array(array);
        let shared = mode == Mode::Smap && self.tlb.shared_kernel;
        self.asid = if shared { KERNEL_ASID } else { self.tlb.user_asid };
        self.forget_stack_page();
        self.refresh_context();
    }

    /// Notes that a jump cache leads to the code at a linear address.
    #[inline]
    pub(crate) fn note_code(&mut self, linear: u64) {
        self.tlb.code.note(linear >> 12);
    }

    /// Every access takes the slow path and fills nothing: alignment checks, data breakpoints.
    #[inline]
    pub(crate) fn uncached(&self) -> bool {
        self.trace.watching || self.alignment_checked()
    }

    /// Runs `body` with the rights of implicit supervisor accesses (descriptor tables, TSS).
    #[inline]
    pub fn as_supervisor<T>(&mut self, body: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.tlb.mode;
        self.use_mode(if self.cr4 & cr4::SMAP != 0 { Mode::Smap } else { Mode::Super });
        let result = body(self);
        self.use_mode(before);
        result
    }

    /// Forgets every translation (CR0.PG, CR4 paging bits, slots changed).
    pub fn flush_all(&mut self) {
        self.forget_stack_page();
        self.note_lost_write();
        self.tlb.clear();
        self.tlb.asid_of_pcid.fill(0);
        self.tlb.next_asid = 1;
        self.new_exec_epoch();
        self.select_asid();
    }

    /// Forgets the write permissions cached: a dirty log was read or code was found.
    pub fn flush_writes(&mut self) {
        self.native.stack_page = INVALID;
        self.tlb.drop_writes();
    }

    /// A translation that allowed stores is about to be forgotten. Stores it let through while
    /// another vCPU decoded code there must still count: see `forget_code_pages`.
    #[inline]
    fn note_lost_write(&mut self) {
        self.tlb.writes_lost |= self.writes_wanted();
    }

    fn writes_wanted(&self) -> bool {
        self.shared.attention.load(Relaxed) & attention::WRITES != 0
    }

    /// Translated code's stack page may be stored to, too.
    #[inline]
    fn forget_stack_page(&mut self) {
        if self.native.stack_page != INVALID {
            self.note_lost_write();
            self.native.stack_page = INVALID;
        }
    }

    /// Forgets the write permissions cached for one host page; tells whether there were any.
    pub(crate) fn flush_writes_of(&mut self, host_page: usize) -> bool {
        let stack = self.native.stack_page.wrapping_add(self.native.stack_addend) as usize;
        let mut any = self.native.stack_page != INVALID && stack == host_page;
        if any {
            self.native.stack_page = INVALID;
        }
        // A guest that has just begun finds code on a thousand pages, and never wrote to most of them.
        if !self.tlb.written.has(host_page as u64 >> 12) {
            return any;
        }
        for entry in self.tlb.arrays.iter_mut().flatten() {
            if entry.w != NONE && ((entry.w & !0xfff) as usize).wrapping_add(entry.addend) == host_page {
                entry.w = NONE;
                any = true;
            }
        }
        any
    }

    fn pcid(&self) -> usize {
        if self.cr4 & cr4::PCIDE != 0 {
            self.cr3 as usize & 0xfff
        } else {
            0
        }
    }

    /// Takes the address space number of CR3's PCID, a new one if it has none.
    fn select_asid(&mut self) {
        if !self.tlb.locals.is_empty() {
            self.tlb.writes_lost |= self.tlb.drop_locals() && self.writes_wanted();
        }
        if std::mem::take(&mut self.tlb.local_code) {
            self.new_exec_epoch();
        }
        let pcid = self.pcid();
        if self.tlb.asid_of_pcid[pcid] == 0 {
            if self.tlb.next_asid as u64 == KERNEL_ASID {
                self.note_lost_write();
                self.tlb.clear();
                self.tlb.asid_of_pcid.fill(0);
                self.tlb.next_asid = 1;
                self.new_exec_epoch();
            }
            self.tlb.asid_of_pcid[pcid] = self.tlb.next_asid;
            self.tlb.next_asid += 1;
        }
        self.tlb.user_asid = self.tlb.asid_of_pcid[pcid] as u64;
        self.use_mode(self.tlb.mode);
    }

    /// After CR3 was loaded; `keep` when its bit 63 asked not to flush the PCID.
    pub fn cr3_loaded(&mut self, keep: bool) {
        if !keep {
            let pcid = self.pcid();
            self.tlb.asid_of_pcid[pcid] = 0;
        }
        self.select_asid();
    }

    /// Forgets one PCID's translations (INVPCID types 0 and 1).
    pub fn flush_pcid(&mut self, pcid: u16) {
        self.tlb.asid_of_pcid[pcid as usize & 0xfff] = 0;
        self.select_asid();
    }

    /// INVLPG: forgets `linear` in every address space, with all of its 2 MiB neighbourhood where the
    /// entry may be a fragment of a large page (pitfall 11). 1 GiB pages are cached as 2 MiB ones
    /// are, in 4 KiB fragments; for them everything goes.
    pub fn invlpg(&mut self, linear: u64) {
        let large = self.tlb.large.has(linear >> 21);
        let (mask, pages) = if large { (!0x1f_ffff, 512) } else { (!0xfff, 1) };
        let first = linear & mask;
        self.forget_stack_page();
        self.note_lost_write();
        for array in self.tlb.arrays.iter_mut() {
            let (front, behind) = array.split_at_mut(ENTRIES);
            let slots = index(first)..index(first) + pages;
            for entry in front[slots.clone()].iter_mut().chain(&mut behind[slots]) {
                let of = |tag: u64| tag != NONE && tag & mask == first;
                if of(entry.r) || of(entry.w) || of(entry.x) {
                    *entry = EMPTY;
                }
            }
        }
        if (first >> 12..).take(pages).any(|page| self.tlb.code.has(page)) {
            self.new_exec_epoch();
        }
    }

    /// Installs a translation; the rights of `page` are those that may be cached now.
    pub(crate) fn install(&mut self, linear: u64, host_page: *mut u8, page: Page) {
        let start = linear & !0xfff;
        let tag = start | self.asid;
        let pick = |yes: bool| if yes { tag } else { NONE };
        self.tlb.user_empty &= self.tlb.mode != Mode::User;
        self.displace(linear, tag);
        if page.large {
            self.tlb.large.note(linear >> 21);
        }
        if self.asid == KERNEL_ASID && !page.global {
            self.tlb.local_code |= page.executable;
            if self.tlb.locals.len() <= LOCALS {
                self.tlb.locals.push(index(linear) as u16);
            }
        }
        if page.writable {
            self.tlb.written.note(host_page as u64 >> 12);
        }
        *self.entry(linear) = Entry {
            r: pick(page.readable),
            w: pick(page.writable),
            x: pick(page.executable),
            addend: (host_page as usize).wrapping_sub(start as usize),
        };
    }

    /// Makes room for a translation with this tag: what is of another page goes behind.
    fn displace(&mut self, linear: u64, tag: u64) {
        // SAFETY: as entry(); the array has a second half.
        let (front, behind) = unsafe {
            let front = self.tlb_now.add(index(linear));
            (&mut *front, &mut *front.add(ENTRIES))
        };
        let old = *front;
        let same = |entry: &Entry| [entry.r, entry.w, entry.x].contains(&tag);
        let void = [old.r, old.w, old.x] == [NONE; 3];
        // What was known of this page goes, wherever it is.
        let mut lost = old;
        if same(behind) || !void && !same(&old) {
            lost = std::mem::replace(behind, if same(&old) { EMPTY } else { old });
        }
        if lost.w != NONE {
            self.note_lost_write();
        }
    }

    /// Whether stores to this page may take the fast path: logged already, and no code on it.
    pub(crate) fn store_cacheable(slot: &Slot, gpa: u64) -> bool {
        !slot.read_only && slot.code_word(gpa).load(std::sync::atomic::Ordering::Acquire) & 0xffff_ffff == 0
    }

    /// Paging is on.
    #[inline]
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::state::seg;
    use crate::cpu::testing::Bench;

    const WRITTEN: u64 = 0x2_0000;
    const READ: u64 = 0x3_0000;

    fn host(bench: &Bench, gpa: u64) -> usize {
        bench.cpu.slots.host(gpa).map_or(0, |host| host as usize)
    }

    #[test]
    fn test_flush_writes_of_a_page_finds_it_after_every_store() {
        let mut bench = Bench::new(1 << 20).long_mode(0x1_0000, false);
        let (written, read) = (host(&bench, WRITTEN), host(&bench, READ));
        bench.cpu.rd::<u64>(READ, seg::DS).unwrap();
        for _ in 0..3 {
            bench.cpu.wr(WRITTEN, 1u64, seg::DS).unwrap();
            assert!(!bench.cpu.flush_writes_of(read));
            assert!(bench.cpu.flush_writes_of(written));
            assert!(!bench.cpu.flush_writes_of(written));
        }
    }

    #[test]
    fn test_flush_writes_of_a_page_finds_it_after_all_were_forgotten() {
        let forget: [fn(&mut crate::cpu::Cpu); 2] = [|cpu| cpu.flush_all(), |cpu| cpu.flush_writes()];
        for forget in forget {
            let mut bench = Bench::new(1 << 20).long_mode(0x1_0000, false);
            let written = host(&bench, WRITTEN);
            bench.cpu.wr(WRITTEN, 1u64, seg::DS).unwrap();
            forget(&mut bench.cpu);
            assert!(!bench.cpu.flush_writes_of(written));
            bench.cpu.wr(WRITTEN, 1u64, seg::DS).unwrap();
            assert!(bench.cpu.flush_writes_of(written));
        }
    }
}
