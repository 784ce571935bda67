//! The page a vCPU shares with user space: `struct kvm_run`, and a page of port data behind it.
//!
//! User space writes it while the vCPU runs (`immediate_exit`) and completes exits in it, so every
//! access is volatile and nothing read from it is trusted beyond its own width.

use crate::cpu::Exit;
use kvm_bindings::*;
use std::mem::offset_of;
use std::ptr::null_mut;

const PAGE: usize = 4096;
/// KVM_GET_VCPU_MMAP_SIZE.
pub(crate) const RUN_PAGE_BYTES: usize = 2 * PAGE;
/// Where port data lies.
const DATA: usize = PAGE;
/// Where the union of exits lies.
const EXITS: usize = offset_of!(kvm_run, __bindgen_anon_1);

type IoExit = kvm_run__bindgen_ty_1__bindgen_ty_4;
type MmioExit = kvm_run__bindgen_ty_1__bindgen_ty_6;
const MMIO_DATA: usize = EXITS + offset_of!(MmioExit, data);

/// The shared pages, mapped for as long as the vCPU lives.
pub(crate) struct RunPage {
    address: *mut u8,
}

// SAFETY: shared memory accessed with volatile operations only.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by new() with this size; nobody else unmaps it.
        unsafe { libc::munmap(self.address.cast(), RUN_PAGE_BYTES) };
    }
}

impl RunPage {
    /// Zeroed pages; `None` when the host has none.
    pub fn new() -> Option<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping.
        let address = unsafe { libc::mmap(null_mut(), RUN_PAGE_BYTES, access, flags, -1, 0) };
        (address != libc::MAP_FAILED).then_some(Self { address: address.cast() })
    }

    /// Where it is.
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    fn read<T: Copy>(&self, offset: usize) -> T {
        debug_assert!(offset + size_of::<T>() <= RUN_PAGE_BYTES && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: within the mapping and aligned; T is an integer or an array of bytes.
        unsafe { self.address.add(offset).cast::<T>().read_volatile() }
    }

    fn write<T: Copy>(&self, offset: usize, value: T) {
        debug_assert!(offset + size_of::<T>() <= RUN_PAGE_BYTES && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: within the mapping and aligned.
        unsafe { self.address.add(offset).cast::<T>().write_volatile(value) };
    }

    /// User space wants `run` to return at once.
    pub fn immediate_exit(&self) -> bool {
        self.read::<u8>(offset_of!(kvm_run, immediate_exit)) != 0
    }

    /// User space wants to know when it may inject an interrupt.
    pub fn request_interrupt_window(&self) -> bool {
        self.read::<u8>(offset_of!(kvm_run, request_interrupt_window)) != 0
    }

    /// CR8 as user space sets it, without an in-engine local APIC.
    pub fn cr8(&self) -> u64 {
        self.read(offset_of!(kvm_run, cr8))
    }

    /// `exit_reason`.
    pub fn set_reason(&self, reason: u32) {
        self.write(offset_of!(kvm_run, exit_reason), reason);
    }

    /// The fields that follow the vCPU's state.
    pub fn publish(&self, interruptible: bool, ready: bool, cr8: u64, apic_base: u64) {
        self.write(offset_of!(kvm_run, if_flag), interruptible as u8);
        self.write(offset_of!(kvm_run, ready_for_interrupt_injection), ready as u8);
        self.write(offset_of!(kvm_run, cr8), cr8);
        self.write(offset_of!(kvm_run, apic_base), apic_base);
    }

    /// Describes an exit.
    pub fn fill(&self, exit: &Exit) {
        let reason = match *exit {
            Exit::Io { port, size, write } => {
                let direction = if write.is_some() { KVM_EXIT_IO_OUT } else { KVM_EXIT_IO_IN } as u8;
                self.write(EXITS, IoExit { direction, size, port, count: 1, data_offset: DATA as u64 });
                self.write(DATA, write.unwrap_or(0));
                KVM_EXIT_IO
            }
            Exit::Mmio { gpa, size, write } => {
                let data = write.unwrap_or(0).to_le_bytes();
                let is_write = write.is_some() as u8;
                self.write(EXITS, MmioExit { phys_addr: gpa, data, len: size as u32, is_write });
                KVM_EXIT_MMIO
            }
            Exit::Hlt => KVM_EXIT_HLT,
            Exit::Shutdown => KVM_EXIT_SHUTDOWN,
            Exit::Debug { exception, pc, dr6, dr7 } => {
                let arch = kvm_debug_exit_arch { exception: exception as u32, pad: 0, pc, dr6, dr7 };
                self.write(EXITS, arch);
                KVM_EXIT_DEBUG
            }
            Exit::Internal(_) => {
                self.write(EXITS, [KVM_INTERNAL_ERROR_EMULATION, 0]);
                KVM_EXIT_INTERNAL_ERROR
            }
        };
        self.set_reason(reason);
    }

    /// What user space supplied for a read exit.
    pub fn answer(&self, exit: &Exit) -> u64 {
        let (value, size) = match *exit {
            Exit::Io { size, .. } => (self.read::<u32>(DATA) as u64, size),
            Exit::Mmio { size, .. } => (u64::from_le_bytes(self.read(MMIO_DATA)), size),
            _ => (0, 0),
        };
        if size >= 8 {
            value
        } else {
            value & ((1 << (8 * size)) - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_fill_io_write_puts_data_where_it_says() {
        let page = RunPage::new().unwrap();
        page.fill(&Exit::Io { port: 0x3f8, size: 2, write: Some(0x1234) });
        let io: IoExit = page.read(EXITS);
        assert_eq!((io.direction as u32, io.size, io.port, io.count), (KVM_EXIT_IO_OUT, 2, 0x3f8, 1));
        assert_eq!(page.read::<u16>(io.data_offset as usize), 0x1234);
        assert_eq!(page.read::<u32>(offset_of!(kvm_run, exit_reason)), KVM_EXIT_IO);
    }

    #[test]
    fn test_answer_keeps_only_the_bytes_asked_for() {
        let page = RunPage::new().unwrap();
        let exit = Exit::Mmio { gpa: 0x1000, size: 2, write: None };
        page.fill(&exit);
        page.write(MMIO_DATA, [0xffu8; 8]);
        assert_eq!(page.answer(&exit), 0xffff);
        page.write(DATA, u32::MAX);
        assert_eq!(page.answer(&Exit::Io { port: 1, size: 1, write: None }), 0xff);
    }

    #[test]
    fn test_fill_mmio_write_of_a_byte_carries_it_first() {
        let page = RunPage::new().unwrap();
        page.fill(&Exit::Mmio { gpa: 0xd000_0000, size: 1, write: Some(0x5a) });
        let mmio: MmioExit = page.read(EXITS);
        assert_eq!((mmio.phys_addr, mmio.data[0], mmio.len, mmio.is_write), (0xd000_0000, 0x5a, 1, 1));
    }
}
