//! Page walks: 4-level, PAE and 32-bit paging, with exact error codes and atomic A/D updates.
//!
//! SDM vol. 3, 4.3-4.7. Left out: 5-level paging, shadow stacks (not in any CPU model).

use super::state::{cr0, cr4, efer, rflags};
use super::{Cpu, R};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// Page-fault error code bits.
#[allow(missing_docs)]
pub mod pf {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
    pub const PK: u32 = 32;
}

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;
/// Where a leaf entry has its protection key.
const KEY_SHIFT: u32 = 59;

/// Who accesses and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access {
    /// A store.
    pub write: bool,
    /// An instruction fetch.
    pub exec: bool,
    /// With CPL 3's rights.
    pub user: bool,
    /// SMAP forbids user pages.
    pub smap: bool,
}

/// The result of a walk.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// Guest-physical address of the byte asked for.
    pub gpa: u64,
    /// The same access rights would allow reads, writes (and D is set), fetches.
    pub readable: bool,
    /// Writable, and the dirty bit is set.
    pub writable: bool,
    /// Executable.
    pub executable: bool,
    /// Its translation outlives loads of CR3.
    pub global: bool,
    /// It is more than 4 KiB.
    pub large: bool,
}

/// Rights accumulated over the levels.
#[derive(Clone, Copy)]
struct Rights {
    user: bool,
    write: bool,
    nx: bool,
    /// The protection key's access-disable and write-disable bits, if one applies.
    key: u32,
}

impl Cpu {
    /// Translates `linear`, or stops with #PF.
    pub fn walk(&mut self, linear: u64, access: Access) -> R<Page> {
        self.try_walk(linear, access, true).map_err(|error| self.pf(linear, error))
    }

    /// Translates without faulting; the error is the #PF error code. `update` sets A and D.
    pub fn try_walk(&mut self, linear: u64, access: Access, update: bool) -> Result<Page, u32> {
        if !self.paging() {
            let all = Page { gpa: 0, readable: true, writable: true, executable: true, global: false, large: false };
            return Ok(Page { gpa: linear & 0xffff_ffff, ..all });
        }
        let base = access.write as u32 * pf::W + access.user as u32 * pf::U;
        let nx_reported = self.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0 || self.cr4 & cr4::SMEP != 0;
        let base = base + (access.exec && nx_reported) as u32 * pf::I;
        if self.cr4 & cr4::PAE == 0 {
            self.walk32(linear, access, base, update)
        } else {
            self.walk64(linear, access, base, update)
        }
    }

    fn entry64(&self, gpa: u64) -> Option<&AtomicU64> {
        let host = self.slots.host(gpa)?;
        // SAFETY: gpa is 8-byte aligned RAM of a live slot; the guest may change it any time, hence atomic.
        Some(unsafe { &*(host as *const AtomicU64) })
    }

    fn entry32(&self, gpa: u64) -> Option<&AtomicU32> {
        let host = self.slots.host(gpa)?;
        // SAFETY: as entry64, 4-byte aligned.
        Some(unsafe { &*(host as *const AtomicU32) })
    }

    /// Marks the table page dirty in the log when a walk set bits in it.
    fn log_table(&self, gpa: u64) {
        if let Some(slot) = self.slots.find(gpa) {
            slot.mark_dirty(gpa);
        }
    }

    fn walk64(&mut self, linear: u64, access: Access, base: u32, update: bool) -> Result<Page, u32> {
        let long = self.lma();
        let nxe = self.efer & efer::NXE != 0;
        let address_mask = ((1u64 << self.phys_bits) - 1) & !0xfff;
        let reserved = !((1u64 << self.phys_bits) - 1) & 0x000f_ffff_ffff_ffff | if nxe { 0 } else { NX };
        let mut rights = Rights { user: true, write: true, nx: false, key: 0 };
        let (mut level, mut table) = if long {
            (4u32, self.cr3 & address_mask)
        } else {
            let pdpte = self.pdptr[(linear >> 30) as usize & 3];
            if pdpte & P == 0 {
                return Err(base);
            }
            (2, pdpte & address_mask)
        };
        loop {
            let shift = 12 + 9 * (level - 1);
            let at = table + ((linear >> shift) & 0x1ff) * 8;
            let Some(cell) = self.entry64(at) else {
                return Err(base | pf::P | pf::RSVD);
            };
            let pte = cell.load(Acquire);
            if pte & P == 0 {
                return Err(base);
            }
            let large = level == 1 || level <= 3 && pte & PS != 0;
            let mut bad = reserved | if long { 0 } else { 0x7ff0_0000_0000_0000 };
            if level == 4 {
                bad |= PS;
            }
            if large && level > 1 {
                bad |= (1u64 << shift) - (1 << 13);
            }
            if pte & bad != 0 {
                return Err(base | pf::P | pf::RSVD);
            }
            rights.user &= pte & US != 0;
            rights.write &= pte & RW != 0;
            rights.nx |= pte & NX != 0;
            if !large {
                if update && pte & A == 0 {
                    cell.fetch_or(A, AcqRel);
                    self.log_table(at);
                }
                table = pte & address_mask;
                level -= 1;
                continue;
            }
            if long {
                rights.key = self.key_rights(rights.user, pte);
            }
            self.check(rights, access).map_err(|keys| base | pf::P | keys)?;
            let want = A | if access.write { D } else { 0 };
            if update && pte & want != want {
                // Another CPU may have changed the entry since: then start over.
                if cell.compare_exchange(pte, pte | want, AcqRel, Acquire).is_err() {
                    return self.walk64(linear, access, base, update);
                }
                self.log_table(at);
            }
            let offset = (1u64 << shift) - 1;
            let gpa = (pte & address_mask & !offset) | (linear & offset);
            let page = self.page(gpa, rights, access, (pte | want) & D != 0);
            return Ok(Page { global: self.is_global(pte), large: level > 1, ..page });
        }
    }

    fn walk32(&mut self, linear: u64, access: Access, base: u32, update: bool) -> Result<Page, u32> {
        let mut rights = Rights { user: true, write: true, nx: false, key: 0 };
        let at = (self.cr3 & 0xffff_f000) + ((linear >> 22) & 0x3ff) * 4;
        let Some(cell) = self.entry32(at) else {
            return Err(base | pf::P | pf::RSVD);
        };
        let pde = cell.load(Acquire);
        if pde & P as u32 == 0 {
            return Err(base);
        }
        let large = pde & PS as u32 != 0 && self.cr4 & cr4::PSE != 0;
        let (at, pte, page_base, offset) = if large {
            // PSE-36: bits 20:13 are address bits 39:32, as far as the processor has them; the rest up to 21 is reserved.
            let used = self.phys_bits.clamp(32, 40) - 32;
            if pde as u64 & ((1 << 22) - (1u64 << (13 + used))) != 0 {
                return Err(base | pf::P | pf::RSVD);
            }
            let high = ((pde as u64 >> 13) & 0xff) << 32;
            (at, pde, high | (pde & 0xffc0_0000) as u64, 0x3f_ffff)
        } else {
            rights.user &= pde & US as u32 != 0;
            rights.write &= pde & RW as u32 != 0;
            if update && pde & A as u32 == 0 {
                cell.fetch_or(A as u32, AcqRel);
                self.log_table(at);
            }
            let at = (pde & 0xffff_f000) as u64 + ((linear >> 12) & 0x3ff) * 4;
            let Some(cell) = self.entry32(at) else {
                return Err(base | pf::P | pf::RSVD);
            };
            let pte = cell.load(Acquire);
            if pte & P as u32 == 0 {
                return Err(base);
            }
            (at, pte, (pte & 0xffff_f000) as u64, 0xfff)
        };
        rights.user &= pte & US as u32 != 0;
        rights.write &= pte & RW as u32 != 0;
        self.check(rights, access).map_err(|keys| base | pf::P | keys)?;
        let want = (A | if access.write { D } else { 0 }) as u32;
        if update && pte & want != want {
            let Some(cell) = self.entry32(at) else {
                return Err(base);
            };
            if cell.compare_exchange(pte, pte | want, AcqRel, Acquire).is_err() {
                return self.walk32(linear, access, base, update);
            }
            self.log_table(at);
        }
        let page = self.page(page_base | (linear & offset), rights, access, (pte | want) & D as u32 != 0);
        Ok(Page { global: self.is_global(pte as u64), large, ..page })
    }

    /// The two bits that PKRU, or IA32_PKRS for supervisor pages, has for a leaf entry's key.
    fn key_rights(&self, user: bool, pte: u64) -> u32 {
        let (enable, register) = if user { (cr4::PKE, self.pkru) } else { (cr4::PKS, self.msr.pkrs) };
        if self.cr4 & enable == 0 {
            return 0;
        }
        register >> (2 * (pte >> KEY_SHIFT & 15)) & 3
    }

    /// SDM vol. 3, 4.6.2: keys restrict data accesses; writes by the supervisor with CR0.WP only.
    fn key_forbids(&self, rights: Rights, access: Access) -> bool {
        let write_disabled = rights.key & 2 != 0 && access.write && (access.user || self.cr0 & cr0::WP != 0);
        !access.exec && (rights.key & 1 != 0 || write_disabled)
    }

    /// After PKRU, IA32_PKRS changed: cached translations hold rights by the old keys.
    pub(crate) fn keys_changed(&mut self) {
        if self.cr4 & (cr4::PKE | cr4::PKS) != 0 {
            self.flush_all();
        }
    }

    /// SDM vol. 3, 4.6.1: whether the rights allow the access; if not, the error code's PK bit.
    fn check(&self, rights: Rights, access: Access) -> Result<(), u32> {
        let forbidden = if access.user {
            !rights.user || access.write && !rights.write
        } else if access.exec {
            rights.user && self.cr4 & cr4::SMEP != 0
        } else {
            rights.user && access.smap || access.write && !rights.write && self.cr0 & cr0::WP != 0
        };
        let by_key = self.key_forbids(rights, access);
        if forbidden || by_key || access.exec && rights.nx {
            Err(if by_key { pf::PK } else { 0 })
        } else {
            Ok(())
        }
    }

    fn page(&self, gpa: u64, rights: Rights, access: Access, dirty: bool) -> Page {
        let may = |write, exec| self.check(rights, Access { write, exec, ..access }).is_ok();
        Page {
            gpa,
            readable: may(false, false),
            writable: dirty && may(true, false),
            executable: may(false, true),
            global: false,
            large: false,
        }
    }

    /// SDM vol. 3, 4.10.2.4: what a leaf entry says, where CR4.PGE lets it.
    fn is_global(&self, pte: u64) -> bool {
        pte & G != 0 && self.cr4 & cr4::PGE != 0
    }

    /// Loads the PAE page-directory pointers from CR3; `false` when one has reserved bits set.
    pub fn load_pdptrs(&mut self) -> bool {
        let mut loaded = [0; 4];
        for (index, slot) in loaded.iter_mut().enumerate() {
            let at = (self.cr3 & 0xffff_ffe0) + 8 * index as u64;
            let Some(cell) = self.entry64(at) else {
                return false;
            };
            *slot = cell.load(Acquire);
            let reserved = !((1u64 << self.phys_bits) - 1) | 0x1e6;
            if *slot & P != 0 && *slot & reserved != 0 {
                return false;
            }
        }
        self.pdptr = loaded;
        true
    }

    /// The access rights of the current mode for a data access.
    pub(crate) fn access_now(&self, write: bool) -> Access {
        use super::mmu::Mode;
        Access { write, exec: false, user: self.tlb.mode == Mode::User, smap: self.tlb.mode == Mode::Smap }
    }

    /// Whether alignment checking is on (CR0.AM, RFLAGS.AC, an access of CPL 3's own).
    #[inline]
    pub fn alignment_checked(&self) -> bool {
        self.tlb.mode == super::mmu::Mode::User && self.cr0 & cr0::AM != 0 && self.sys_flags as u64 & rflags::AC != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::state::seg;
    use crate::cpu::testing::Bench;
    use crate::cpu::vector;

    const PAGE: u64 = 0x20_0000;

    /// The 2 MiB page at [`PAGE`] has key 2; `user` as all pages.
    fn bench(user: bool) -> Bench {
        let mut bench = Bench::new(8 << 20).long_mode(0x10_000, user);
        let entry = bench.word(0x3008) | 2 << KEY_SHIFT;
        bench.load(0x3008, &entry.to_le_bytes());
        bench.cpu.cr4 |= if user { cr4::PKE } else { cr4::PKS };
        bench
    }

    fn store(bench: &mut Bench) -> Option<u32> {
        let result = bench.cpu.wr(PAGE, 1u32, seg::DS);
        result.err().map(|_| {
            assert_eq!(bench.cpu.fault.vector, vector::PF);
            bench.cpu.fault.error.unwrap_or(0)
        })
    }

    fn load(bench: &mut Bench) -> bool {
        bench.cpu.rd::<u32>(PAGE, seg::DS).is_ok()
    }

    #[test]
    fn test_key_write_disabled_stops_user_writes_and_with_wp_the_supervisors() {
        let mut bench = bench(true);
        assert_eq!(store(&mut bench), None);
        bench.cpu.pkru = 0x20;
        bench.cpu.keys_changed();
        assert_eq!(store(&mut bench), Some(pf::P | pf::W | pf::PK));
        assert!(load(&mut bench));
        bench.cpu.cr0 &= !cr0::WP;
        assert_eq!(store(&mut bench), None);
        bench.cpu.flush_all();
        bench.cpu.cpl = 3;
        bench.cpu.update_mmu_mode();
        assert_eq!(store(&mut bench), Some(pf::P | pf::W | pf::U | pf::PK));
    }

    #[test]
    fn test_key_access_disabled_stops_loads_of_its_kind_of_pages_only() {
        for user in [true, false] {
            let mut bench = bench(user);
            (bench.cpu.pkru, bench.cpu.msr.pkrs) = if user { (0x10, 0) } else { (0, 0x10) };
            assert!(!load(&mut bench));
            (bench.cpu.pkru, bench.cpu.msr.pkrs) = (bench.cpu.msr.pkrs, bench.cpu.pkru);
            assert!(load(&mut bench));
        }
    }
}
