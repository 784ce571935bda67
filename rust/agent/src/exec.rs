//! The operation `exec`: one command, its streams, its end.
//!
//! One thread polls the connection, the command's descriptors and SIGCHLD. Nothing is buffered without a bound: output
//! is read only while the host has room for it and the connection's queue is short; input only within the window
//! the host was given. When the command itself has ended, what it had written is passed on; daemons it leaves behind
//! live on and are not waited for. When the time is over, or the host is gone, everything it started is killed.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{kill, killpg, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;
use serde_json::{json, Value};

use crate::conn::{Conn, QUEUE_LIMIT};
use crate::descend;
use crate::message::{parse, Failure, Outcome, Refusal, SignalNumber, Size};
use crate::spawn::{self, Request, Running};
use crate::wire::{Frame, Kind, MAX_PAYLOAD, WINDOW};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// How long a command whose host is gone may take to react to SIGHUP.
const HANGUP_GRACE: Duration = Duration::from_secs(1);
/// A terminal's output reaches its master a little later, so after the command's end it is read until it is silent or
/// nobody holds it any more.
const TERMINAL_LINGER: Duration = Duration::from_millis(50);
/// End of input, typed on a terminal.
const CTRL_D: u8 = 4;

/// Runs the command of a request to its end and tells the host.
pub fn serve(conn: &mut Conn, payload: &[u8], children: &SignalFd) -> Outcome<()> {
    let request: Request = parse(payload)?;
    // Daemons that an earlier command on this connection left behind are not this command's.
    let has_children = descend::reap(|_, _| ());
    let spared = if has_children { descend::descendants(&HashSet::new()) } else { HashSet::new() };
    let running = spawn::start(&request)?;
    let deadline = request.timeout_ms.and_then(|limit| Instant::now().checked_add(Duration::from_millis(limit)));
    let mut session = Session::new(running, spared, deadline)?;
    let started = conn.send_json(Kind::Reply, &json!({"pid": session.pid.as_raw()}));
    let end = started.and_then(|()| session.attend(conn, children));
    if end.is_err() {
        session.hang_up();
    }
    end
}

/// One of the command's outputs.
struct Output {
    stream: u8,
    fd: Option<OwnedFd>,
    /// How much the host takes, in bytes.
    room: usize,
    /// How much was written before the command ended; none while it runs.
    left: Option<usize>,
}

/// A command under way.
struct Session {
    pid: Pid,
    stdin: Option<OwnedFd>,
    pending: VecDeque<u8>,
    stdin_ended: bool,
    outputs: [Output; 2],
    is_tty: bool,
    spared: HashSet<i32>,
    deadline: Option<Instant>,
    status: Option<descend::RawStatus>,
    timed_out: bool,
    /// When the terminal of a command that has ended is given up although others hold it.
    linger: Option<Instant>,
    buffer: Vec<u8>,
}

impl Session {
    fn new(running: Running, spared: HashSet<i32>, deadline: Option<Instant>) -> Result<Self, Failure> {
        let pid = Pid::from_raw(running.child.id() as i32);
        for fd in [&running.stdin, &running.stdout, &running.stderr].into_iter().flatten() {
            spawn::never_block(fd)?;
        }
        let output = |stream, fd| Output { stream, fd, room: WINDOW, left: None };
        Ok(Self {
            pid,
            stdin: running.stdin,
            pending: VecDeque::new(),
            stdin_ended: false,
            outputs: [output(STDOUT, running.stdout), output(STDERR, running.stderr)],
            is_tty: running.is_tty,
            spared,
            deadline,
            status: None,
            timed_out: false,
            linger: None,
            buffer: vec![0; MAX_PAYLOAD],
        })
    }

    /// Passes everything on until the command has ended and its output is with the host.
    fn attend(&mut self, conn: &mut Conn, children: &SignalFd) -> Outcome<()> {
        loop {
            while let Some(frame) = conn.next_frame()? {
                self.take(conn, &frame)?;
            }
            if conn.ended() {
                return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
            }
            self.feed_stdin(conn);
            // Before the outputs: once the command has ended, they have to be read without waiting for more.
            self.notice_end(children)?;
            for index in 0..self.outputs.len() {
                self.pass_on(conn, index);
            }
            conn.flush_some()?;
            if self.is_over() && conn.unsent() == 0 {
                return conn.send_json(Kind::Exit, &self.exit());
            }
            self.wait(conn, children)?;
        }
    }

    fn is_over(&self) -> bool {
        self.status.is_some() && self.outputs.iter().all(|output| output.fd.is_none())
    }

    /// Sleeps until one of the descriptors has something to do, or the time is over.
    fn wait(&mut self, conn: &mut Conn, children: &SignalFd) -> Outcome<()> {
        let mut flags = PollFlags::POLLIN;
        if conn.unsent() > 0 {
            flags |= PollFlags::POLLOUT;
        }
        let mut fds: Vec<PollFd> =
            vec![PollFd::new(conn.fd(), flags), PollFd::new(children.as_fd(), PollFlags::POLLIN)];
        let can_queue = conn.unsent() < QUEUE_LIMIT;
        for output in self.outputs.iter().filter(|output| output.room > 0 && can_queue) {
            fds.extend(output.fd.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        }
        if !self.pending.is_empty() {
            fds.extend(self.stdin.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLOUT)));
        }
        match poll(&mut fds, self.timeout()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        if fds[0]
            .revents()
            .is_some_and(|found| found.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR))
        {
            conn.read_some()?;
        }
        Ok(())
    }

    fn timeout(&self) -> PollTimeout {
        let next = if self.status.is_none() { self.deadline } else { self.linger };
        let Some(deadline) = next else { return PollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
        PollTimeout::try_from(left.min(60_000) as i32).unwrap_or(PollTimeout::MAX)
    }

    /// A frame of the host's.
    fn take(&mut self, conn: &mut Conn, frame: &Frame) -> Outcome<()> {
        match frame.kind {
            Kind::Data if frame.stream == STDIN => {
                if self.pending.len() + frame.payload.len() > WINDOW {
                    return Err(protocol("more standard input than there was room for"));
                }
                self.stdin_ended |= frame.payload.is_empty();
                self.pending.extend(&frame.payload);
                if self.stdin.is_none() {
                    self.drop_input(conn);
                }
            }
            Kind::Window => {
                let size = frame.payload.as_slice().try_into().map(u32::from_le_bytes);
                let size = size.map_err(|_| protocol("WINDOW without a size"))? as usize;
                let output = self.outputs.iter_mut().find(|output| output.stream == frame.stream);
                let output = output.ok_or_else(|| protocol("WINDOW for a stream that is not an output"))?;
                output.room = (output.room + size).min(WINDOW);
            }
            Kind::Signal => {
                let wish: SignalNumber = parse(&frame.payload)?;
                let signal =
                    Signal::try_from(wish.signal).map_err(|_| protocol("SIGNAL with a number that is none"))?;
                self.signal(signal);
            }
            Kind::Resize => self.resize(parse(&frame.payload)?),
            // Another host, on a console port: whoever wanted this command is gone.
            Kind::Hello => return Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
            _ => return Err(protocol("a frame that no running command takes")),
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        if self.status.is_some() {
            return; // its number may be somebody else's by now
        }
        let foreground = self.outputs[0].fd.as_ref().filter(|_| self.is_tty);
        let group = foreground.and_then(|fd| nix::unistd::tcgetpgrp(fd).ok()).filter(|group| group.as_raw() > 0);
        if killpg(group.unwrap_or(self.pid), signal).is_err() {
            let _ = kill(self.pid, signal);
        }
    }

    fn resize(&self, size: Size) {
        let Some(fd) = self.outputs[0].fd.as_ref().filter(|_| self.is_tty) else { return };
        let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the request reads one winsize, which lives on this stack.
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    }

    /// Writes standard input as far as it goes, and gives the host room for what went.
    fn feed_stdin(&mut self, conn: &mut Conn) {
        let mut written = 0;
        while let (Some(fd), false) = (&self.stdin, self.pending.is_empty()) {
            match nix::unistd::write(fd, self.pending.as_slices().0) {
                Ok(count) => {
                    self.pending.drain(..count);
                    written += count;
                }
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                // Nobody reads it: that is the command's decision, and what is sent from now on is dropped.
                Err(_) => self.stdin = None,
            }
        }
        give_room(conn, written);
        if self.stdin.is_none() {
            self.drop_input(conn);
        } else if self.stdin_ended && self.pending.is_empty() {
            self.end_stdin();
        }
    }

    fn end_stdin(&mut self) {
        let Some(fd) = self.stdin.as_ref().filter(|_| self.is_tty) else {
            self.stdin = None;
            return;
        };
        // A terminal that takes nothing now is asked again when something else happens.
        self.stdin_ended = nix::unistd::write(fd, &[CTRL_D]) == Err(Errno::EAGAIN);
    }

    fn drop_input(&mut self, conn: &mut Conn) {
        give_room(conn, self.pending.len());
        self.pending.clear();
    }

    /// Reads one output and queues it for the host.
    fn pass_on(&mut self, conn: &mut Conn, index: usize) {
        let output = &mut self.outputs[index];
        let buffer = &mut self.buffer;
        while let Some(fd) = &output.fd {
            let limit = output.room.min(output.left.unwrap_or(usize::MAX)).min(buffer.len());
            if output.left == Some(0) {
                output.end(conn);
                return;
            }
            if limit == 0 || conn.unsent() >= QUEUE_LIMIT {
                return;
            }
            match nix::unistd::read(fd, &mut buffer[..limit]) {
                Ok(0) => output.end(conn),
                Ok(count) => {
                    conn.queue(Kind::Data, output.stream, &buffer[..count]);
                    output.room -= count;
                    output.left = output.left.map(|left| left - count);
                }
                Err(Errno::EAGAIN) if self.linger.is_some_and(|end| Instant::now() >= end) => output.end(conn),
                Err(Errno::EAGAIN) if output.left.is_none() => return,
                Err(Errno::EINTR) => {}
                // EIO is how a terminal's master says that nobody holds the terminal any more.
                Err(_) => output.end(conn),
            }
        }
    }

    /// Looks whether the command has ended, or must.
    fn notice_end(&mut self, children: &SignalFd) -> Outcome<()> {
        while children.read_signal().map_err(io::Error::from)?.is_some() {}
        if self.status.is_none() {
            let (pid, status) = (self.pid, &mut self.status);
            descend::reap(|ended, how| {
                if ended == pid.as_raw() {
                    *status = Some(how)
                }
            });
        }
        if self.status.is_none() && self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.timed_out = true;
            self.kill_all();
        }
        if self.status.is_some() {
            self.stdin = None;
            if self.is_tty {
                self.linger = self.linger.or_else(|| Some(Instant::now() + TERMINAL_LINGER));
                return Ok(());
            }
            for output in &mut self.outputs {
                output.left = output.left.or_else(|| output.fd.as_ref().map(|fd| waiting_bytes(fd.as_fd())));
            }
        }
        Ok(())
    }

    fn kill_all(&mut self) {
        let (pid, status) = (self.pid, &mut self.status);
        descend::kill_all(&self.spared, |ended, how| {
            if ended == pid.as_raw() {
                *status = Some(how)
            }
        });
    }

    /// The host is gone: a word of warning, then the end.
    fn hang_up(&mut self) {
        if self.status.is_none() {
            let _ = killpg(self.pid, Signal::SIGHUP);
            let _ = killpg(self.pid, Signal::SIGCONT); // a stopped process hears nothing else
        }
        for output in &mut self.outputs {
            output.fd = None;
        }
        self.stdin = None;
        let end = Instant::now() + HANGUP_GRACE;
        while Instant::now() < end && !descend::descendants(&self.spared).is_empty() {
            descend::reap(|_, _| ());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill_all();
    }

    fn exit(&self) -> Value {
        let (code, signal) = match self.status {
            Some(status) if libc::WIFEXITED(status) => (Some(libc::WEXITSTATUS(status)), None),
            Some(status) => (None, Some(libc::WTERMSIG(status))),
            None => (None, Some(libc::SIGKILL)),
        };
        json!({"code": code, "signal": signal, "timed_out": self.timed_out})
    }
}

impl Output {
    fn end(&mut self, conn: &mut Conn) {
        self.fd = None;
        conn.queue(Kind::Data, self.stream, &[]);
    }
}

fn give_room(conn: &mut Conn, size: usize) {
    if size > 0 {
        conn.queue(Kind::Window, STDIN, &(size as u32).to_le_bytes());
    }
}

/// How much can be read from a pipe or terminal right now, in bytes.
fn waiting_bytes(fd: BorrowedFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, which lives on this stack.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut count) };
    if result < 0 {
        0
    } else {
        count.max(0) as usize
    }
}

fn protocol(what: &str) -> Failure {
    Refusal::new("bad-request", format!("protocol: {what}")).into()
}
