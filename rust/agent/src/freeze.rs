//! The operations `freeze` and `thaw`: file systems that hold still for a snapshot.
//!
//! A freeze belongs to the connection that asked for it. It ends by `thaw` on that connection, by the connection's end,
//! or at its limit, whichever is first: a host that dies in mid-snapshot leaves no guest that hangs. `thaw` on another
//! connection thaws what is frozen, whoever did it.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde::Deserialize;
use serde_json::{json, Value};

use crate::message::{parse, Outcome, Refusal};
use crate::mounts;

/// `FIFREEZE` and `FITHAW` of linux/fs.h: `_IOWR('X', 119, int)` and 120.
const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;
/// The longest a file system may be frozen, in milliseconds.
const LONGEST_MS: u64 = 600_000;

#[derive(Deserialize)]
struct Request {
    limit_ms: u64,
}

/// File systems that are frozen until this is dropped.
pub struct Frozen {
    /// When they thaw by themselves.
    pub until: Instant,
    mounts: Vec<(String, File)>,
}

/// Freezes every writable file system on a disk.
pub fn freeze(payload: &[u8], frozen: &mut Option<Frozen>) -> Outcome<Value> {
    let request: Request = parse(payload)?;
    if frozen.is_some() {
        return Err(Refusal::new("busy", "freeze: frozen already by this connection").into());
    }
    let until = Instant::now() + Duration::from_millis(request.limit_ms.min(LONGEST_MS));
    let mut held = Frozen { until, mounts: Vec::new() };
    // Opened first: once the first is frozen, even looking at another may wait.
    let opened: Vec<_> = targets().into_iter().filter_map(|path| Some((File::open(&path).ok()?, path))).collect();
    for (file, path) in opened {
        match control(&file, FIFREEZE) {
            Ok(()) => held.mounts.push((path, file)),
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => {}
            Err(Errno::EBUSY) => return Err(Refusal::new("busy", format!("freeze {path}: frozen already")).into()),
            Err(error) => return Err(Refusal::io(format!("freeze {path}"), &error.into()).into()),
        }
    }
    let names: Vec<_> = held.mounts.iter().map(|(path, _)| path.as_str()).collect();
    let answer = json!({"frozen": names});
    *frozen = Some(held);
    Ok(answer)
}

/// Thaws what this connection froze, or else whatever is frozen.
pub fn thaw(frozen: &mut Option<Frozen>) -> Value {
    if let Some(held) = frozen.take() {
        return json!({"thawed": held.mounts.len()});
    }
    let thawed =
        targets().iter().filter(|path| File::open(path).is_ok_and(|file| control(&file, FITHAW).is_ok())).count();
    json!({"thawed": thawed})
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for (_, file) in self.mounts.iter().rev() {
            let _ = control(file, FITHAW);
        }
    }
}

/// One mount point of each writable file system that lies on a block device, the last mounted first.
fn targets() -> Vec<String> {
    let mut seen = HashSet::new();
    let mut found: Vec<_> = mounts::all()
        .into_iter()
        // Devices without a number of their own (major 0) are no disks.
        .filter(|mount| mount.writable && !mount.device.starts_with("0:") && seen.insert(mount.device.clone()))
        .map(|mount| mount.target)
        .collect();
    found.reverse();
    found
}

fn control(file: &File, request: libc::c_ulong) -> Result<(), Errno> {
    // SAFETY: both requests ignore their argument and take no memory of this process.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), request as _, 0) }).map(drop)
}
