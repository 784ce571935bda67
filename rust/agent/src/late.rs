//! Work that the first answer need not wait for, such as loading drivers nobody needs to reach the root.
//!
//! It is done in a process of its own that holds one end of a pipe. Whoever depends on it waits for the other end to say
//! that nobody holds it any more; that works for any number of waiting processes and cannot be forgotten.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::{fork, ForkResult};

/// The longest anybody waits, in milliseconds.
const LIMIT_MS: u16 = 30_000;

/// Work in the background; `Default` is work that is done.
#[derive(Clone, Default)]
pub struct Late(Option<Rc<OwnedFd>>);

impl Late {
    /// Does `work` in a child. Where that is not possible it is done at once.
    pub fn start(work: impl FnOnce()) -> Self {
        let Ok((reader, writer)) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC) else {
            work();
            return Self::default();
        };
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                drop(reader);
                work();
                std::process::exit(0);
            }
            Ok(ForkResult::Parent { .. }) => {
                drop(writer);
                Self(Some(Rc::new(reader)))
            }
            Err(_) => {
                work();
                Self::default()
            }
        }
    }

    /// What becomes readable when the work is done; none where it is.
    pub fn done_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|fd| fd.as_fd())
    }

    /// Whether it is done.
    pub fn is_done(&self) -> bool {
        self.0.as_ref().is_none_or(|fd| {
            poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|count| count > 0)
        })
    }

    /// Waits until the work is done, within reason.
    pub fn wait(&self) {
        if let Some(fd) = &self.0 {
            let _ = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(LIMIT_MS));
        }
    }
}
