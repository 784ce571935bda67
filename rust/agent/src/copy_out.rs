//! The operation `get`: a file or a tree out of the guest.
//!
//! The path itself is followed where it is a link; links below it are sent as links. Sockets, pipes and devices are left
//! out and counted. A file that grows or shrinks meanwhile is sent as it is read.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{json, Value};

use crate::conn::Conn;
use crate::message::{parse, Bytes, Failure, Outcome, Refusal};
use crate::wire::{Kind, MAX_PAYLOAD};

const CONTENT: u8 = 1;
/// Names of files left out that are reported; all are counted.
const LEFT_OUT_SHOWN: usize = 20;

#[derive(Deserialize)]
struct Request {
    path: Bytes,
}

/// Sends what a request asks for; gives the answer behind it.
pub fn serve(conn: &mut Conn, payload: &[u8]) -> Outcome<Value> {
    let request: Request = parse(payload)?;
    let root = request.path.to_path();
    let found = fs::metadata(&root).map_err(|error| Refusal::io(root.display(), &error))?;
    let mut sender = Sender { conn, root: root.clone(), entries: 0, bytes: 0, left_out: 0, shown: Vec::new() };
    let mut open = vec![(root, found)];
    while let Some((path, found)) = open.pop() {
        if sender.send(&path, &found)? {
            open.extend(children(&path)?);
        }
    }
    Ok(json!({"entries": sender.entries, "bytes": sender.bytes, "left_out": sender.left_out, "names": sender.shown}))
}

/// What a folder holds, the last name first.
fn children(folder: &Path) -> Result<Vec<(PathBuf, Metadata)>, Refusal> {
    let refusal = |error| Refusal::io(folder.display(), &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(refusal)? {
        names.push(entry.map_err(refusal)?.path());
    }
    names.sort_unstable_by(|left, right| right.cmp(left));
    // What disappears between two looks was not there.
    Ok(names.into_iter().filter_map(|path| fs::symlink_metadata(&path).ok().map(|found| (path, found))).collect())
}

struct Sender<'a> {
    conn: &'a mut Conn,
    root: PathBuf,
    entries: u64,
    bytes: u64,
    left_out: u64,
    shown: Vec<String>,
}

impl Sender<'_> {
    /// Sends one entry; true for a folder, whose content is to follow.
    fn send(&mut self, path: &Path, found: &Metadata) -> Result<bool, Failure> {
        if found.is_dir() {
            self.head(path, found, "folder", None)?;
            return Ok(true);
        }
        if found.is_symlink() {
            let target = fs::read_link(path).map_err(|error| Refusal::io(path.display(), &error))?;
            self.head(path, found, "link", Some(&target))?;
        } else if found.is_file() {
            self.file(path, found)?;
        } else {
            self.left_out += 1;
            if self.shown.len() < LEFT_OUT_SHOWN {
                self.shown.push(path.display().to_string());
            }
        }
        Ok(false)
    }

    fn file(&mut self, path: &Path, found: &Metadata) -> Outcome<()> {
        // It may have been replaced by a pipe since: never wait for one.
        let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
        let mut file = opened.map_err(|error| Refusal::io(path.display(), &error))?;
        self.head(path, found, "file", None)?;
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let count = file.read(&mut buffer).map_err(|error| Refusal::io(path.display(), &error))?;
            self.conn.send(Kind::Data, CONTENT, &buffer[..count])?;
            self.bytes += count as u64;
            if count == 0 {
                return Ok(());
            }
        }
    }

    fn head(&mut self, path: &Path, found: &Metadata, kind: &str, target: Option<&Path>) -> Outcome<()> {
        self.entries += 1;
        let relative = path.strip_prefix(&self.root).unwrap_or(Path::new(""));
        let mtime_ns = i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec());
        // Written by hand, because names need not be UTF-8.
        let mut text = Vec::with_capacity(200);
        text.extend_from_slice(b"{\"path\":");
        quote(&mut text, relative.as_os_str().as_bytes());
        if let Some(target) = target {
            text.extend_from_slice(b",\"target\":");
            quote(&mut text, target.as_os_str().as_bytes());
        }
        let (mode, uid, gid) = (found.mode() & 0o7777, found.uid(), found.gid());
        let rest = format!(
            ",\"type\":\"{kind}\",\"mode\":{mode},\"mtime_ns\":{mtime_ns},\"size\":{},\"uid\":{uid},\"gid\":{gid}}}",
            found.len()
        );
        text.extend_from_slice(rest.as_bytes());
        self.conn.send(Kind::Entry, 0, &text)
    }
}

/// Appends a JSON string whose bytes beyond ASCII stand as they are.
fn quote(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    for byte in bytes {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', *byte]),
            0..0x20 => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            _ => out.push(*byte),
        }
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_quoted_name_is_read_back_as_it_was() {
        let name = b"a\"b\\c\n\x01\xff\xc3\xa9".to_vec();
        let mut text = Vec::new();
        quote(&mut text, &name);
        assert_eq!(parse::<Bytes>(&text).expect("JSON"), Bytes(name));
    }
}
