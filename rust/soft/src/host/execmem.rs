//! Memory for generated code: one memfd mapped twice, writable here, executable there, so that no
//! page is ever both (W^X). Allocation only moves forward; a full region is replaced by a new one,
//! and the old one is unmapped when the last piece of code in it has no user left.
//!
//! New code is never written over bytes that have run, so no serialising instruction is needed
//! between writing and running: the executable view of those bytes is fetched for the first time.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Code starts on such a boundary; it bounds the waste and keeps small thunks in one line.
const CODE_ALIGNMENT: usize = 32;
/// `MFD_EXEC` of Linux 6.3; older kernels refuse it and need no flag.
const MFD_EXEC: libc::c_uint = 0x0010;

/// One mapping of a memfd.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is plain memory owned by this value; nothing about it belongs to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared references only read the address; writing needs `&mut CodeWriter`.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: &OwnedFd, size: usize, protection: i32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses replaces nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast::<c_void>() != libc::MAP_FAILED => Ok(Self { start, size }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and size are those of a mapping that only this value owns.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// The executable view of a region. Whoever keeps a code address keeps this alive beside it.
#[derive(Debug)]
pub struct ExecView {
    _mapping: Mapping,
}

/// The writing side of a region of generated code.
#[derive(Debug)]
pub struct CodeWriter {
    writable: Mapping,
    code_start: NonNull<u8>,
    view: Arc<ExecView>,
    used: usize,
}

// SAFETY: `code_start` is an address inside `view`, which is Send and Sync.
unsafe impl Send for CodeWriter {}

impl CodeWriter {
    /// Maps an empty region of `size` bytes; pages are backed only once written.
    pub fn new(size: usize) -> io::Result<Self> {
        let fd = code_memfd()?;
        let length = libc::off_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: the descriptor is a memfd that this function owns.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = Mapping::new(&fd, size, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = Mapping::new(&fd, size, libc::PROT_READ | libc::PROT_EXEC)?;
        let code_start = executable.start;
        let view = Arc::new(ExecView { _mapping: executable });
        Ok(Self { writable, code_start, view, used: 0 })
    }

    /// Copies `code` in and returns its executable address, or `None` when the region is full.
    /// The address is valid as long as a clone of [`Self::view`] lives.
    pub fn push(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(CODE_ALIGNMENT);
        let end = start.checked_add(code.len())?;
        if end > self.writable.size {
            return None;
        }
        // SAFETY: start..end lies inside both mappings, and the bytes from `used` on were never
        // handed out, so nobody runs them.
        let address = unsafe {
            let to = self.writable.start.as_ptr().add(start);
            ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
            self.code_start.add(start)
        };
        self.used = end;
        Some(address)
    }

    /// Where the next code will be, in bytes from [`Self::start`].
    pub fn position(&self) -> usize {
        self.used.next_multiple_of(CODE_ALIGNMENT)
    }

    /// The executable address of the region's first byte.
    pub fn start(&self) -> NonNull<u8> {
        self.code_start
    }

    /// Bytes handed out.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Replaces four bytes of code at an offset: the displacement of a jump. Nobody may be executing
    /// that jump.
    pub fn patch(&mut self, offset: usize, value: i32) {
        if offset + 4 <= self.used {
            // SAFETY: the bytes lie inside the writable mapping.
            unsafe { self.writable.start.as_ptr().add(offset).cast::<i32>().write_unaligned(value) };
        }
    }

    /// Makes the code at an offset a jump to another offset; five bytes there are nobody else's. Nobody may be
    /// executing them.
    pub fn patch_jump(&mut self, from: usize, to: usize) {
        if from + 5 <= self.used {
            // SAFETY: the byte lies inside the writable mapping.
            unsafe { self.writable.start.as_ptr().add(from).write(0xe9) };
            self.patch(from + 1, (to as i32).wrapping_sub(from as i32 + 5));
        }
    }

    /// What keeps this region's code mapped.
    pub fn view(&self) -> Arc<ExecView> {
        Arc::clone(&self.view)
    }
}

fn code_memfd() -> io::Result<OwnedFd> {
    let name = c"ostler-code";
    for flags in [libc::MFD_CLOEXEC | MFD_EXEC, libc::MFD_CLOEXEC] {
        // SAFETY: the name is a C string; the call touches no other memory.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY: the descriptor is new and owned by nobody else.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(address: NonNull<u8>) -> u64 {
        // SAFETY: the tests push only `mov eax, imm32; ret` and keep the view alive.
        let function: extern "sysv64" fn() -> u64 = unsafe { std::mem::transmute(address) };
        function()
    }

    #[test]
    fn push_returns_code_that_runs() {
        let mut writer = CodeWriter::new(4096).expect("code memory");

        let first = writer.push(&[0xB8, 7, 0, 0, 0, 0xC3]).expect("room");
        let second = writer.push(&[0xB8, 8, 0, 0, 0, 0xC3]).expect("room");

        assert_eq!((call(first), call(second)), (7, 8));
    }

    #[test]
    fn push_beyond_the_region_returns_none_and_keeps_what_was_there() {
        let mut writer = CodeWriter::new(4096).expect("code memory");
        let first = writer.push(&[0xB8, 7, 0, 0, 0, 0xC3]).expect("room");

        assert_eq!(writer.push(&[0xCC; 4090]), None);

        assert_eq!(call(first), 7);
    }

    #[test]
    fn code_outlives_its_writer_while_the_view_lives() {
        let mut writer = CodeWriter::new(4096).expect("code memory");
        let code = writer.push(&[0xB8, 9, 0, 0, 0, 0xC3]).expect("room");
        let view = writer.view();

        drop(writer);

        assert_eq!(call(code), 9);
        drop(view);
    }
}
