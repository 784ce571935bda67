//! Everything a command started, however it tried to get away: found by descent and killed.
//!
//! The process that serves a connection is a "child subreaper": whatever its descendants do (new sessions, double forks),
//! they stay below it. So killing all of them is a walk over `/proc`, repeated until there is nobody left, and needs no
//! cgroups.

use std::collections::{HashMap, HashSet};
use std::fs;

use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::unistd::{getpid, Pid};

/// A status as `waitpid` gives it.
pub type RawStatus = i32;

/// Rounds of killing; between two, the dying get 2 ms. A fork bomb loses long before.
const ROUNDS: u32 = 2000;

/// Makes this process the one its orphaned descendants come to.
pub fn become_reaper() {
    // Kernels since 3.4 know it. One that does not would only let daemons of commands go to PID 1.
    let _ = nix::sys::prctl::set_child_subreaper(true);
}

/// All living processes below this one, but for those below (or in) `spared`.
pub fn descendants(spared: &HashSet<i32>) -> HashSet<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for (pid, parent, state) in processes() {
        if state != b'Z' {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = HashSet::new();
    let mut open = vec![getpid().as_raw()];
    while let Some(parent) = open.pop() {
        for child in children.get(&parent).into_iter().flatten() {
            if !spared.contains(child) && found.insert(*child) {
                open.push(*child);
            }
        }
    }
    found
}

/// Kills every descendant that is not spared, and reaps; `on_end` hears of each that ended.
pub fn kill_all(spared: &HashSet<i32>, mut on_end: impl FnMut(i32, RawStatus)) {
    for _ in 0..ROUNDS {
        let targets = descendants(spared);
        for pid in &targets {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        reap(&mut on_end);
        if targets.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Takes the exit status of every child that has ended; false where there is no child left.
pub fn reap(mut on_end: impl FnMut(i32, RawStatus)) -> bool {
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one int, which lives on this stack. (The safe wrapper of `nix` reaps a child that a
        // real-time signal killed, but then reports an error instead of that child.)
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
            0 => return true,
            pid if pid > 0 => on_end(pid, status),
            _ if Errno::last() == Errno::EINTR => {}
            _ => return false,
        }
    }
}

/// Yields process, parent and state of everything in `/proc`.
fn processes() -> impl Iterator<Item = (i32, i32, u8)> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read(entry.path().join("stat")).ok()?;
        // The name in parentheses may hold anything, parentheses too: the last one ends it.
        let after = stat.iter().rposition(|byte| *byte == b')')? + 2;
        let mut fields = stat.get(after..)?.split(|byte| *byte == b' ');
        let state = *fields.next()?.first()?;
        Some((pid, std::str::from_utf8(fields.next()?).ok()?.parse().ok()?, state))
    })
}

/// All processes that have a program, kernel threads and the dead left out.
pub fn everybody() -> impl Iterator<Item = i32> {
    processes().filter(|(pid, _, state)| *state != b'Z' && is_program(*pid)).map(|(pid, _, _)| pid)
}

fn is_program(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}
