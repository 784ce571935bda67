//! The operation `shutdown`: power off or restart, as the guest's first process or through it.

use std::collections::HashSet;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::reboot::{reboot, RebootMode};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::json;

use crate::conn::Conn;
use crate::descend;
use crate::message::{parse, Outcome, Refusal};
use crate::mounts;
use crate::session::Context;
use crate::wire::Kind;

/// systemd's own signals for its two ends: SIGRTMIN+4 and +5.
const SYSTEMD_POWER_OFF: i32 = 4;
const SYSTEMD_REBOOT: i32 = 5;

/// systemd gives a service 90 s to end.
const INIT_LIMIT: Duration = Duration::from_secs(120);
const ASK_AGAIN: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    PowerOff,
    Reboot,
}

#[derive(Deserialize)]
struct Request {
    mode: Mode,
    /// How long processes may take to end after SIGTERM.
    #[serde(default = "default_grace_ms")]
    grace_ms: u64,
}

fn default_grace_ms() -> u64 {
    5_000
}

/// Answers, then ends the guest; does not return.
pub fn serve(conn: &mut Conn, payload: &[u8], context: &Context) -> Outcome<()> {
    let request: Request = parse(payload)?;
    if !context.is_init && std::process::id() != 1 && !nix::unistd::geteuid().is_root() {
        return Err(Refusal::new("denied", "shutdown: the agent is not root").into());
    }
    if context.is_init {
        conn.send_json(Kind::Reply, &json!({"by": "agent"}))?;
        end(request.mode, Duration::from_millis(request.grace_ms.min(600_000)));
    }
    let by = own_init();
    conn.send_json(Kind::Reply, &json!({"by": by}))?;
    ask_init(&by, request.mode);
    // The image's init had its time, and ignored or lost it: this guest is to end now.
    end(request.mode, Duration::from_millis(request.grace_ms.min(600_000)))
}

/// The program that is process 1.
fn own_init() -> String {
    let path = std::fs::read_link("/proc/1/exe").unwrap_or_default();
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Asks process 1 again and again: while it is still starting it hears no signal and has no socket.
fn ask_init(by: &str, mode: Mode) {
    let deadline = Instant::now() + INIT_LIMIT;
    while Instant::now() < deadline {
        if by == "systemd" {
            let number = libc::SIGRTMIN() + if mode == Mode::Reboot { SYSTEMD_REBOOT } else { SYSTEMD_POWER_OFF };
            // SAFETY: sends a signal; no memory is involved.
            unsafe { libc::kill(1, number) };
        } else {
            let program = if mode == Mode::Reboot { "reboot" } else { "poweroff" };
            let null = std::process::Stdio::null;
            let _ = Command::new(program).env("PATH", crate::spawn::PATH).stdout(null()).stderr(null()).status();
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

/// Powers off because the kernel or the command line asked for it.
pub fn power_off() -> ! {
    end(Mode::PowerOff, Duration::from_millis(default_grace_ms()))
}

fn end(mode: Mode, grace: Duration) -> ! {
    end_processes(grace);
    nix::unistd::sync();
    unmount();
    nix::unistd::sync();
    let mode = if mode == Mode::Reboot { RebootMode::RB_AUTOBOOT } else { RebootMode::RB_POWER_OFF };
    let _ = reboot(mode);
    // A kernel that cannot power off is left halted; whoever started the guest sees that it does nothing.
    loop {
        nix::unistd::pause();
    }
}

/// Everybody but this process: asked, then made to end.
fn end_processes(grace: Duration) {
    let everybody = Pid::from_raw(-1);
    // The kernel spares this process and PID 1.
    let _ = kill(everybody, Signal::SIGTERM);
    let _ = kill(everybody, Signal::SIGCONT);
    let deadline = Instant::now() + grace;
    while Instant::now() < deadline && others() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = kill(everybody, Signal::SIGKILL);
}

/// Whether any process with a program is left, but for PID 1 and this one.
fn others() -> bool {
    descend::reap(|_, _| ());
    let spared = HashSet::from([1, nix::unistd::getpid().as_raw()]);
    descend::everybody().any(|pid| !spared.contains(&pid))
}

/// Unmounts what can be, the last mount first, and makes the rest read-only.
fn unmount() {
    let keep = ["/", "/proc", "/sys", "/dev"];
    for mount_point in mounts::all().iter().rev().filter(|found| !keep.contains(&found.target.as_str())) {
        let _ = umount2(mount_point.target.as_str(), MntFlags::MNT_DETACH);
    }
    let _ = mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>);
}
