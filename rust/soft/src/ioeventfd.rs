//! ioeventfds: guest writes that signal an eventfd instead of leaving the engine.
//!
//! Documentation/virt/kvm/api.rst, KVM_IOEVENTFD. An eventfd is known by the number user space
//! gave; the engine keeps a duplicate of it, so closing the original loses nothing.

use crate::ioctl::{get, Answer};
use kvm_bindings::*;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};

const DATAMATCH: u32 = 1 << kvm_ioeventfd_flag_nr_datamatch;
const PIO: u32 = 1 << kvm_ioeventfd_flag_nr_pio;
const DEASSIGN: u32 = 1 << kvm_ioeventfd_flag_nr_deassign;
/// Most of them in a VM (KVM's NR_IOBUS_DEVS).
const LIMIT: usize = 1000;

struct IoEvent {
    pio: bool,
    address: u64,
    /// 0: any length, the data does not matter.
    length: u32,
    datamatch: Option<u64>,
    number: i32,
    eventfd: OwnedFd,
}

impl IoEvent {
    fn matches(&self, pio: bool, address: u64, size: u8, value: u64) -> bool {
        self.pio == pio
            && self.address == address
            && (self.length == 0 || self.length == size as u32 && self.datamatch.is_none_or(|wanted| wanted == value))
    }

    /// Both would take some write.
    fn collides(&self, other: &Self) -> bool {
        let same_data = self.datamatch.is_none() || other.datamatch.is_none() || self.datamatch == other.datamatch;
        self.pio == other.pio
            && self.address == other.address
            && (self.length == 0 || other.length == 0 || self.length == other.length && same_data)
    }

    fn is(&self, other: &Self) -> bool {
        self.number == other.number
            && (self.pio, self.address, self.length, self.datamatch)
                == (other.pio, other.address, other.length, other.datamatch)
    }
}

/// A VM's ioeventfds.
#[derive(Default)]
pub(crate) struct IoEvents {
    list: RwLock<Arc<Vec<Arc<IoEvent>>>>,
}

impl IoEvents {
    fn list(&self) -> Arc<Vec<Arc<IoEvent>>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A guest write: signals the eventfd that wants it. `false` when none does.
    pub fn signal(&self, pio: bool, address: u64, size: u8, value: u64) -> bool {
        let list = self.list();
        let Some(event) = list.iter().find(|event| event.matches(pio, address, size, value)) else {
            return false;
        };
        let one = 1u64;
        // SAFETY: a valid descriptor and eight readable bytes. A full counter of a non-blocking
        // eventfd is signalled already.
        unsafe { libc::write(event.eventfd.as_raw_fd(), &one as *const u64 as *const libc::c_void, 8) };
        true
    }

    /// KVM_IOEVENTFD.
    pub fn request(&self, arg: &[u8]) -> Answer {
        let request: kvm_ioeventfd = get(arg)?;
        let known = request.flags & !(DATAMATCH | PIO | DEASSIGN) == 0;
        let length = matches!(request.len, 0 | 1 | 2 | 4 | 8);
        let range = request.addr.checked_add(request.len as u64).is_some();
        if !known || !length || !range || request.len == 0 && request.flags & DATAMATCH != 0 {
            return Err(libc::EINVAL);
        }
        let mask = if request.len == 8 { u64::MAX } else { (1u64 << (8 * request.len)) - 1 };
        let event = IoEvent {
            pio: request.flags & PIO != 0,
            address: request.addr,
            length: request.len,
            datamatch: (request.flags & DATAMATCH != 0).then_some(request.datamatch & mask),
            number: request.fd,
            eventfd: duplicate(request.fd)?,
        };
        let mut guard = self.list.write().unwrap_or_else(PoisonError::into_inner);
        let mut list = (**guard).clone();
        if request.flags & DEASSIGN != 0 {
            let at = list.iter().position(|other| other.is(&event)).ok_or(libc::ENOENT)?;
            list.remove(at);
        } else if list.iter().any(|other| other.collides(&event)) {
            return Err(libc::EEXIST);
        } else if list.len() >= LIMIT {
            return Err(libc::ENOSPC);
        } else {
            list.push(Arc::new(event));
        }
        *guard = Arc::new(list);
        Ok(0)
    }
}

/// A duplicate of an eventfd; EBADF for no descriptor, EINVAL for another kind.
fn duplicate(fd: i32) -> Answer<OwnedFd> {
    // SAFETY: any number may be asked for; the kernel checks it.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EBADF));
    }
    // SAFETY: fcntl just made it and nobody else has it.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    let kind = std::fs::read_link(format!("/proc/self/fd/{}", copy.as_raw_fd()));
    match kind {
        Ok(name) if name.as_os_str() != "anon_inode:[eventfd]" => Err(libc::EINVAL),
        _ => Ok(copy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioctl::put;

    fn eventfd() -> OwnedFd {
        // SAFETY: eventfd gives a new descriptor or -1.
        unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) }
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut value = 0u64;
        // SAFETY: eight writable bytes.
        unsafe { libc::read(fd.as_raw_fd(), &mut value as *mut u64 as *mut libc::c_void, 8) };
        value
    }

    fn assign(events: &IoEvents, fd: i32, addr: u64, len: u32, flags: u32, datamatch: u64) -> Answer {
        let mut arg = vec![0; 64];
        put(&mut arg, &kvm_ioeventfd { datamatch, addr, len, fd, flags, pad: [0; 36] }).unwrap();
        events.request(&arg)
    }

    #[test]
    fn test_signal_matches_length_data_and_bus() {
        let (events, one, two) = (IoEvents::default(), eventfd(), eventfd());
        assert_eq!(assign(&events, one.as_raw_fd(), 0x1000, 2, DATAMATCH, 7), Ok(0));
        assert_eq!(assign(&events, two.as_raw_fd(), 0x1000, 0, PIO, 0), Ok(0));
        assert!(!events.signal(false, 0x1000, 2, 8));
        assert!(!events.signal(false, 0x1000, 4, 7));
        assert!(!events.signal(false, 0x1002, 2, 7));
        assert!(events.signal(false, 0x1000, 2, 7));
        assert!(events.signal(true, 0x1000, 4, 99));
        assert_eq!((count(&one), count(&two)), (1, 1));
    }

    #[test]
    fn test_request_refuses_what_kvm_refuses() {
        let (events, fd) = (IoEvents::default(), eventfd());
        let fd = fd.as_raw_fd();
        assert_eq!(assign(&events, fd, 0, 3, 0, 0), Err(libc::EINVAL));
        assert_eq!(assign(&events, fd, 0, 0, DATAMATCH, 0), Err(libc::EINVAL));
        assert_eq!(assign(&events, fd, u64::MAX, 2, 0, 0), Err(libc::EINVAL));
        assert_eq!(assign(&events, fd, 0, 2, 1 << 9, 0), Err(libc::EINVAL));
        assert_eq!(assign(&events, -1, 0, 2, 0, 0), Err(libc::EBADF));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(assign(&events, file.as_raw_fd(), 0, 2, 0, 0), Err(libc::EINVAL));
        assert_eq!(assign(&events, fd, 0, 2, DEASSIGN, 0), Err(libc::ENOENT));
        assert_eq!(assign(&events, fd, 0, 2, DATAMATCH, 1), Ok(0));
        assert_eq!(assign(&events, fd, 0, 2, DATAMATCH, 2), Ok(0));
        assert_eq!(assign(&events, fd, 0, 2, DATAMATCH, 0x1_0001), Err(libc::EEXIST));
        assert_eq!(assign(&events, fd, 0, 2, 0, 0), Err(libc::EEXIST));
        assert_eq!(assign(&events, fd, 0, 2, DATAMATCH | DEASSIGN, 1), Ok(0));
        assert!(!events.signal(false, 0, 2, 1));
    }
}
