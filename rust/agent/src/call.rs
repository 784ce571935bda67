//! `ostler-agent call …`: Ostler's own calls, from user space, for whoever may open ports (root). docs/hypercalls.md.
//!
//! A call is a page with the request in it and one write to a port. The host answers in the page. It needs the page's
//! guest-physical number (/proc/self/pagemap); if the kernel moves the page between the look and the write, the host
//! finds no magic number there, touches nothing, and the call is made again.

use std::arch::asm;
use std::arch::x86_64::__cpuid;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;

const FIRST_LEAF: u32 = 0x4000_0100;
const SIGNATURE: &[u8; 12] = b"OstlerCalls\0";
const PORTS: libc::c_ulong = 0x10;
const CALL: u16 = 4;
const PAGE: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"OSTLCALL");
const NUMBER: usize = 0x08;
const SEQUENCE: usize = 0x0c;
const ARGUMENTS: usize = 0x10;
const LENGTH: usize = 0x40;
const RESULT: usize = 0x48;
const ANSWERED: usize = 0x50;
const DATA: usize = 0x80;
/// The kernel may move a page again and again, but not for ever.
const TRIES: u32 = 64;
const POLL: Duration = Duration::from_millis(10);

const USAGE: &str = "usage: ostler-agent call log TEXT | get KEY | put KEY VALUE | delete KEY | ready [STATUS]
       | snapshot NAME | own NUMBER [TEXT] | bench COUNT";

const PING: u32 = 0;
const LOG: u32 = 1;
const GET: u32 = 2;
const PUT: u32 = 3;
const DELETE: u32 = 4;
const READY: u32 = 5;
const SNAPSHOT: u32 = 6;
const ASK: u32 = 7;

/// Runs one subcommand; the exit status.
pub fn main(arguments: &[String]) -> u8 {
    match run(arguments) {
        Ok(()) => 0,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            eprintln!("{USAGE}");
            2
        }
        Err(error) => {
            eprintln!("ostler-agent: call: {error}");
            1
        }
    }
}

fn run(arguments: &[String]) -> io::Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let bad = || io::Error::from(io::ErrorKind::InvalidInput);
    if words.is_empty() {
        return Err(bad());
    }
    let mut caller = Caller::open()?;
    match words[..] {
        ["log", text] => caller.call(LOG, 0, text.as_bytes()).map(drop),
        ["get", key] => {
            let (_, value) = caller.call(GET, 0, key.as_bytes())?;
            io::stdout().write_all(&[value.as_slice(), b"\n"].concat())
        }
        ["put", key, value] => caller.call(PUT, 0, &[key.as_bytes(), b"\0", value.as_bytes()].concat()).map(drop),
        ["delete", key] => caller.call(DELETE, 0, key.as_bytes()).map(drop),
        ["ready"] => caller.call(READY, 0, b"").map(drop),
        ["ready", status] => caller.call(READY, status.parse().map_err(|_| bad())?, b"").map(drop),
        ["snapshot", name] => caller.snapshot(name),
        ["own", number, ref rest @ ..] if rest.len() < 2 => {
            let number = number.parse().map_err(|_| bad())?;
            let (token, _) = caller.call(number, 0, rest.first().unwrap_or(&"").as_bytes())?;
            let (result, data) = caller.finish(token)?;
            io::stdout().write_all(&[format!("{result} ").as_bytes(), &data, b"\n"].concat())
        }
        ["bench", count] => caller.bench(count.parse().map_err(|_| bad())?),
        _ => Err(bad()),
    }
}

/// A page and the port.
struct Caller {
    port: u16,
    page: *mut u8,
    pagemap: File,
    frame: u32,
    sequence: u32,
}

impl Caller {
    /// Finds the calls by CPUID and takes the port. Fails where this is no guest of Ostler's, or not root.
    fn open() -> io::Result<Caller> {
        let (first, facts) = (__cpuid(FIRST_LEAF), __cpuid(FIRST_LEAF + 1));
        let signature: Vec<u8> = [first.ebx, first.ecx, first.edx].iter().flat_map(|each| each.to_le_bytes()).collect();
        if signature != SIGNATURE || first.eax < FIRST_LEAF + 1 || facts.eax < 1 {
            return Err(io::Error::other("this machine has no calls of Ostler's"));
        }
        // SAFETY: gives this process the sixteen ports of the calls, and nothing else.
        if unsafe { libc::ioperm(facts.ebx as libc::c_ulong, PORTS, 1) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | libc::MAP_LOCKED;
        // SAFETY: a new mapping of one page, which stays until the process ends.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut caller = Caller { port: facts.ebx as u16, page: page.cast(), pagemap, frame: 0, sequence: 0 };
        caller.put(0, &MAGIC.to_le_bytes());
        caller.find()?;
        Ok(caller)
    }

    /// Looks up where the page is.
    fn find(&mut self) -> io::Result<()> {
        let mut entry = [0; 8];
        self.pagemap.read_exact_at(&mut entry, (self.page as u64 / PAGE as u64) * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        if frame == 0 {
            return Err(Errno::EPERM.into());
        }
        self.frame = u32::try_from(frame).map_err(|_| io::Error::from(Errno::EFAULT))?;
        Ok(())
    }

    fn call(&mut self, number: u32, argument: u64, data: &[u8]) -> io::Result<(i64, Vec<u8>)> {
        if data.len() > PAGE - DATA {
            return Err(Errno::EMSGSIZE.into());
        }
        for _ in 0..TRIES {
            self.put(ARGUMENTS, &argument.to_le_bytes());
            self.put(LENGTH, &(data.len() as u64).to_le_bytes());
            self.put(DATA, data);
            if self.ring(number) {
                let result = i64::from_le_bytes(self.get(RESULT));
                if result < 0 {
                    return Err(io::Error::from_raw_os_error(-result as i32));
                }
                let length = (u64::from_le_bytes(self.get(LENGTH)) as usize).min(PAGE - DATA);
                // SAFETY: `length` bytes from DATA on are within the page.
                let found = unsafe { std::slice::from_raw_parts(self.page.add(DATA), length) };
                return Ok((result, found.to_vec()));
            }
            self.find()?;
        }
        Err(Errno::EFAULT.into())
    }

    /// Makes the call in the page; false where the host did not find it.
    fn ring(&mut self, number: u32) -> bool {
        self.sequence = self.sequence.wrapping_add(1);
        self.put(NUMBER, &number.to_le_bytes());
        self.put(SEQUENCE, &self.sequence.to_le_bytes());
        self.put(ANSWERED, &0u64.to_le_bytes());
        let (port, frame) = (self.port + CALL, self.frame);
        // SAFETY: the port is ours (ioperm). The host writes to our page alone, and the clobber says so.
        unsafe { asm!("out dx, eax", in("dx") port, in("eax") frame, options(nostack, preserves_flags)) };
        u64::from_le_bytes(self.get(ANSWERED)) == u64::from(self.sequence)
    }

    fn finish(&mut self, token: i64) -> io::Result<(i64, Vec<u8>)> {
        loop {
            match self.call(ASK, token as u64, b"") {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => std::thread::sleep(POLL),
                other => return other,
            }
        }
    }

    /// Says `saved` where the guest goes on, and `restored` in the copy, which does not know the token.
    fn snapshot(&mut self, name: &str) -> io::Result<()> {
        let (token, _) = self.call(SNAPSHOT, 0, name.as_bytes())?;
        match self.finish(token) {
            Ok((_, name)) => println!("saved {}", String::from_utf8_lossy(&name)),
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => println!("restored"),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Round trips beside reads of a port that does nothing: nanoseconds each, best of five.
    fn bench(&mut self, count: u32) -> io::Result<()> {
        let (mut bare, mut calls) = (u128::MAX, u128::MAX);
        for _ in 0..5 {
            let started = Instant::now();
            for _ in 0..count {
                let port = self.port;
                // SAFETY: as above; a read of the version.
                unsafe { asm!("in eax, dx", in("dx") port, out("eax") _, options(nostack, preserves_flags)) };
            }
            bare = bare.min(started.elapsed().as_nanos() / u128::from(count.max(1)));
            let started = Instant::now();
            for _ in 0..count {
                self.put(LENGTH, &0u64.to_le_bytes());
                if !self.ring(PING) {
                    self.find()?;
                }
            }
            calls = calls.min(started.elapsed().as_nanos() / u128::from(count.max(1)));
        }
        println!("{{\"port_ns\": {bare}, \"call_ns\": {calls}, \"ratio\": {:.2}}}", calls as f64 / bare.max(1) as f64);
        Ok(())
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE);
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: within the page, as just checked; volatile, for the host reads it behind the compiler's back.
            unsafe { self.page.add(offset + index).write_volatile(*byte) };
        }
    }

    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        assert!(offset + N <= PAGE);
        // SAFETY: within the page, as just checked; volatile, for the host writes it behind the compiler's back.
        std::array::from_fn(|index| unsafe { self.page.add(offset + index).read_volatile() })
    }
}
