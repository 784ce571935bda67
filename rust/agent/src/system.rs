//! Small operations on the whole guest: clock, entropy, size of the root file system.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{clock_settime, ClockId};
use serde::Deserialize;
use serde_json::{json, Value};

use crate::message::{parse, Outcome, Refusal};
use crate::mounts;

/// `RNDADDENTROPY` of linux/random.h: `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG` of the same: `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
/// `EXT4_IOC_RESIZE_FS` of fs/ext4/ext4.h: `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
/// `XFS_IOC_FSGROWFSDATA` of xfs_fs.h: `_IOW('X', 110, struct xfs_growfs_data)`, two 64-bit words.
const XFS_IOC_FSGROWFSDATA: libc::c_ulong = 0x4010_586E;
/// The kernel's pool holds no more.
const ENTROPY_LIMIT: usize = 512;

#[derive(Deserialize)]
struct Time {
    unix_ns: i64,
}

/// Sets the clock of the day.
pub fn set_time(payload: &[u8]) -> Outcome<Value> {
    let request: Time = parse(payload)?;
    if request.unix_ns < 0 {
        return Err(Refusal::new("bad-request", "set-time: expected a time after 1970").into());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::nanoseconds(request.unix_ns))
        .map_err(|error| Refusal::io("set-time", &error.into()))?;
    Ok(json!({}))
}

#[derive(Deserialize)]
struct Entropy {
    hex: String,
}

/// Gives the kernel's random numbers a seed that counts.
pub fn add_entropy(payload: &[u8]) -> Outcome<Value> {
    let request: Entropy = parse(payload)?;
    let bytes = from_hex(&request.hex).filter(|bytes| !bytes.is_empty() && bytes.len() <= ENTROPY_LIMIT);
    let bytes = bytes.ok_or_else(|| Refusal::new("bad-request", "entropy: expected 1 to 512 bytes in hexadecimal"))?;
    let file = File::options().write(true).open("/dev/random").map_err(|error| Refusal::io("/dev/random", &error))?;
    // struct rand_pool_info: bits, bytes, then the bytes.
    let mut pool = ((bytes.len() * 8) as u32).to_ne_bytes().to_vec();
    pool.extend((bytes.len() as u32).to_ne_bytes());
    pool.extend(&bytes);
    // SAFETY: the kernel reads as many bytes behind the head as the head says, and they are there.
    if unsafe { libc::ioctl(file.as_raw_fd(), RNDADDENTROPY as _, pool.as_ptr()) } < 0 {
        // Whoever may not credit it may still mix it in.
        (&file).write_all(&bytes).map_err(|error| Refusal::io("/dev/random", &error))?;
        return Ok(json!({"credited": false}));
    }
    // A seed alone waits for its turn, up to a minute, and guests that go on from one snapshot would draw the same
    // numbers until then. Refused only where the generator has never been seeded, and then it is just being.
    // SAFETY: the request takes no argument.
    let reseeded = unsafe { libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG as _) } == 0;
    Ok(json!({"credited": true, "reseeded": reseeded}))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// Makes the root file system as large as its device.
pub fn grow_root() -> Outcome<Value> {
    let unsupported = |what: String| Refusal::new("unsupported", format!("grow-root: {what}"));
    let mounts = mounts::all();
    let root = mounts.iter().rev().find(|mount| mount.target == "/").ok_or_else(|| unsupported("no root".into()))?;
    if root.device.starts_with("0:") {
        return Err(unsupported(format!("the root is {}, not on a disk", root.kind)).into());
    }
    // Sectors of 512 bytes, whatever the disk's own are.
    let sectors = crate::info::first_number(&format!("/sys/dev/block/{}/size", root.device));
    let device_bytes =
        sectors.map(|count| count as u64 * 512).ok_or_else(|| unsupported("the disk has no size".into()))?;
    let folder = File::open("/").map_err(|error| Refusal::io("/", &error))?;
    let (before, block) = size("/")?;
    // The kernel takes the size it has already for done.
    grow(&folder, &root.kind, device_bytes / block).map_err(|error| match error {
        None => unsupported(format!("file system {}", root.kind)),
        Some(error) => Refusal::io(format!("grow-root to {device_bytes} bytes"), &error.into()),
    })?;
    let (after, _) = size("/")?;
    Ok(json!({"device_bytes": device_bytes, "before_bytes": before, "after_bytes": after, "type": root.kind}))
}

/// Size of a file system and of its blocks, in bytes.
fn size(path: &str) -> Result<(u64, u64), Refusal> {
    let found = statvfs(Path::new(path)).map_err(|error| Refusal::io(path, &error.into()))?;
    Ok((found.blocks() * found.fragment_size(), found.fragment_size()))
}

/// `None` as an error: this file system cannot be grown while it is mounted.
fn grow(folder: &File, kind: &str, blocks: u64) -> Result<(), Option<Errno>> {
    let fd = folder.as_raw_fd();
    let result = match kind {
        // SAFETY: the request reads one u64, which lives on this stack.
        "ext4" | "ext3" => unsafe { libc::ioctl(fd, EXT4_IOC_RESIZE_FS as _, &blocks) },
        "xfs" => {
            let wish: [u64; 2] = [blocks, 25]; // at most 25 % for inodes, as mkfs has it
                                               // SAFETY: the request reads two u64, which live on this stack.
            unsafe { libc::ioctl(fd, XFS_IOC_FSGROWFSDATA as _, &wish) }
        }
        _ => return Err(None),
    };
    Errno::result(result).map(drop).map_err(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_hexadecimal_is_read_and_anything_else_is_not() {
        assert_eq!(from_hex("00ff10"), Some(vec![0, 255, 16]));
        assert_eq!(from_hex("0"), None);
        assert_eq!(from_hex("zz"), None);
    }
}
