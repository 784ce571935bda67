//! What is mounted: `/proc/self/mountinfo`, proc(5).

use std::fs;

/// The most mounts that are looked at.
const LIMIT: usize = 4096;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The file system's device, `major:minor`.
    pub device: String,
    /// Where it is.
    pub target: String,
    /// Its type.
    pub kind: String,
    /// What it was mounted from.
    pub source: String,
    /// Whether the file system (not only this mount) can be written.
    pub writable: bool,
}

/// All mounts of this process, in the order they were made.
pub fn all() -> Vec<Mount> {
    parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

fn parse(text: &str) -> Vec<Mount> {
    text.lines().take(LIMIT).filter_map(line).collect()
}

fn line(line: &str) -> Option<Mount> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(2);
    let device = head.next()?.to_string();
    let target = unescape(head.nth(1)?);
    let mut tail = tail.split(' ');
    let (kind, source, options) = (tail.next()?, tail.next()?, tail.next()?);
    let writable = !options.split(',').any(|option| option == "ro");
    Some(Mount { device, target, kind: kind.into(), source: unescape(source), writable })
}

/// The kernel writes blanks and the like as a backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.filter(|_| *first == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_mountinfo_lines_are_read_with_blanks_and_optional_fields() {
        let text = "36 35 98:0 / /mnt\\040two rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                    37 35 0:21 / /sys rw - sysfs sysfs ro\nbroken\n";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].device.as_str(), found[0].target.as_str(), found[0].writable), ("98:0", "/mnt two", true));
        assert!(!found[1].writable);
    }
}
