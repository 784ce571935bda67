//! Memory slots and dirty logs: KVM_SET_USER_MEMORY_REGION, GET_DIRTY_LOG, CLEAR_DIRTY_LOG.
//!
//! A change publishes a new slot map and returns when no vCPU uses an older one, so user space may
//! unmap what it took out. A dirty log's bits are fetched first and write translations dropped
//! after, before the request returns: a store in between is in memory by then, and the pages
//! fetched are read later than that.

use super::caps::{MANUAL_PROTECT_FLAGS, MAX_SLOTS};
use super::{get, Answer};
use crate::clock::lock;
use crate::mem::{zeroed_words, Slot, SlotMap, PAGE_SIZE};
use crate::vm::Machine;
use kvm_bindings::*;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::Arc;

/// KVM_MEM_MAX_NR_PAGES.
const MAX_PAGES: u64 = (1 << 31) - 1;
/// Guest-physical addresses end here (MAXPHYADDR offered to guests at most).
const MAX_GPA: u64 = 1 << 52;
/// User addresses end here.
const MAX_HVA: u64 = (1 << 47) - PAGE_SIZE;

/// What slot changes are serialised by.
#[derive(Default)]
pub(crate) struct Memory {
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2's flags in force.
    pub manual_protect: u32,
}

fn changed(slot: &Slot, gpa: u64, dirty: Option<Arc<[AtomicU64]>>) -> Slot {
    Slot {
        id: slot.id,
        gpa,
        size: slot.size,
        host: slot.host,
        read_only: slot.read_only,
        dirty,
        code: slot.code.clone(),
    }
}

fn new_log(size: u64, manual_protect: u32) -> Arc<[AtomicU64]> {
    let log = zeroed_words(Slot::bitmap_words(size));
    if manual_protect & KVM_DIRTY_LOG_INITIALLY_SET != 0 {
        let pages = size / PAGE_SIZE;
        for (index, word) in log.iter().enumerate() {
            let left = pages - 64 * index as u64;
            word.store(if left >= 64 { u64::MAX } else { (1 << left) - 1 }, Relaxed);
        }
    }
    log
}

fn check(region: &kvm_userspace_memory_region) -> Answer<()> {
    let aligned = |value: u64| value.is_multiple_of(PAGE_SIZE);
    let (gpa, size, host) = (region.guest_phys_addr, region.memory_size, region.userspace_addr);
    let flags = region.flags & !(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) == 0;
    let ranges = gpa.checked_add(size).is_some_and(|end| end <= MAX_GPA)
        && host.checked_add(size).is_some_and(|end| end <= MAX_HVA)
        && size / PAGE_SIZE <= MAX_PAGES;
    if region.slot >= MAX_SLOTS || !flags || !aligned(gpa | size | host) || !ranges {
        return Err(libc::EINVAL);
    }
    Ok(())
}

/// Whether user space has something mapped at all of these pages: a slot over a hole would end the
/// process at the guest's first access.
fn mapped(host: u64, size: u64) -> bool {
    // SAFETY: MS_ASYNC writes nothing; the kernel only walks the mappings of the range.
    unsafe { libc::msync(host as *mut libc::c_void, size as usize, libc::MS_ASYNC) == 0 }
}

/// The slot of that number.
fn find(map: &SlotMap, id: u32) -> Answer<&Arc<Slot>> {
    map.slots().iter().find(|slot| slot.id == id).ok_or(libc::ENOENT)
}

impl Machine {
    /// KVM_SET_USER_MEMORY_REGION.
    pub(crate) fn set_memory_region(&self, arg: &[u8]) -> Answer {
        let region: kvm_userspace_memory_region = get(arg)?;
        check(&region)?;
        let memory = lock(&self.memory);
        let map = self.slots();
        let old = find(&map, region.slot).ok();
        let new = match (old, region.memory_size) {
            (None, 0) => return Err(libc::EINVAL),
            (Some(_), 0) => None,
            (None, _) => Some(created(&region, &memory)?),
            (Some(old), _) => match altered(old, &region, &memory)? {
                Some(slot) => Some(slot),
                None => return Ok(0),
            },
        };
        let mut slots: Vec<_> = map.slots().iter().filter(|slot| slot.id != region.slot).cloned().collect();
        if let Some(new) = new {
            if slots.iter().any(|slot| slot.gpa < new.gpa + new.size && new.gpa < slot.gpa + slot.size) {
                return Err(libc::EEXIST);
            }
            slots.push(Arc::new(new));
        }
        self.publish(Arc::new(SlotMap::new(slots)))
    }

    fn publish(&self, map: Arc<SlotMap>) -> Answer {
        self.replace_slots(map.clone());
        if self.peers.publish_slots(&map) {
            Ok(0)
        } else {
            Err(libc::EBUSY)
        }
    }

    fn drop_write_translations(&self) -> Answer {
        if self.peers.drop_write_translations() {
            Ok(0)
        } else {
            Err(libc::EBUSY)
        }
    }

    /// KVM_GET_DIRTY_LOG: one bit a page to user space, cleared here unless protection is manual.
    pub(crate) fn get_dirty_log(&self, arg: &[u8]) -> Answer {
        let request: kvm_dirty_log = get(arg)?;
        if request.slot >= MAX_SLOTS {
            return Err(libc::EINVAL);
        }
        let memory = lock(&self.memory);
        let map = self.slots();
        let log = find(&map, request.slot)?.dirty.as_ref().ok_or(libc::ENOENT)?;
        let manual = memory.manual_protect & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        let fetched: Vec<u64> =
            log.iter().map(|word| if manual { word.load(Acquire) } else { word.swap(0, AcqRel) }).collect();
        if !manual && fetched.iter().any(|&word| word != 0) {
            self.drop_write_translations()?;
        }
        // SAFETY: the union's members are a pointer and its number.
        let to = unsafe { request.__bindgen_anon_1.padding2 };
        copy_to_user(to, &fetched).inspect_err(|_| {
            // Nobody has seen them: they are dirty still.
            for (word, bits) in log.iter().zip(&fetched) {
                word.fetch_or(*bits, AcqRel);
            }
        })?;
        Ok(0)
    }

    /// KVM_CLEAR_DIRTY_LOG: only with manual protection.
    pub(crate) fn clear_dirty_log(&self, arg: &[u8]) -> Answer {
        let request: kvm_clear_dirty_log = get(arg)?;
        if request.slot >= MAX_SLOTS || !request.first_page.is_multiple_of(64) {
            return Err(libc::EINVAL);
        }
        let _memory = lock(&self.memory);
        let map = self.slots();
        let slot = find(&map, request.slot)?;
        let log = slot.dirty.as_ref().ok_or(libc::ENOENT)?;
        let (pages, first, count) = (slot.size / PAGE_SIZE, request.first_page, request.num_pages as u64);
        let to_the_end = first.checked_add(count) == Some(pages);
        if first > pages || count > pages - first || !count.is_multiple_of(64) && !to_the_end {
            return Err(libc::EINVAL);
        }
        // SAFETY: the union's members are a pointer and its number.
        let from = unsafe { request.__bindgen_anon_1.padding2 };
        let mut bits = vec![0u64; count.div_ceil(64) as usize];
        copy_from_user(from, &mut bits)?;
        for (word, bits) in log[(first / 64) as usize..].iter().zip(bits) {
            word.fetch_and(!bits, AcqRel);
        }
        self.drop_write_translations()
    }

    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    pub(crate) fn set_manual_protect(&self, flags: u64) -> Answer {
        let initially_alone = flags == KVM_DIRTY_LOG_INITIALLY_SET as u64;
        if flags & !(MANUAL_PROTECT_FLAGS as u64) != 0 || initially_alone {
            return Err(libc::EINVAL);
        }
        lock(&self.memory).manual_protect = flags as u32;
        Ok(0)
    }
}

fn created(region: &kvm_userspace_memory_region, memory: &Memory) -> Answer<Slot> {
    let size = region.memory_size;
    if !mapped(region.userspace_addr, size) {
        return Err(libc::EFAULT);
    }
    Ok(Slot {
        id: region.slot,
        gpa: region.guest_phys_addr,
        size,
        host: region.userspace_addr as *mut u8,
        read_only: region.flags & KVM_MEM_READONLY != 0,
        dirty: (region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0).then(|| new_log(size, memory.manual_protect)),
        code: zeroed_words((size / PAGE_SIZE) as usize),
    })
}

/// A slot may move and its log be switched; nothing else may change. `None`: nothing does.
fn altered(old: &Slot, region: &kvm_userspace_memory_region, memory: &Memory) -> Answer<Option<Slot>> {
    let same = old.host as u64 == region.userspace_addr
        && old.size == region.memory_size
        && old.read_only == (region.flags & KVM_MEM_READONLY != 0);
    if !same {
        return Err(libc::EINVAL);
    }
    let logs = region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0;
    if old.gpa == region.guest_phys_addr && old.dirty.is_some() == logs {
        return Ok(None);
    }
    let dirty = match (&old.dirty, logs) {
        (Some(log), true) => Some(log.clone()),
        (None, true) => Some(new_log(old.size, memory.manual_protect)),
        (_, false) => None,
    };
    Ok(Some(changed(old, region.guest_phys_addr, dirty)))
}

/// Copies to an address user space gave, which may be anything: EFAULT instead of a signal.
fn copy_to_user(to: u64, words: &[u64]) -> Answer<()> {
    transfer(to, words.as_ptr() as u64, size_of_val(words), libc::SYS_process_vm_writev)
}

fn copy_from_user(from: u64, words: &mut [u64]) -> Answer<()> {
    let bytes = size_of_val(words);
    transfer(from, words.as_mut_ptr() as u64, bytes, libc::SYS_process_vm_readv)
}

fn transfer(user: u64, ours: u64, bytes: usize, call: libc::c_long) -> Answer<()> {
    let area = |at: u64| libc::iovec { iov_base: at as *mut libc::c_void, iov_len: bytes };
    let (local, remote) = (area(ours), area(user));
    // SAFETY: `ours` is a live slice of that many bytes; the kernel checks `user` and gives EFAULT.
    let done = unsafe { libc::syscall(call, libc::getpid(), &local, 1usize, &remote, 1usize, 0usize) };
    if done == bytes as i64 {
        return Ok(());
    }
    Err(if done >= 0 { libc::EFAULT } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EFAULT) })
}
