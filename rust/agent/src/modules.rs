//! The kernel's modules in the initrd: loaded by name, what they depend on first.
//!
//! The initrd has `/modules/NAME.ko` and `/modules/dep`, whose lines are `NAME: DEPENDENCY…` in no particular order. A
//! module that is not there is built into the kernel or not meant for it, so it is no error; that the device behind it is
//! missing shows soon enough.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{finit_module, ModuleInitFlags};

/// The modules of an initrd.
pub struct Modules {
    /// Keeps the folder reachable when the root has changed.
    held: Option<File>,
    folder: PathBuf,
    needs: BTreeMap<String, Vec<String>>,
    done: HashSet<String>,
}

impl Modules {
    /// Reads what there is. `/proc` must be mounted.
    pub fn open(folder: &Path) -> Self {
        let text = fs::read_to_string(folder.join("dep")).unwrap_or_default();
        let held = File::open(folder).ok();
        let folder =
            held.as_ref().map_or_else(|| folder.into(), |file| format!("/proc/self/fd/{}", file.as_raw_fd()).into());
        Self { held, folder, needs: parse(&text), done: HashSet::new() }
    }

    /// Removes them, which gives their memory back.
    pub fn remove(&mut self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
        self.held = None;
    }

    /// Loads modules that are not loaded yet.
    pub fn load(&mut self, names: &[impl AsRef<str>]) {
        for name in names {
            self.one(&name.as_ref().replace('-', "_"));
        }
    }

    fn one(&mut self, name: &str) {
        // Marked before its dependencies, so that a list with a circle ends.
        if !self.needs.contains_key(name) || !self.done.insert(name.into()) {
            return;
        }
        for need in self.needs.get(name).cloned().unwrap_or_default() {
            self.one(&need);
        }
        let path = self.folder.join(format!("{name}.ko"));
        let loaded = File::open(&path).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)));
        match loaded.and_then(|file| finit_module(&file, c"", ModuleInitFlags::empty())) {
            // ENODEV: a driver whose device is not there.
            Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => {}
            Err(error) => crate::boot::complain(&format!("module {name}: {}", error.desc())),
        }
    }
}

fn parse(text: &str) -> BTreeMap<String, Vec<String>> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, needs)| (name.into(), needs.split_whitespace().map(str::to_string).collect()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_list_of_dependencies_is_read() {
        let found = parse("virtio_pci: virtio_ring virtio\nvirtio:\nbroken\n");
        assert_eq!(found["virtio_pci"], ["virtio_ring", "virtio"]);
        assert!(found["virtio"].is_empty());
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn test_circle_of_dependencies_ends() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("dep"), "a: b\nb: a\n").expect("written");
        let mut modules = Modules::open(folder.path());
        modules.load(&["a", "not-there"]);
        assert_eq!(modules.done.len(), 2);
    }
}
