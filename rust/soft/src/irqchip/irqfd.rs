//! irqfd: eventfds that interrupt the guest without anybody calling in.
//!
//! One thread per VM waits for all of them with epoll. An ordinary irqfd pulses its GSI; one with a
//! resample eventfd raises it, and when the guest ends the interrupt lowers it again and signals
//! the resample eventfd, so that the device can raise it anew.
//! The descriptors are duplicated: a caller that closes its own without KVM_IRQFD_FLAG_DEASSIGN
//! keeps the irqfd alive, where KVM would drop it with the last reference.

use super::shared::{Shared, SOURCE_RESAMPLE, SOURCE_USER};
use super::{lock, IrqError};
use kvm_bindings::{kvm_irqfd, KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// The epoll token of the eventfd that ends the thread.
const STOP: u64 = 0;

/// Which eventfd a descriptor is, whatever its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    /// The kernel's number of the eventfd.
    Eventfd(u64),
    /// Only the descriptor's number is known (no /proc, or an old kernel).
    Descriptor(RawFd),
}

struct Entry {
    token: u64,
    identity: Identity,
    gsi: u32,
    event: OwnedFd,
    resample: Option<OwnedFd>,
}

#[derive(Default)]
struct Registry {
    entries: Vec<Entry>,
    last_token: u64,
}

/// All irqfds of a VM.
pub(crate) struct Irqfds {
    registry: Mutex<Registry>,
    /// How many resample, so that an EOI need not take the lock where none does.
    resamplers: AtomicUsize,
    epoll: OwnedFd,
    stop: OwnedFd,
}

impl Irqfds {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no pointers are passed; the result is checked.
        let epoll = own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: no pointers are passed; the result is checked.
        let stop = own(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        epoll_add(&epoll, &stop, STOP)?;
        Ok(Self { registry: Mutex::default(), resamplers: AtomicUsize::new(0), epoll, stop })
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        signal(&self.stop);
    }

    /// KVM_IRQFD.
    pub(crate) fn request(&self, request: &kvm_irqfd) -> Result<(), IrqError> {
        let fd = request.fd as RawFd;
        let known = KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE;
        if request.flags & !known != 0 {
            return Err(refused(fd, "unknown flags", libc::EINVAL));
        }
        let identity = identify(fd)?;
        if request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            self.remove(identity, request.gsi);
            return Ok(());
        }
        let resample = if request.flags & KVM_IRQFD_FLAG_RESAMPLE != 0 {
            let resample_fd = request.resamplefd as RawFd;
            identify(resample_fd)?;
            Some(duplicate(resample_fd)?)
        } else {
            None
        };
        self.add(identity, request.gsi, duplicate(fd)?, resample).map_err(|error| match error {
            AddError::Busy => refused(fd, "the eventfd is an irqfd already", libc::EBUSY),
            AddError::Host(source) => IrqError::Host { what: "an epoll entry", source },
        })
    }

    fn add(&self, identity: Identity, gsi: u32, event: OwnedFd, resample: Option<OwnedFd>) -> Result<(), AddError> {
        let mut registry = lock(&self.registry);
        if registry.entries.iter().any(|entry| entry.identity == identity) {
            return Err(AddError::Busy);
        }
        registry.last_token += 1;
        let token = registry.last_token;
        // An eventfd that is signalled already is reported at once, as with KVM.
        epoll_add(&self.epoll, &event, token).map_err(AddError::Host)?;
        if resample.is_some() {
            self.resamplers.fetch_add(1, SeqCst);
        }
        registry.entries.push(Entry { token, identity, gsi, event, resample });
        Ok(())
    }

    /// Removes the irqfd, if there is one. The thread injects with the registry locked, so nothing
    /// of it is under way when this returns.
    fn remove(&self, identity: Identity, gsi: u32) {
        let mut registry = lock(&self.registry);
        registry.entries.retain(|entry| {
            let keep = entry.identity != identity || entry.gsi != gsi;
            if !keep {
                epoll_remove(&self.epoll, &entry.event);
                if entry.resample.is_some() {
                    self.resamplers.fetch_sub(1, SeqCst);
                }
            }
            keep
        });
    }

    /// The guest ended an interrupt of `gsi`: lower the line and let the devices raise it again.
    pub(crate) fn acknowledged(&self, shared: &Shared, gsi: u32) {
        if self.resamplers.load(SeqCst) == 0 {
            return;
        }
        let registry = lock(&self.registry);
        let resamples = |entry: &&Entry| entry.gsi == gsi && entry.resample.is_some();
        if registry.entries.iter().any(|entry| resamples(&entry)) {
            shared.set_line(SOURCE_RESAMPLE, gsi, false);
        }
        for entry in registry.entries.iter().filter(resamples) {
            if let Some(resample) = &entry.resample {
                signal(resample);
            }
        }
    }

    /// The eventfd with this token is readable.
    fn inject(&self, shared: &Shared, token: u64) {
        let registry = lock(&self.registry);
        let Some(entry) = registry.entries.iter().find(|entry| entry.token == token) else {
            return;
        };
        drain(&entry.event);
        if entry.resample.is_some() {
            shared.set_line(SOURCE_RESAMPLE, entry.gsi, true);
        } else {
            shared.set_line(SOURCE_USER, entry.gsi, true);
            shared.set_line(SOURCE_USER, entry.gsi, false);
        }
    }

    /// Serves events until the stop eventfd is signalled.
    fn serve(&self, shared: &Shared) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
        loop {
            // SAFETY: the buffer has room for as many events as its length says.
            let count = unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as libc::c_int, -1)
            };
            let Ok(count) = usize::try_from(count) else {
                if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return;
            };
            for event in &events[..count] {
                match event.u64 {
                    STOP => return,
                    token => self.inject(shared, token),
                }
            }
        }
    }
}

enum AddError {
    Busy,
    Host(io::Error),
}

/// Starts the thread that serves `shared`'s irqfds until [`Irqfds::stop`].
pub(crate) fn spawn(shared: Arc<Shared>) -> Result<JoinHandle<()>, IrqError> {
    thread::Builder::new()
        .name("irqfd".into())
        .spawn(move || shared.irqfds.serve(&shared))
        .map_err(|source| IrqError::Host { what: "a thread", source })
}

fn refused(fd: RawFd, reason: &'static str, errno: i32) -> IrqError {
    IrqError::Irqfd { fd, reason, errno }
}

fn own(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh from the kernel and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn duplicate(fd: RawFd) -> Result<OwnedFd, IrqError> {
    if fd < 0 {
        return Err(refused(fd, "it is not open", libc::EBADF));
    }
    // SAFETY: the number was checked not to be negative; the kernel checks that it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|source| IrqError::Host { what: "a copy of the descriptor", source })
}

/// Finds out which eventfd `fd` is.
fn identify(fd: RawFd) -> Result<Identity, IrqError> {
    // SAFETY: no pointers are passed; any number is answered.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(refused(fd, "it is not open", libc::EBADF));
    }
    let Ok(info) = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) else {
        return Ok(Identity::Descriptor(fd));
    };
    if !info.contains("eventfd-count:") {
        return Err(refused(fd, "it is not an eventfd", libc::EINVAL));
    }
    let number =
        info.lines().find_map(|line| line.strip_prefix("eventfd-id:")).and_then(|text| text.trim().parse().ok());
    Ok(number.map_or(Identity::Descriptor(fd), Identity::Eventfd))
}

fn epoll_add(epoll: &OwnedFd, fd: &OwnedFd, token: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
    // SAFETY: `event` outlives the call.
    let result = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &mut event) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn epoll_remove(epoll: &OwnedFd, fd: &OwnedFd) {
    // SAFETY: EPOLL_CTL_DEL ignores the event. It cannot fail: the descriptor is open and added.
    unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd.as_raw_fd(), std::ptr::null_mut()) };
}

/// Adds one to an eventfd.
fn signal(fd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight bytes are read from `one`. A counter at its maximum is signalled already.
    unsafe { libc::write(fd.as_raw_fd(), std::ptr::from_ref(&one).cast(), 8) };
}

/// Resets an eventfd's counter. The descriptor may be a blocking one and somebody else may have
/// read it meanwhile, so the read must not wait.
fn drain(fd: &OwnedFd) {
    let mut count = 0u64;
    let buffer = libc::iovec { iov_base: std::ptr::from_mut(&mut count).cast(), iov_len: 8 };
    // SAFETY: `buffer` describes the eight bytes of `count`.
    let result = unsafe { libc::preadv2(fd.as_raw_fd(), &buffer, 1, -1, libc::RWF_NOWAIT) };
    if result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
        // A kernel before 5.8. epoll has just said that there is something to read.
        // SAFETY: eight bytes are written to `count`.
        unsafe { libc::read(fd.as_raw_fd(), std::ptr::from_mut(&mut count).cast(), 8) };
    }
}
