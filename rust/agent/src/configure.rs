//! The operation `configure`: hostname, network, name servers, SSH keys, shared folders.
//!
//! What the host sends is what the guest shall have; nothing else is touched. A part that fails is reported with its
//! name, and the parts before it stay done.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::unistd::sethostname;
use serde::Deserialize;
use serde_json::{json, Value};

use crate::message::{parse, Outcome, Refusal};
use crate::netlink::Netlink;
use crate::session::Context;
use crate::shares::{self, Share};
use crate::{info, users};

/// The most items of a kind in one request.
const ITEMS: usize = 256;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Request {
    hostname: Option<String>,
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    dns: Option<Dns>,
    ssh_keys: Vec<SshKeys>,
    mounts: Vec<Share>,
}

#[derive(Deserialize)]
struct Interface {
    /// By name; else by hardware address; else the first that is not the loopback.
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    mac: Option<String>,
    /// The address it is to have from now on.
    new_mac: Option<String>,
    #[serde(default)]
    mtu: Option<u32>,
    /// `address/prefix`.
    #[serde(default)]
    addresses: Vec<String>,
}

#[derive(Deserialize)]
struct Route {
    /// `address/prefix`, or `default`, which is IPv4's or IPv6's as the gateway is.
    to: String,
    #[serde(default)]
    via: Option<IpAddr>,
    #[serde(default)]
    interface: Option<String>,
}

#[derive(Deserialize)]
struct Dns {
    servers: Vec<IpAddr>,
    #[serde(default)]
    search: Vec<String>,
}

#[derive(Deserialize)]
struct SshKeys {
    user: String,
    keys: Vec<String>,
}

/// Does what a request says, in the order of the fields above.
pub fn serve(payload: &[u8], context: &Context) -> Outcome<Value> {
    let request: Request = parse(payload)?;
    let longest = [request.interfaces.len(), request.routes.len(), request.ssh_keys.len(), request.mounts.len()];
    if longest.into_iter().max().unwrap_or(0) > ITEMS {
        return Err(Refusal::new("bad-request", format!("configure: more than {ITEMS} items of a kind")).into());
    }
    if let Some(name) = &request.hostname {
        set_hostname(name)?;
    }
    if !request.interfaces.is_empty() || !request.routes.is_empty() {
        context.late.wait(); // the network's driver may still be on its way
        network(&request.interfaces, &request.routes)?;
    }
    if let Some(dns) = &request.dns {
        set_dns(dns)?;
    }
    for keys in &request.ssh_keys {
        add_ssh_keys(keys)?;
    }
    if !request.mounts.is_empty() {
        context.late.wait();
    }
    for share in &request.mounts {
        shares::mount_at(share, Path::new("/"))?;
    }
    Ok(json!({}))
}

/// Sets the name of the running system and the one it starts with.
pub fn set_hostname(name: &str) -> Result<(), Refusal> {
    let ok = |sign: char| sign.is_ascii_alphanumeric() || sign == '-' || sign == '.';
    if name.is_empty() || name.len() > 64 || !name.chars().all(ok) {
        return Err(Refusal::new(
            "bad-request",
            format!("hostname {name:?}: expected 1 to 64 letters, digits, '-', '.'"),
        ));
    }
    sethostname(name).map_err(|error| Refusal::io(format!("hostname {name}"), &error.into()))?;
    // A read-only root keeps the name it had on disk.
    let _ = fs::write("/etc/hostname", format!("{name}\n"));
    // Programs look their own host's name up and would wait for a name server that has never heard of it.
    if let Some(text) = hosts_with(&fs::read_to_string("/etc/hosts").unwrap_or_default(), name) {
        let _ = fs::write("/etc/hosts", text);
    }
    Ok(())
}

/// The text of a hosts file with this name in it, at the address Debian uses for that; None if it is there.
fn hosts_with(text: &str, name: &str) -> Option<String> {
    let known = text.lines().any(|line| {
        let entry = line.split('#').next().unwrap_or_default();
        entry.split_ascii_whitespace().skip(1).any(|word| word == name)
    });
    let gap = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    (!known).then(|| format!("{text}{gap}127.0.1.1\t{name}\n"))
}

fn network(interfaces: &[Interface], routes: &[Route]) -> Result<(), Refusal> {
    let mut netlink = Netlink::open().map_err(|error| Refusal::io("netlink", &error))?;
    for wish in interfaces {
        let (name, index) = find(wish.name.as_deref(), wish.mac.as_deref())?;
        if let Some(text) = &wish.new_mac {
            let done = netlink.set_mac(index, mac_address(text)?);
            done.map_err(|error| Refusal::io(format!("address {text} of {name}"), &error))?;
        }
        netlink.link_up(index, wish.mtu).map_err(|error| Refusal::io(format!("interface {name}"), &error))?;
        for text in &wish.addresses {
            let (address, prefix) = network_address(text)?;
            let done = netlink.add_address(index, address, prefix);
            done.map_err(|error| Refusal::io(format!("address {text} of {name}"), &error))?;
        }
    }
    for route in routes {
        let (_, index) = find(route.interface.as_deref(), None)?;
        let target = match (route.to.as_str(), route.via) {
            ("default", Some(IpAddr::V6(_))) => (IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), 0),
            ("default", _) => (IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0),
            (text, _) => network_address(text)?,
        };
        let done = netlink.add_route(index, target, route.via);
        done.map_err(|error| Refusal::io(format!("route to {}", route.to), &error))?;
    }
    Ok(())
}

/// Name and number of an interface.
/// The bytes of an address such as `02:00:00:00:00:01`.
fn mac_address(text: &str) -> Result<[u8; 6], Refusal> {
    let parts: Vec<u8> = text.split(':').filter_map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let refusal = || Refusal::new("bad-request", format!("address {text:?}: expected one such as 02:00:00:00:00:01"));
    if text.split(':').count() != 6 {
        return Err(refusal());
    }
    parts.try_into().map_err(|_| refusal())
}

fn find(name: Option<&str>, mac: Option<&str>) -> Result<(String, u32), Refusal> {
    let mut all: Vec<_> = fs::read_dir("/sys/class/net").into_iter().flatten().flatten().collect();
    all.sort_by_key(|entry| number(&entry.path(), "ifindex"));
    let is_wanted = |found: &str, path: &Path| match (name, mac) {
        (Some(name), _) => found == name,
        (None, Some(mac)) => {
            info::read(&path.join("address").to_string_lossy()).is_some_and(|own| own.eq_ignore_ascii_case(mac))
        }
        (None, None) => found != "lo",
    };
    all.iter()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .find(|(found, path)| is_wanted(found, path))
        .and_then(|(found, path)| Some((found, number(&path, "ifindex")?)))
        .ok_or_else(|| {
            let wish = name.or(mac).unwrap_or("any");
            Refusal::new("not-found", format!("interface {wish}: the guest has none such"))
        })
}

fn number(path: &Path, file: &str) -> Option<u32> {
    info::read(&path.join(file).to_string_lossy())?.parse().ok()
}

/// `address/prefix`; an address alone is one host.
fn network_address(text: &str) -> Result<(IpAddr, u8), Refusal> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address: Option<IpAddr> = address.parse().ok();
    let longest = if address.is_some_and(|address| address.is_ipv4()) { 32 } else { 128 };
    let prefix = prefix.map_or(Some(longest), |prefix| prefix.parse().ok());
    match (address, prefix) {
        (Some(address), Some(prefix)) if prefix <= longest => Ok((address, prefix)),
        _ => Err(Refusal::new("bad-request", format!("address {text:?}: expected 192.0.2.1/24 or 2001:db8::1/64"))),
    }
}

/// Writes `/etc/resolv.conf`; one that is a link into a service of the guest's is replaced.
fn set_dns(dns: &Dns) -> Result<(), Refusal> {
    let mut text = String::new();
    for server in dns.servers.iter().take(ITEMS) {
        text += &format!("nameserver {server}\n");
    }
    let ok = |name: &&String| name.chars().all(|sign| sign.is_ascii_graphic());
    let search: Vec<_> = dns.search.iter().take(ITEMS).filter(ok).map(String::as_str).collect();
    if !search.is_empty() {
        text += &format!("search {}\n", search.join(" "));
    }
    replace(Path::new("/etc/resolv.conf"), text.as_bytes(), 0o644)
        .map_err(|error| Refusal::io("/etc/resolv.conf", &error))
}

fn add_ssh_keys(wish: &SshKeys) -> Result<(), Refusal> {
    let user = users::find(&wish.user, Path::new("/etc"))?;
    let folder = Path::new(&user.home).join(".ssh");
    let file = folder.join("authorized_keys");
    let write = || -> io::Result<()> {
        if !folder.is_dir() {
            fs::create_dir_all(&folder)?;
            fs::set_permissions(&folder, PermissionsExt::from_mode(0o700))?;
            std::os::unix::fs::lchown(&folder, Some(user.uid), Some(user.gid))?;
        }
        let mut text = fs::read_to_string(&file).unwrap_or_default();
        for key in wish.keys.iter().take(ITEMS).filter(|key| !key.contains('\n')) {
            if !text.lines().any(|line| line == key) {
                if !text.is_empty() && !text.ends_with('\n') {
                    text.push('\n');
                }
                text = text + key + "\n";
            }
        }
        replace(&file, text.as_bytes(), 0o600)?;
        std::os::unix::fs::lchown(&file, Some(user.uid), Some(user.gid))
    };
    write().map_err(|error| Refusal::io(file.display(), &error))
}

/// Replaces a file whole.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?; // a busybox guest may have no /etc
    let mut beside = path.as_os_str().to_owned();
    beside.push(".ostler");
    fs::write(&beside, content)?;
    fs::set_permissions(&beside, PermissionsExt::from_mode(mode))?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_addresses_are_read_with_and_without_a_prefix() {
        assert_eq!(network_address("10.0.2.15/24").expect("IPv4").1, 24);
        assert_eq!(network_address("fd00::1").expect("IPv6").1, 128);
        for bad in ["10.0.2.15/33", "10.0.2", "", "/24", "::1/129"] {
            assert!(network_address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn test_hardware_address_is_six_bytes() {
        assert_eq!(mac_address("02:00:00:00:00:fe").expect("an address"), [2, 0, 0, 0, 0, 0xFE]);
        for bad in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "02:00:00:00:00:xx", "02:00:00:00:00:100"] {
            assert_eq!(mac_address(bad).expect_err("refused").code, "bad-request", "{bad}");
        }
    }

    #[test]
    fn test_own_name_is_put_into_the_hosts_file_once() {
        assert_eq!(hosts_with("", "vm").as_deref(), Some("127.0.1.1\tvm\n"));
        let found = hosts_with("127.0.0.1 localhost # vm", "vm").expect("a comment is no entry");
        assert_eq!(found, "127.0.0.1 localhost # vm\n127.0.1.1\tvm\n");
        assert_eq!(hosts_with(&found, "vm"), None);
    }

    #[test]
    fn test_hostname_that_is_none_is_refused() {
        for bad in ["", "a b", "a\nb", &"x".repeat(65)] {
            assert_eq!(set_hostname(bad).expect_err("refused").code, "bad-request");
        }
    }
}
