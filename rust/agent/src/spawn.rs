//! Starting one command: user, environment, folder, terminal or pipes, a session of its own.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::pty::{openpty, Winsize};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal};
use serde::Deserialize;

use crate::message::{reason, Bytes, Refusal, Size};
use crate::users::{self, User};

/// Where commands are looked for if the host does not say.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The terminal a command asks for.
#[derive(Deserialize)]
pub struct Terminal {
    /// Its size.
    #[serde(flatten)]
    pub size: Size,
    /// Its type, for `TERM`.
    #[serde(default)]
    pub term: Option<Bytes>,
}

/// A request to run a command.
#[derive(Deserialize)]
pub struct Request {
    /// The command and its arguments.
    pub argv: Vec<Bytes>,
    /// Variables, in addition to the user's own.
    #[serde(default)]
    pub env: Vec<(Bytes, Bytes)>,
    /// The folder it starts in; else the user's home folder where that exists.
    #[serde(default)]
    pub cwd: Option<Bytes>,
    /// `name` or `uid`, perhaps `:group`; else whoever the agent is.
    #[serde(default)]
    pub user: Option<String>,
    /// A terminal instead of pipes.
    #[serde(default)]
    pub tty: Option<Terminal>,
    /// Whether standard input comes from the host; else it is empty.
    #[serde(default)]
    pub stdin: bool,
    /// After so many milliseconds it is killed with everything it started.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// A started command; the descriptors are the agent's ends.
pub struct Running {
    /// The process, leader of its session.
    pub child: Child,
    /// Where its standard input goes.
    pub stdin: Option<OwnedFd>,
    /// Where its standard output comes from.
    pub stdout: Option<OwnedFd>,
    /// Where its standard error comes from; none where a terminal carries both.
    pub stderr: Option<OwnedFd>,
    /// Whether the descriptors are a terminal's.
    pub is_tty: bool,
}

/// Starts the command.
pub fn start(request: &Request) -> Result<Running, Refusal> {
    let name = request.argv.first().ok_or_else(|| Refusal::new("bad-request", "command: empty"))?.to_os();
    let user = request.user.as_deref().map(|wish| users::find(wish, Path::new("/etc"))).transpose()?;
    let mut command = Command::new(&name);
    command.args(request.argv[1..].iter().map(Bytes::to_os));
    let folder = folder(request, user.as_ref())?;
    command.current_dir(&folder).env_clear().envs(environment(request, user.as_ref()));
    let terminal = request.tty.as_ref().map(|tty| open_terminal(tty.size)).transpose()?;
    let (master, slave) = terminal.unzip();
    match &slave {
        Some(slave) => {
            let copy = || slave.try_clone().map_err(|error| Refusal::io("terminal", &error));
            command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
        }
        None => {
            command.stdin(if request.stdin { Stdio::piped() } else { Stdio::null() });
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
    }
    become_the_command(&mut command, user, slave.is_some());
    let mut child = command.spawn().map_err(|error| refusal(&name, &error))?;
    let (stdin, stdout, stderr) = match master {
        Some(master) => {
            let copy = master.try_clone().map_err(|error| Refusal::io("terminal", &error))?;
            (Some(copy), Some(master), None)
        }
        None => (
            child.stdin.take().map(Into::into),
            child.stdout.take().map(Into::into),
            child.stderr.take().map(Into::into),
        ),
    };
    Ok(Running { child, stdin, stdout, stderr, is_tty: slave.is_some() })
}

/// Says what must happen between fork and exec.
fn become_the_command(command: &mut Command, user: Option<User>, is_tty: bool) {
    let prepare = move || {
        nix::unistd::setsid()?;
        if is_tty {
            // SAFETY: standard input is a terminal this process opened, and the request takes no memory.
            if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        if let Some(user) = &user {
            let groups: Vec<_> = user.groups.iter().map(|gid| nix::unistd::Gid::from_raw(*gid)).collect();
            // Whoever is not root can only become itself, and has no need to.
            if nix::unistd::geteuid().is_root() {
                nix::unistd::setgroups(&groups)?;
            }
            nix::unistd::setgid(user.gid.into())?;
            nix::unistd::setuid(user.uid.into())?;
        }
        // Ignored signals stay so over an exec, and a command is not to be deaf because whoever started the agent was.
        for signal in Signal::iterator().filter(|each| !matches!(each, Signal::SIGKILL | Signal::SIGSTOP)) {
            // SAFETY: no handler is installed.
            unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
        }
        nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        Ok(())
    };
    // SAFETY: this process has one thread, so the child may allocate and call anything between fork and exec.
    unsafe { command.pre_exec(prepare) };
}

fn open_terminal(size: Size) -> Result<(OwnedFd, OwnedFd), Refusal> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pair = openpty(&size, None).map_err(|error| Refusal::io("terminal", &error.into()))?;
    for fd in [&pair.master, &pair.slave] {
        // A terminal that other commands inherit would never end.
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
            .map_err(|error| Refusal::io("terminal", &error.into()))?;
    }
    Ok((pair.master, pair.slave))
}

fn folder(request: &Request, user: Option<&User>) -> Result<PathBuf, Refusal> {
    let Some(wish) = &request.cwd else {
        let home = user.map(|user| PathBuf::from(&user.home)).or_else(|| std::env::var_os("HOME").map(PathBuf::from));
        return Ok(home.filter(|home| home.is_dir()).unwrap_or_else(|| "/".into()));
    };
    let path = wish.to_path();
    match fs::metadata(&path) {
        Ok(found) if found.is_dir() => Ok(path),
        Ok(_) => Err(Refusal::new("no-folder", format!("folder {}: not a folder", path.display()))),
        Err(error) => Err(Refusal::new("no-folder", format!("folder {}: {}", path.display(), reason(&error)))),
    }
}

fn environment(request: &Request, user: Option<&User>) -> Vec<(OsString, OsString)> {
    let mut all: Vec<(OsString, OsString)> = vec![("PATH".into(), PATH.into())];
    if let Some(user) = user {
        let name = user.name.clone().unwrap_or_else(|| user.uid.to_string().into());
        all.push(("HOME".into(), user.home.clone()));
        all.push(("USER".into(), name.clone()));
        all.push(("LOGNAME".into(), name));
        all.push(("SHELL".into(), user.shell.clone()));
    } else if let Some(home) = std::env::var_os("HOME") {
        all.push(("HOME".into(), home));
    }
    if let Some(tty) = &request.tty {
        all.push(("TERM".into(), tty.term.as_ref().map_or_else(|| "linux".into(), Bytes::to_os)));
    }
    all.extend(request.env.iter().map(|(name, value)| (name.to_os(), value.to_os())));
    all
}

/// Why a command could not be executed, as a shell would say it.
fn refusal(name: &OsString, error: &io::Error) -> Refusal {
    let shown = Path::new(name).display();
    match error.raw_os_error() {
        // A script whose interpreter is missing gives ENOENT too, although the script is there.
        Some(libc::ENOENT) if Path::new(name).components().count() > 1 && Path::new(name).exists() => {
            Refusal::new("command-not-executable", format!("{shown}: its interpreter is not in the guest"))
        }
        Some(libc::ENOENT | libc::ENOTDIR) => {
            Refusal::new("command-not-found", format!("{shown}: command not found in the guest"))
        }
        Some(libc::EACCES) if !is_found(Path::new(name)) => {
            Refusal::new("command-not-found", format!("{shown}: command not found in the guest"))
        }
        Some(libc::EPERM) => Refusal::new("denied", format!("{shown}: the agent may not become that user")),
        Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ETXTBSY | libc::ELIBBAD) => {
            Refusal::new("command-not-executable", format!("{shown}: {}", reason(error)))
        }
        _ => Refusal::io(shown, error),
    }
}

/// Whether there is such a file; a bare name was looked for in folders that may be closed to the user.
fn is_found(name: &Path) -> bool {
    name.components().count() > 1 || PATH.split(':').any(|folder| Path::new(folder).join(name).exists())
}

/// Makes reads and writes of a descriptor return at once.
pub fn never_block(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: plain flag operations on a descriptor that `fd` keeps open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
