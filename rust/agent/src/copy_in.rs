//! The operation `put`: a file or a tree into the guest.
//!
//! A file is written beside its place and renamed into it, so a copy that breaks off leaves the old file, and a running
//! program can be replaced. Folders get their modes and times when everything is in them.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{utimensat, UtimensatFlags};
use nix::sys::time::{TimeSpec, TimeValLike};
use serde::Deserialize;
use serde_json::{json, Value};

use crate::conn::Conn;
use crate::message::{parse, Bytes, Failure, Outcome, Refusal};
use crate::users;
use crate::wire::{Frame, Kind};

#[derive(Deserialize)]
struct Request {
    /// Where it goes.
    path: Bytes,
    /// The name it gets where `path` is a folder; without one a folder's content goes into that folder.
    #[serde(default)]
    name: Option<Bytes>,
    /// Whose it becomes, as for `exec`; else the agent's.
    #[serde(default)]
    owner: Option<String>,
}

#[derive(Deserialize)]
struct Entry {
    path: Bytes,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    mode: u32,
    #[serde(default)]
    mtime_ns: Option<i64>,
    #[serde(default)]
    target: Bytes,
}

/// Takes what the host sends; gives the answer behind it.
pub fn serve(conn: &mut Conn, payload: &[u8]) -> Outcome<Value> {
    let request: Request = parse(payload)?;
    let mut root = request.path.to_path();
    if let Some(name) = request.name.as_ref().filter(|_| root.is_dir()) {
        root.push(plain(&name.to_path())?);
    }
    if let Some(parent) = root.parent() {
        fs::create_dir_all(parent).map_err(|error| Refusal::io(parent.display(), &error))?;
    }
    let owner = request.owner.as_deref().map(|wish| users::find(wish, Path::new("/etc"))).transpose()?;
    let owner = owner.map(|user| (user.uid, user.gid));
    let mut taker = Taker { conn, root, owner, folders: Vec::new(), entries: 0, bytes: 0 };
    while let Some(frame) = taker.conn.recv()? {
        match frame.kind {
            Kind::Entry => taker.entry(&parse(&frame.payload)?)?,
            Kind::End => return taker.finish(),
            _ => return Err(unexpected(&frame)),
        }
    }
    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
}

struct Taker<'a> {
    conn: &'a mut Conn,
    root: PathBuf,
    owner: Option<(u32, u32)>,
    folders: Vec<(PathBuf, u32, Option<i64>)>,
    entries: u64,
    bytes: u64,
}

impl Taker<'_> {
    fn entry(&mut self, entry: &Entry) -> Outcome<()> {
        self.entries += 1;
        let relative = entry.path.to_path();
        let path = if entry.path.0.is_empty() { self.root.clone() } else { self.root.join(plain(&relative)?) };
        let done = match entry.kind.as_str() {
            "folder" => self.folder(&path, entry),
            "link" => self.link(&path, entry),
            "file" => return self.file(&path, entry),
            other => return Err(Refusal::new("bad-request", format!("entry of type {other:?}: not known")).into()),
        };
        done.map_err(|error| Refusal::io(path.display(), &error).into())
    }

    fn folder(&mut self, path: &Path, entry: &Entry) -> io::Result<()> {
        if !path.is_dir() {
            DirBuilder::new().mode(0o700).create(path)?;
            self.own(path)?;
            self.folders.push((path.to_path_buf(), entry.mode, entry.mtime_ns));
        }
        Ok(())
    }

    fn link(&self, path: &Path, entry: &Entry) -> io::Result<()> {
        let beside = beside(path);
        let _ = fs::remove_file(&beside);
        std::os::unix::fs::symlink(entry.target.to_path(), &beside)?;
        let placed = self
            .own(&beside)
            .and_then(|()| set_mtime(&beside, entry.mtime_ns))
            .and_then(|()| fs::rename(&beside, path));
        placed.inspect_err(|_| drop(fs::remove_file(&beside)))
    }

    fn file(&mut self, path: &Path, entry: &Entry) -> Outcome<()> {
        let beside = beside(path);
        let result = self.write(&beside, path, entry);
        if result.is_err() {
            let _ = fs::remove_file(&beside);
        }
        result
    }

    fn write(&mut self, beside: &Path, path: &Path, entry: &Entry) -> Outcome<()> {
        let refusal = |error: io::Error| Failure::from(Refusal::io(path.display(), &error));
        let _ = fs::remove_file(beside);
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(beside).map_err(refusal)?;
        loop {
            let Some(frame) = self.conn.recv()? else {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            };
            if frame.kind != Kind::Data {
                return Err(unexpected(&frame));
            }
            if frame.payload.is_empty() {
                break;
            }
            file.write_all(&frame.payload).map_err(refusal)?;
            self.bytes += frame.payload.len() as u64;
        }
        self.own(beside).map_err(refusal)?;
        // After the owner, because a change of owner takes set-user-id away.
        // SAFETY: `file` is open.
        if unsafe { libc::fchmod(file.as_raw_fd(), entry.mode & 0o7777) } < 0 {
            return Err(refusal(io::Error::last_os_error()));
        }
        drop(file);
        set_mtime(beside, entry.mtime_ns).and_then(|()| fs::rename(beside, path)).map_err(refusal)
    }

    fn own(&self, path: &Path) -> io::Result<()> {
        self.owner.map_or(Ok(()), |(uid, gid)| std::os::unix::fs::lchown(path, Some(uid), Some(gid)))
    }

    fn finish(self) -> Outcome<Value> {
        for (path, mode, mtime_ns) in self.folders.iter().rev() {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o7777);
            let done = fs::set_permissions(path, mode).and_then(|()| set_mtime(path, *mtime_ns));
            done.map_err(|error| Refusal::io(path.display(), &error))?;
        }
        Ok(json!({"entries": self.entries, "bytes": self.bytes}))
    }
}

/// The name a file has until it is whole.
fn beside(path: &Path) -> PathBuf {
    let mut name = b".ostler-".to_vec();
    name.extend_from_slice(format!("{}-", std::process::id()).as_bytes());
    name.extend(path.file_name().unwrap_or_default().as_bytes().iter().take(200));
    path.with_file_name(std::ffi::OsStr::from_bytes(&name))
}

/// A relative path that does not climb.
fn plain(path: &Path) -> Result<&Path, Refusal> {
    let ok = path.components().all(|part| matches!(part, Component::Normal(_))) && !path.as_os_str().is_empty();
    if !ok {
        return Err(Refusal::new("bad-request", format!("name {:?}: expected one below the target", path.display())));
    }
    Ok(path)
}

fn set_mtime(path: &Path, mtime_ns: Option<i64>) -> io::Result<()> {
    let Some(mtime_ns) = mtime_ns else { return Ok(()) };
    let time = TimeSpec::nanoseconds(mtime_ns);
    Ok(utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

fn unexpected(frame: &Frame) -> Failure {
    if frame.kind == Kind::Hello {
        return io::Error::from(io::ErrorKind::ConnectionReset).into(); // another host, on a console port
    }
    Refusal::new("bad-request", format!("protocol: {:?} within a tree", frame.kind)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_name_that_climbs_or_is_absolute_is_refused() {
        for bad in ["../x", "/etc/passwd", "a/../../b", ""] {
            assert!(plain(Path::new(bad)).is_err(), "{bad}");
        }
        assert!(plain(Path::new("a/b.c")).is_ok());
    }
}
