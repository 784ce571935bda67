//! One connection to the host: frames in, frames out, over any stream descriptor.
//!
//! The descriptor never blocks. Operations that have nothing else to watch use [`Conn::recv`] and [`Conn::send`], which
//! wait; a command's loop uses [`Conn::read_some`], [`Conn::queue`] and [`Conn::flush_some`] between polls.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use serde::Serialize;

use crate::message::{Failure, Refusal};
use crate::wire::{head, Decoder, Frame, Kind, MAX_PAYLOAD};

/// Above this many unsent bytes a command's output is not read any more: a slow host slows the command.
pub const QUEUE_LIMIT: usize = 256 * 1024;

/// A connection that carries frames.
pub struct Conn {
    fd: OwnedFd,
    decoder: Decoder,
    unsent: Vec<u8>,
    chunk: Vec<u8>,
    ended: bool,
}

impl Conn {
    /// Takes over a connected descriptor.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { fd, decoder: Decoder::default(), unsent: Vec::new(), chunk: vec![0; MAX_PAYLOAD], ended: false })
    }

    /// The descriptor, for polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the host ended the connection.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// How many bytes wait to be sent.
    pub fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Returns the next frame that is whole already, without reading.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Failure> {
        self.decoder.next().map_err(|error| Failure::Lost(io::Error::new(ErrorKind::InvalidData, error)))
    }

    /// Waits for the next frame; `None` where the host ended the connection.
    pub fn recv(&mut self) -> Result<Option<Frame>, Failure> {
        loop {
            if let Some(frame) = self.next_frame()? {
                return Ok(Some(frame));
            }
            if self.ended {
                return Ok(None);
            }
            self.wait(PollFlags::POLLIN, PollTimeout::NONE)?;
            self.read_some()?;
        }
    }

    /// Waits until something can be read or the connection ended, at most `timeout`; false where it is over.
    pub fn readable(&mut self, timeout: PollTimeout) -> Result<bool, Failure> {
        self.wait(PollFlags::POLLIN, timeout)
    }

    /// Reads once, if there is something; at the end of the connection sets [`Conn::ended`].
    pub fn read_some(&mut self) -> Result<(), Failure> {
        match nix::unistd::read(&self.fd, &mut self.chunk) {
            Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN | Errno::ESHUTDOWN) => self.ended = true,
            Ok(count) => self.decoder.feed(&self.chunk[..count]),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(Failure::Lost(error.into())),
        }
        Ok(())
    }

    /// Sends a frame, waiting until the host took it. `payload` is at most [`MAX_PAYLOAD`] bytes long.
    pub fn send(&mut self, kind: Kind, stream: u8, payload: &[u8]) -> Result<(), Failure> {
        self.queue(kind, stream, payload);
        while !self.unsent.is_empty() {
            self.flush_some()?;
            if !self.unsent.is_empty() {
                self.wait(PollFlags::POLLOUT, PollTimeout::NONE)?;
            }
        }
        Ok(())
    }

    /// Sends a frame of JSON.
    pub fn send_json(&mut self, kind: Kind, value: &impl Serialize) -> Result<(), Failure> {
        let payload = serde_json::to_vec(value).map_err(io::Error::from)?;
        if payload.len() > MAX_PAYLOAD {
            return Err(Refusal::new("too-long", format!("answer of {} bytes: too long", payload.len())).into());
        }
        self.send(kind, 0, &payload)
    }

    /// Puts a frame behind what waits to be sent.
    pub fn queue(&mut self, kind: Kind, stream: u8, payload: &[u8]) {
        debug_assert!(payload.len() <= MAX_PAYLOAD);
        self.unsent.extend_from_slice(&head(kind, stream, payload.len()));
        self.unsent.extend_from_slice(payload);
    }

    /// Sends what goes without waiting.
    pub fn flush_some(&mut self) -> Result<(), Failure> {
        let mut sent = 0;
        let result = loop {
            if sent == self.unsent.len() {
                break Ok(());
            }
            match nix::unistd::write(&self.fd, &self.unsent[sent..]) {
                Ok(count) => sent += count,
                Err(Errno::EAGAIN) => break Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => break Err(Failure::Lost(error.into())),
            }
        };
        self.unsent.drain(..sent);
        result
    }

    fn wait(&mut self, flags: PollFlags, timeout: PollTimeout) -> Result<bool, Failure> {
        loop {
            let mut fds = [PollFd::new(self.fd.as_fd(), flags)];
            match poll(&mut fds, timeout) {
                Ok(count) => {
                    let found = fds[0].revents().unwrap_or(PollFlags::empty());
                    // A console port whose host end is closed can be neither written nor waited for.
                    if flags == PollFlags::POLLOUT && !found.contains(flags) && !found.is_empty() {
                        return Err(io::Error::from(ErrorKind::BrokenPipe).into());
                    }
                    return Ok(count > 0);
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(Failure::Lost(error.into())),
            }
        }
    }
}
