//! Listening: a process for each connection, and the reaping of everybody's orphans.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    accept4, bind, getpeername, listen, socket, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, VsockAddr,
};
use nix::unistd::{fork, ForkResult};

use crate::button;
use crate::conn::Conn;
use crate::descend;
use crate::message::Refusal;
use crate::power;
use crate::session::{self, Context};
use crate::wire::Kind;

/// Where the host looks for the agent.
pub const VSOCK_PORT: u32 = 1024;
/// What a connection's receiving side in the kernel may hold, in bytes; as much as the device's queue of buffers.
static VSOCK_BUFFER: u64 = 1 << 20;
// linux/vm_sockets.h.
const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;
/// The console port that stands in where there is no vsock.
pub const CONSOLE_PORT: &str = "org.ostler.agent";
/// More connections than this at once are turned away.
const CONNECTIONS: usize = 64;
/// How often a console port is looked at while no host has it open.
const PORT_PAUSE: Duration = Duration::from_millis(100);
/// How long a host must have said nothing to be taken for a new one, in milliseconds.
const PORT_SILENCE_MS: u16 = 200;
/// A console port that has not appeared after so many looks will not.
const PORT_LOOKS: u32 = 300;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket in the file system, for tests.
    Unix(PathBuf),
    /// A port of the virtual machine.
    Vsock(u32),
    /// A named port of the virtio console.
    Console(String),
}

impl Place {
    /// `unix:PATH`, `vsock`, `vsock:PORT`, `console`, `console:NAME`.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest)));
        match (kind, rest) {
            ("unix", Some(path)) => Some(Self::Unix(path.into())),
            ("vsock", None) => Some(Self::Vsock(VSOCK_PORT)),
            ("vsock", Some(port)) => port.parse().ok().map(Self::Vsock),
            ("console", name) => Some(Self::Console(name.unwrap_or(CONSOLE_PORT).into())),
            _ => None,
        }
    }
}

/// The agent at work.
pub struct Server {
    listeners: Vec<OwnedFd>,
    console: Option<String>,
    context: Context,
    signals: SignalFd,
    connections: HashSet<i32>,
    console_process: Option<i32>,
    /// Power buttons; none until their drivers are loaded.
    buttons: Option<Vec<File>>,
}

impl Server {
    /// Opens what is to be listened on. A place that cannot be is an error only if nothing else is left.
    pub fn open(places: &[Place], context: Context) -> io::Result<Self> {
        let mut listeners = Vec::new();
        let mut console = None;
        let mut trouble = None;
        for place in places {
            match place {
                Place::Console(name) => console = Some(name.clone()),
                Place::Unix(path) => listeners.push(UnixListener::bind(path)?.into()),
                Place::Vsock(port) => match open_vsock(*port) {
                    Ok(fd) => listeners.push(fd),
                    Err(error) => trouble = Some(error),
                },
            }
        }
        if listeners.is_empty() && console.is_none() {
            return Err(trouble.unwrap_or_else(|| io::Error::from(io::ErrorKind::InvalidInput)));
        }
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR] {
            mask.add(signal);
        }
        nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        // Beside an image's own init, the button is that one's.
        let buttons = if context.is_init { None } else { Some(Vec::new()) };
        Ok(Self { listeners, console, context, signals, connections: HashSet::new(), console_process: None, buttons })
    }

    /// Serves until a signal ends it.
    pub fn run(mut self) -> io::Result<()> {
        self.start_console();
        loop {
            let ready = self.wait()?;
            let (listeners, rest) = ready.split_at(self.listeners.len());
            if self.must_end()? {
                return Ok(());
            }
            if rest.contains(&true) && self.is_powered_off() {
                power::power_off();
            }
            for (index, _) in listeners.iter().enumerate().filter(|(_, ready)| **ready) {
                self.accept(index);
            }
        }
    }

    /// Waits for something to do; what is ready: the listeners in their order, then buttons and drivers, then signals.
    fn wait(&mut self) -> io::Result<Vec<bool>> {
        let buttons = self.buttons.as_deref().unwrap_or_default();
        let late = if self.buttons.is_none() { self.context.late.done_fd() } else { None };
        let others = buttons.iter().map(AsFd::as_fd).chain(late).chain([self.signals.as_fd()]);
        let fds = self.listeners.iter().map(AsFd::as_fd).chain(others);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether somebody pressed the power button, which is there once its driver is.
    fn is_powered_off(&mut self) -> bool {
        if self.context.is_init && self.buttons.is_none() && self.context.late.is_done() {
            self.buttons = Some(button::open());
        }
        self.buttons.iter().flatten().any(button::was_pressed)
    }

    /// Takes signals; true where one of them ends the agent.
    fn must_end(&mut self) -> io::Result<bool> {
        while let Some(signal) = self.signals.read_signal()? {
            if signal.ssi_signo != libc::SIGCHLD as u32 {
                if self.context.is_init {
                    power::power_off();
                }
                return Ok(true);
            }
        }
        let (connections, console) = (&mut self.connections, &mut self.console_process);
        descend::reap(|pid, _| {
            connections.remove(&pid);
            if *console == Some(pid) {
                *console = None;
            }
        });
        Ok(false)
    }

    fn accept(&mut self, index: usize) {
        let Ok(fd) = accept4(self.listeners[index].as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { return };
        // SAFETY: accept gave this descriptor to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if !is_from_host(&fd) {
            return;
        }
        let Ok(mut conn) = Conn::new(fd) else { return };
        if self.connections.len() >= CONNECTIONS {
            conn.queue(Kind::Error, 0, b"{\"code\":\"busy\",\"message\":\"agent: too many connections\"}");
            let _ = conn.flush_some();
            return;
        }
        let context = self.context.clone();
        let serve = move || session::serve(&mut conn, &context);
        let child = self.child(serve);
        self.connections.extend(child);
    }

    /// Serves the console port in a process that never ends, one host after the other.
    fn start_console(&mut self) {
        let Some(name) = self.console.clone() else { return };
        let context = self.context.clone();
        self.console_process = self.child(move || serve_port(&name, &context));
    }

    /// Runs `work` in a child that holds none of the agent's own descriptors.
    fn child(&mut self, work: impl FnOnce()) -> Option<i32> {
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                self.listeners.clear();
                self.buttons = None;
                let _ = SigSet::all().thread_unblock();
                descend::become_reaper();
                work();
                std::process::exit(0);
            }
            Ok(ForkResult::Parent { child }) => Some(child.as_raw()),
            Err(error) => {
                crate::boot::complain(&Refusal::io("fork", &error.into()).message);
                None
            }
        }
    }
}

/// Whether a connection may give orders. By the kernel's loopback any process of the guest can reach the agent, too, and
/// guests of a guest can; only the host may. Who can open a UNIX socket is its file system's matter.
fn is_from_host(fd: &OwnedFd) -> bool {
    match getpeername::<SockaddrStorage>(fd.as_raw_fd()) {
        Ok(address) => address.as_vsock_addr().is_none_or(|vsock| vsock.cid() == libc::VMADDR_CID_HOST),
        Err(_) => false,
    }
}

fn open_vsock(port: u32) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Best effort: with less room copies are slower, no more.
    let _ = set_buffer(&fd);
    bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd)
}

/// Room for what the host sends; connections inherit the listener's.
///
/// Linux tells the sender of new room only when less than 64 KiB are left, so with its usual 256 KiB a copy stands still
/// once for every 192 KiB, until both sides have been scheduled.
fn set_buffer(fd: &OwnedFd) -> io::Result<()> {
    let size = std::mem::size_of_val(&VSOCK_BUFFER) as libc::socklen_t;
    for option in [SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE] {
        // SAFETY: the option's value is eight bytes, which is what is pointed to.
        let result = unsafe {
            libc::setsockopt(fd.as_raw_fd(), libc::AF_VSOCK, option, std::ptr::from_ref(&VSOCK_BUFFER).cast(), size)
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn serve_port(name: &str, context: &Context) {
    let mut looks = 0;
    let path = loop {
        if let Some(path) = find_port(name) {
            break path;
        }
        looks += 1;
        if looks > PORT_LOOKS {
            return;
        }
        std::thread::sleep(PORT_PAUSE);
    };
    // Held open: opening and closing it would be told to the host each time.
    let Ok(port) = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path) else { return };
    loop {
        let mut fds = [PollFd::new(port.as_fd(), PollFlags::POLLIN)];
        let found = poll(&mut fds, PollTimeout::NONE).ok().and_then(|_| fds[0].revents());
        if found.is_some_and(|found| found.contains(PollFlags::POLLIN) && !found.contains(PollFlags::POLLHUP)) {
            if let Ok(mut conn) = port.try_clone().and_then(|fd| Conn::new(fd.into())) {
                session::serve(&mut conn, context);
            }
            discard(&port);
        }
        std::thread::sleep(PORT_PAUSE);
    }
}

/// Reads what a host still says after its session, until it is silent or gone: the next one must not meet it.
fn discard(port: &File) {
    let mut rest = vec![0; 1 << 16];
    loop {
        let mut fds = [PollFd::new(port.as_fd(), PollFlags::POLLIN)];
        let has_more = poll(&mut fds, PORT_SILENCE_MS).is_ok_and(|count| count > 0);
        if !has_more || !nix::unistd::read(port, &mut rest).is_ok_and(|count| count > 0) {
            return;
        }
    }
}

/// The device of a named console port. udev would make a link of that name, but there may be no udev.
fn find_port(name: &str) -> Option<PathBuf> {
    let folder = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let found = folder
        .flatten()
        .find(|entry| fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim_end() == name))?;
    Some(Path::new("/dev").join(found.file_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_places_are_read() {
        assert_eq!(Place::parse("vsock"), Some(Place::Vsock(1024)));
        assert_eq!(Place::parse("unix:/tmp/a:b"), Some(Place::Unix("/tmp/a:b".into())));
        assert_eq!(Place::parse("console"), Some(Place::Console(CONSOLE_PORT.into())));
        assert_eq!(Place::parse("tcp:1"), None);
        assert_eq!(Place::parse("vsock:x"), None);
    }
}
