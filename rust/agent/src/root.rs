//! Finding the root disk and mounting it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{mount, MsFlags};

use crate::cmdline::{Orders, RootMode};
use crate::message::Refusal;
use crate::modules::Modules;
use crate::superblock::{self, Found};

/// How long a disk may take to appear after its driver.
const LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);
/// File systems that can hold a Linux root; the others only count if they are named.
const LINUX: &[&str] = &["ext4", "xfs", "btrfs", "erofs", "squashfs"];

/// One block device.
struct Disk {
    name: String,
    /// Of a partition: its number and the disk it is on.
    part: Option<(u32, String)>,
    sectors: u64,
}

/// Mounts the root that the orders name at `target`.
pub fn mount_root(orders: &Orders, wish: &str, modules: &mut Modules, target: &Path) -> Result<(), Refusal> {
    if orders.mode == RootMode::Overlay {
        modules.load(&["overlay"]);
        return overlay(target, |lower| mount_plain(orders, wish, modules, lower));
    }
    mount_plain(orders, wish, modules, target)
}

fn mount_plain(orders: &Orders, wish: &str, modules: &mut Modules, target: &Path) -> Result<(), Refusal> {
    let refusal = |error: nix::Error| Refusal::io(format!("root {wish}"), &error.into());
    let read_only = orders.mode != RootMode::ReadWrite;
    let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    if let Some((kind, tag)) = wish.split_once(':').filter(|(kind, _)| ["virtiofs", "9p"].contains(kind)) {
        modules.load(&[kind, "9pnet_virtio"]);
        let own = if kind == "9p" { Some("trans=virtio,version=9p2000.L,msize=262144") } else { None };
        return mount(Some(tag), target, Some(kind), flags, own).map_err(refusal);
    }
    let (device, found) = find(wish, orders.part)?;
    modules.load(&[found.kind]);
    let (kind, options) = (found.kind, orders.flags.as_deref());
    match mount(Some(&device), target, Some(kind), flags, options) {
        // A disk that the host has opened read-only can still be a root.
        Err(nix::Error::EACCES | nix::Error::EROFS) => {
            mount(Some(&device), target, Some(kind), flags | MsFlags::MS_RDONLY, options).map_err(refusal)
        }
        other => other.map_err(refusal),
    }
}

/// What is read comes from `lower`, what is written stays in memory.
fn overlay(target: &Path, lower: impl FnOnce(&Path) -> Result<(), Refusal>) -> Result<(), Refusal> {
    let refusal = |error: std::io::Error| Refusal::io("root: overlay", &error);
    let base = Path::new("/overlay");
    fs::create_dir_all(base).map_err(refusal)?;
    let none: Option<&str> = None;
    mount(Some("overlay"), base, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .map_err(|error| refusal(error.into()))?;
    for name in ["lower", "upper", "work"] {
        fs::create_dir(base.join(name)).map_err(refusal)?;
    }
    lower(&base.join("lower"))?;
    let options = "lowerdir=/overlay/lower,upperdir=/overlay/upper,workdir=/overlay/work";
    mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options))
        .map_err(|error| refusal(error.into()))?;
    // Out of sight: the mounts below live on for as long as the overlay needs them.
    nix::mount::umount2(&base.join("lower"), nix::mount::MntFlags::MNT_DETACH)
        .map_err(|error| refusal(error.into()))?;
    nix::mount::umount2(base, nix::mount::MntFlags::MNT_DETACH).map_err(|error| refusal(error.into()))?;
    let _ = mount(none, target, none, MsFlags::MS_PRIVATE, none);
    Ok(())
}

/// Waits for the device.
fn find(wish: &str, part: Option<u32>) -> Result<(PathBuf, Found), Refusal> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let disks = disks();
        if let Some(found) = pick(&disks, wish, part) {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
            let text = format!("root {wish}: no such disk with a file system; the guest has: {}", names.join(" "));
            return Err(Refusal::new("not-found", text));
        }
        std::thread::sleep(PAUSE);
    }
}

fn pick(disks: &[Disk], wish: &str, part: Option<u32>) -> Option<(PathBuf, Found)> {
    let look = |disk: &Disk| {
        let path = Path::new("/dev").join(&disk.name);
        superblock::look(&path).map(|found| (path, found))
    };
    if let Some((key, value)) = wish.split_once('=').filter(|(key, _)| *key != "serial") {
        let fits = |found: &Found| match key {
            "LABEL" => found.label == value,
            "UUID" => found.uuid.eq_ignore_ascii_case(value),
            _ => false,
        };
        return disks.iter().filter_map(look).find(|(_, found)| fits(found));
    }
    let is_disk = |disk: &&Disk| match (wish.strip_prefix("serial="), wish.strip_prefix("/dev/")) {
        (Some(serial), _) => disk.part.is_none() && serial_of(&disk.name) == serial,
        (_, Some(name)) => disk.name == name,
        _ => wish == "auto",
    };
    let chosen: Vec<&Disk> = disks.iter().filter(is_disk).collect();
    if let Some(number) = part {
        let is_part = |disk: &&Disk| matches!(&disk.part, Some((own, on)) if *own == number && chosen.iter().any(|disk| disk.name == *on));
        return disks.iter().find(is_part).and_then(look);
    }
    if let Some(found) = chosen.iter().filter(|disk| wish != "auto" || disk.part.is_none()).find_map(|disk| look(disk))
    {
        return Some(found);
    }
    let on_chosen = |disk: &&Disk| matches!(&disk.part, Some((_, on)) if chosen.iter().any(|disk| disk.name == *on));
    let mut parts: Vec<&Disk> = disks.iter().filter(on_chosen).collect();
    parts.sort_by_key(|disk| std::cmp::Reverse(disk.sectors));
    parts.into_iter().filter_map(look).find(|(_, found)| LINUX.contains(&found.kind))
}

fn serial_of(name: &str) -> String {
    crate::info::read(&format!("/sys/class/block/{name}/serial")).unwrap_or_default()
}

/// The disks and partitions there are, memory and loop devices left out.
fn disks() -> Vec<Disk> {
    let mut found: Vec<Disk> = fs::read_dir("/sys/class/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !["loop", "ram", "zram", "dm-", "md"].iter().any(|prefix| name.starts_with(prefix)))
        .map(|name| {
            let folder = format!("/sys/class/block/{name}");
            let number = |file: &str| crate::info::first_number(&format!("{folder}/{file}")).map(|value| value as u64);
            let above =
                fs::canonicalize(&folder).ok().and_then(|path| Some(path.parent()?.file_name()?.to_str()?.to_string()));
            let part = number("partition").map(|own| (own as u32, above.unwrap_or_default()));
            Disk { part, sectors: number("size").unwrap_or(0), name }
        })
        .collect();
    found.retain(|disk| disk.sectors > 0);
    found.sort_by(|left, right| left.name.cmp(&right.name));
    found
}
