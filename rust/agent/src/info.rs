//! The operation `info`: what the guest is and how it does.

use std::collections::BTreeMap;
use std::fs;

use nix::ifaddrs::getifaddrs;
use nix::sys::utsname::uname;
use serde_json::{json, Map, Value};

use crate::session::Context;

/// The most addresses that are reported.
const ADDRESSES: usize = 256;
/// The longest value taken from a file, in characters.
const TEXT: usize = 256;

/// Collects everything that can be found; what cannot is null or missing.
pub fn collect(context: &Context) -> Value {
    context.late.wait();
    let names = uname().ok();
    let name = |pick: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        names.as_ref().map(|names| pick(names).to_string_lossy().into_owned())
    };
    json!({
        "hostname": name(|names| names.nodename()),
        "kernel": name(|names| names.release()),
        "machine": name(|names| names.machine()),
        "os": os_release(),
        "uptime_s": first_number("/proc/uptime"),
        "load": load(),
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "memory": memory(),
        "addresses": addresses(),
        "init": if context.is_init { Some("agent".into()) } else { read("/proc/1/comm") },
        "pid": std::process::id(),
    })
}

/// Some of `/etc/os-release`.
fn os_release() -> Value {
    let text = fs::read_to_string("/etc/os-release").or_else(|_| fs::read_to_string("/usr/lib/os-release"));
    let mut found = Map::new();
    for line in text.unwrap_or_default().lines() {
        let Some((name, value)) = line.split_once('=') else { continue };
        let key = match name {
            "ID" => "id",
            "VERSION_ID" => "version",
            "PRETTY_NAME" => "name",
            _ => continue,
        };
        found.insert(key.into(), value.trim_matches('"').chars().take(TEXT).collect::<String>().into());
    }
    Value::Object(found)
}

fn memory() -> Value {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib: BTreeMap<&str, u64> = text
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name, value.split_whitespace().next()?.parse().ok()?))
        })
        .collect();
    let bytes = |name| kib.get(name).map(|size| size * 1024);
    json!({
        "total_bytes": bytes("MemTotal"),
        "available_bytes": bytes("MemAvailable"),
        "free_bytes": bytes("MemFree"),
        "swap_bytes": bytes("SwapTotal"),
    })
}

fn addresses() -> Vec<Value> {
    let mut found = Vec::new();
    for entry in getifaddrs().into_iter().flatten().take(ADDRESSES) {
        let Some(address) = entry.address else { continue };
        let mask = entry.netmask;
        let (text, prefix) = if let Some(inet) = address.as_sockaddr_in() {
            let bits = mask.and_then(|mask| mask.as_sockaddr_in().map(|mask| u32::from(mask.ip()).count_ones()));
            (inet.ip().to_string(), bits)
        } else if let Some(inet) = address.as_sockaddr_in6() {
            let bits = mask.and_then(|mask| mask.as_sockaddr_in6().map(|mask| u128::from(mask.ip()).count_ones()));
            (inet.ip().to_string(), bits)
        } else {
            continue;
        };
        let mac = read(&format!("/sys/class/net/{}/address", entry.interface_name));
        found.push(json!({"interface": entry.interface_name, "address": text, "prefix": prefix, "mac": mac}));
    }
    found
}

fn load() -> Vec<f64> {
    read("/proc/loadavg").unwrap_or_default().split(' ').take(3).filter_map(|word| word.parse().ok()).collect()
}

/// The first number in a file.
pub fn first_number(path: &str) -> Option<f64> {
    read(path)?.split_whitespace().next()?.parse().ok()
}

/// A short file without the end of its line.
pub fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim_end().chars().take(TEXT).collect())
}
