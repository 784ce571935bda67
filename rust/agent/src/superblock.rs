//! Which file system a disk has, and its label and UUID: enough of a few superblocks to find the root.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A file system found on a disk.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// The type to mount it by.
    pub kind: &'static str,
    /// Its label, empty where it has none.
    pub label: String,
    /// Its UUID in the usual spelling, empty where it has none.
    pub uuid: String,
}

struct Format {
    kind: &'static str,
    magic: (usize, &'static [u8]),
    label: Option<(usize, usize)>,
    uuid: Option<usize>,
}

/// Offsets in bytes from the disk's start: magic, label and its length, UUID.
const FORMATS: &[Format] = &[
    Format { kind: "ext4", magic: (0x438, b"\x53\xEF"), label: Some((0x478, 16)), uuid: Some(0x468) },
    Format { kind: "xfs", magic: (0, b"XFSB"), label: Some((108, 12)), uuid: Some(32) },
    Format { kind: "btrfs", magic: (0x1_0040, b"_BHRfS_M"), label: Some((0x1_012B, 256)), uuid: Some(0x1_0020) },
    Format { kind: "erofs", magic: (0x400, b"\xE2\xE1\xF5\xE0"), label: Some((0x440, 16)), uuid: Some(0x430) },
    Format { kind: "squashfs", magic: (0, b"hsqs"), label: None, uuid: None },
    Format { kind: "iso9660", magic: (0x8001, b"CD001"), label: Some((0x8028, 32)), uuid: None },
    Format { kind: "vfat", magic: (0x52, b"FAT32   "), label: Some((0x47, 11)), uuid: None },
];
/// All of the above lies before this.
const LOOK: usize = 0x1_1000;

/// Looks at a disk.
pub fn look(path: &Path) -> Option<Found> {
    let file = File::open(path).ok()?;
    let mut bytes = vec![0; LOOK];
    let mut length = 0;
    while length < bytes.len() {
        match file.read_at(&mut bytes[length..], length as u64) {
            Ok(0) | Err(_) => break,
            Ok(count) => length += count,
        }
    }
    identify(&bytes[..length])
}

fn identify(bytes: &[u8]) -> Option<Found> {
    let format = FORMATS.iter().find(|format| {
        let (at, magic) = format.magic;
        bytes.get(at..at + magic.len()) == Some(magic)
    })?;
    let label = format.label.and_then(|(at, length)| bytes.get(at..at + length)).unwrap_or_default();
    let label = label.split(|byte| *byte == 0).next().unwrap_or_default();
    let uuid = format.uuid.and_then(|at| bytes.get(at..at + 16)).map(spell).unwrap_or_default();
    Some(Found { kind: format.kind, label: String::from_utf8_lossy(label).trim_end().into(), uuid })
}

fn spell(uuid: &[u8]) -> String {
    let mut text = String::new();
    for (index, byte) in uuid.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_ext4_is_known_with_label_and_uuid() {
        let mut bytes = vec![0; 0x1000];
        bytes[0x438..0x43A].copy_from_slice(b"\x53\xEF");
        bytes[0x478..0x47C].copy_from_slice(b"root");
        bytes[0x468..0x478].copy_from_slice(&(0..16).collect::<Vec<u8>>());
        let found = identify(&bytes).expect("ext4");
        assert_eq!((found.kind, found.label.as_str()), ("ext4", "root"));
        assert_eq!(found.uuid, "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }

    #[test]
    fn test_empty_and_short_disks_have_no_file_system() {
        assert_eq!(identify(&[]), None);
        assert_eq!(identify(&vec![0; LOOK]), None);
    }
}
