//! The first process of the initrd: from the kernel to a root file system and a host that is answered.
//!
//! In this order, because the host waits: what the root needs is loaded, the root is mounted, the agent listens; drivers
//! nobody needs for that come afterwards in a process of their own. If the root cannot be had, the agent still listens, and
//! its greeting carries the reason.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use nix::mount::{mount, MsFlags};
use nix::unistd::{chdir, chroot, fork, ForkResult};

use crate::cmdline::{self, Init, Orders};
use crate::configure;
use crate::late::Late;
use crate::message::Refusal;
use crate::modules::Modules;
use crate::netlink::Netlink;
use crate::server::{Place, Server, CONSOLE_PORT, VSOCK_PORT};
use crate::session::Context;
use crate::{info, power, root, shares, spawn};

const NEW_ROOT: &str = "/newroot";
const MODULES: &str = "/modules";
/// Drivers by virtio's numbers of devices (virtio 1.2, section 5). The first are on the way to the root and to the host.
const EARLY: &[(u32, &[&str])] =
    &[(2, &["virtio_blk"]), (8, &["virtio_scsi", "sd_mod"]), (19, &["vmw_vsock_virtio_transport"])];
const LATE: &[(u32, &[&str])] = &[
    (1, &["virtio_net"]),
    (3, &["virtio_console"]),
    (4, &["virtio_rng"]),
    (5, &["virtio_balloon"]),
    (9, &["9pnet_virtio", "9p"]),
    (26, &["virtiofs"]),
];
/// Drivers of the board's own devices: panic notification and the power button.
const BOARD: &[&str] = &["pvpanic", "pvpanic_mmio", "button", "evdev"];
/// What an image's own init is called, in the order of trying.
const INITS: &[&str] = &["/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/bin/init", "/init"];

/// Does all of it and never returns: the kernel panics when its first process ends.
pub fn run() -> ! {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let _ = nix::sys::reboot::set_cad_enabled(false);
    std::env::set_var("PATH", spawn::PATH);
    std::env::set_var("HOME", "/root");
    base_mounts(Path::new("/"));
    let orders = cmdline::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    for word in &orders.bad {
        complain(&format!("command line: {word}: not understood"));
    }
    let mut modules = Modules::open(Path::new(MODULES));
    modules.load(&["virtio_pci"]);
    modules.load(&drivers(EARLY));
    let trouble = enter_root(&orders, &mut modules).err().map(|refusal| refusal.message);
    if let Some(trouble) = &trouble {
        complain(trouble);
    }
    let program = if trouble.is_none() { own_init(&orders.init) } else { None };
    if let Some(program) = program {
        become_init(&program, modules);
    }
    serve_as_init(&orders, modules, trouble)
}

/// The agent stays process 1.
fn serve_as_init(orders: &Orders, mut modules: Modules, trouble: Option<String>) -> ! {
    if let Ok(index) = nix::net::if_::if_nametoindex("lo") {
        let _ = Netlink::open().and_then(|mut netlink| netlink.link_up(index, None));
    }
    let late = Late::start(move || load_rest(&mut modules));
    let context = Context { late, is_init: true, trouble };
    if let Some(command) = &orders.exec {
        context.late.wait();
        run_on_console(command);
    }
    match open_server(context) {
        Ok(server) => {
            announce();
            if let Err(error) = server.run() {
                complain(&format!("agent: {error}"));
            }
        }
        Err(error) => complain(&format!("agent: cannot listen: {error}")),
    }
    power::power_off()
}

/// The image's own init takes over process 1; the agent goes on as one of its daemons.
fn become_init(program: &str, mut modules: Modules) -> ! {
    load_rest(&mut modules); // it may look for its disks and networks at once
                             // SAFETY: this process has one thread.
    if let Ok(ForkResult::Child) = unsafe { fork() } {
        let _ = nix::unistd::setsid();
        let context = Context { late: Late::default(), is_init: false, trouble: None };
        match open_server(context) {
            Ok(server) => {
                announce();
                let _ = server.run();
            }
            Err(error) => complain(&format!("agent: cannot listen: {error}")),
        }
        std::process::exit(0);
    }
    let path = CString::new(program).unwrap_or_default();
    let error = nix::unistd::execv(&path, &[&path]);
    complain(&format!("init {program}: {}", error.err().map_or("not executed", |error| error.desc())));
    power::power_off()
}

fn open_server(context: Context) -> std::io::Result<Server> {
    Server::open(&[Place::Vsock(VSOCK_PORT), Place::Console(CONSOLE_PORT.into())], context)
}

fn load_rest(modules: &mut Modules) {
    modules.load(&drivers(LATE));
    modules.load(BOARD);
    modules.remove();
}

/// The drivers of those devices of a table that are there.
fn drivers(table: &[(u32, &'static [&'static str])]) -> Vec<&'static str> {
    let present: Vec<u32> = fs::read_dir("/sys/bus/virtio/devices")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| info::read(&entry.path().join("device").to_string_lossy()))
        .filter_map(|text| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok())
        .collect();
    table.iter().filter(|(id, _)| present.contains(id)).flat_map(|(_, names)| names.iter().copied()).collect()
}

fn own_init(wish: &Init) -> Option<String> {
    match wish {
        Init::Agent => None,
        Init::Program(path) => Some(path.clone()),
        Init::Auto => {
            INITS.iter().find(|path| fs::metadata(path).is_ok_and(|found| found.is_file())).map(ToString::to_string)
        }
    }
}

/// Mounts the root and makes it this process's; in the initrd nothing is left but the modules.
fn enter_root(orders: &Orders, modules: &mut Modules) -> Result<(), Refusal> {
    if let Some(wish) = &orders.root {
        let target = Path::new(NEW_ROOT);
        fs::create_dir_all(target).map_err(|error| Refusal::io(NEW_ROOT, &error))?;
        root::mount_root(orders, wish, modules, target)?;
        switch(target).map_err(|error| Refusal::io("root: switching to it", &error.into()))?;
        base_mounts(Path::new("/")); // what the initrd's had no room for
    }
    if !orders.shares.is_empty() {
        modules.load(&["virtiofs", "9pnet_virtio", "9p"]);
    }
    for share in &orders.shares {
        shares::mount_at(share, Path::new("/"))?;
    }
    match &orders.hostname {
        Some(name) => configure::set_hostname(name),
        None => {
            let name = info::read("/etc/hostname").filter(|name| !name.is_empty());
            let _ = nix::unistd::sethostname(name.as_deref().unwrap_or("ostler"));
            Ok(())
        }
    }
}

/// switch_root(8).
fn switch(target: &Path) -> nix::Result<()> {
    let none: Option<&str> = None;
    for name in ["proc", "sys", "dev", "run"] {
        let to = target.join(name);
        let _ = fs::create_dir(&to);
        // A root without such a folder, which cannot be written, does without.
        let _ = mount(Some(&Path::new("/").join(name)), &to, none, MsFlags::MS_MOVE, none);
    }
    let initrd = fs::metadata("/").map(|found| found.dev()).unwrap_or(0);
    // The modules stay for whoever loads the rest of them; that one works from this folder and removes it.
    chdir("/")?;
    remove_below(Path::new("/"), initrd, Path::new(MODULES));
    chdir(target)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    chroot(".")?;
    chdir("/")
}

/// Frees the initrd's memory: removes everything on its device but `spared`.
fn remove_below(folder: &Path, device: u64, spared: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(found) = fs::symlink_metadata(&path) else { continue };
        if found.dev() != device || path == spared {
            continue;
        }
        if found.is_dir() {
            remove_below(&path, device, spared);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Mounts what every Linux system has, where it is not mounted yet.
fn base_mounts(root: &Path) {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let no_exec = plain | MsFlags::MS_NOEXEC;
    let table = [
        ("proc", "proc", no_exec, None),
        ("sysfs", "sys", no_exec, None),
        ("devtmpfs", "dev", MsFlags::MS_NOSUID, Some("mode=0755")),
        ("devpts", "dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, Some("mode=0620,gid=5,ptmxmode=0666")),
        ("tmpfs", "dev/shm", plain, Some("mode=1777")),
        ("tmpfs", "run", plain, Some("mode=0755")),
        ("cgroup2", "sys/fs/cgroup", no_exec, None),
    ];
    for (kind, name, flags, options) in table {
        let target = root.join(name);
        let _ = fs::create_dir_all(&target);
        if !is_mount_point(&target) {
            let _ = mount(Some(kind), &target, Some(kind), flags, options);
        }
    }
    for (name, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let _ = std::os::unix::fs::symlink(format!("/proc/self/{target}"), root.join("dev").join(name));
    }
}

fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    path.parent().is_some_and(|parent| device(parent) != device(path))
}

/// Runs a command with the console, then ends the guest.
fn run_on_console(command: &str) -> ! {
    match Command::new("/bin/sh").arg("-c").arg(command).status() {
        Ok(status) => complain(&format!("command ended: {status}")),
        Err(error) => complain(&format!("/bin/sh: {error}")),
    }
    power::power_off()
}

/// Says on the console when the agent was ready.
fn announce() {
    if let Some(uptime) = info::first_number("/proc/uptime") {
        complain(&format!("agent ready, {uptime:.2} s after the kernel's start"));
    }
}

/// Says a line on the console. A console that cannot be written is no reason to end.
pub fn complain(what: &str) {
    let _ = writeln!(std::io::stderr(), "[ostler] {what}");
}
