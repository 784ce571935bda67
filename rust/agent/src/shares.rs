//! Folders of the host's in the guest: virtiofs, and 9p where a kernel has that.

use std::fs;
use std::path::{Component, Path, PathBuf};

use nix::mount::{mount, MsFlags};
use serde::Deserialize;

use crate::message::Refusal;

/// One shared folder.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Share {
    /// The name the host gave it.
    pub tag: String,
    /// Where it goes in the guest.
    pub path: String,
    /// Whether the guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// `virtiofs` or `9p`.
    #[serde(default = "virtiofs", rename = "type")]
    pub kind: String,
}

fn virtiofs() -> String {
    "virtiofs".into()
}

impl Share {
    /// From the kernel's command line: `TAG:/path`, `TAG:/path:ro`, each perhaps with `,9p` behind.
    pub fn from_word(word: &str) -> Option<Self> {
        let (word, kind) = word.split_once(',').unwrap_or((word, "virtiofs"));
        let (tag, path) = word.split_once(':')?;
        let (path, read_only) = path.strip_suffix(":ro").map_or((path, false), |path| (path, true));
        let ok = !tag.is_empty() && path.starts_with('/');
        ok.then(|| Self { tag: tag.into(), path: path.into(), read_only, kind: kind.into() })
    }
}

/// Mounts a share below `root`.
pub fn mount_at(share: &Share, root: &Path) -> Result<(), Refusal> {
    if !Path::new(&share.path).is_absolute()
        || Path::new(&share.path).components().any(|part| part == Component::ParentDir)
    {
        return Err(Refusal::new("bad-request", format!("share {}: {:?} is no absolute path", share.tag, share.path)));
    }
    let options = match share.kind.as_str() {
        "virtiofs" => None,
        "9p" => Some("trans=virtio,version=9p2000.L,msize=262144"),
        other => return Err(Refusal::new("bad-request", format!("share {}: type {other:?} is not known", share.tag))),
    };
    let target: PathBuf = root.join(share.path.trim_start_matches('/'));
    fs::create_dir_all(&target)
        .map_err(|error| Refusal::io(format!("share {} at {}", share.tag, share.path), &error))?;
    let flags = if share.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    mount(Some(share.tag.as_str()), &target, Some(share.kind.as_str()), flags | MsFlags::MS_NODEV, options)
        .map_err(|error| Refusal::io(format!("share {} at {}", share.tag, share.path), &error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_words_of_the_command_line_become_shares() {
        let share = Share::from_word("data:/mnt/data:ro,9p").expect("a share");
        assert_eq!(
            (share.tag.as_str(), share.path.as_str(), share.read_only, share.kind.as_str()),
            ("data", "/mnt/data", true, "9p")
        );
        assert!(!Share::from_word("data:/x").expect("a share").read_only);
        assert_eq!(Share::from_word("data:relative"), None);
        assert_eq!(Share::from_word("data"), None);
    }
}
