//! What the host tells the first process: words of the kernel's command line that begin with `ostler.`.
//!
//! | word | meaning |
//! |---|---|
//! | `ostler.root=WHAT` | `serial=S`, `LABEL=L`, `UUID=U`, `/dev/NAME`, `auto` (the largest), `virtiofs:TAG`, `9p:TAG`, `none` (stay in the initrd) |
//! | `ostler.part=N` | the partition of that disk; else the disk itself, or its largest with a Linux file system |
//! | `ostler.rootmode=rw\|ro\|overlay` | `overlay`: read-only below, changes in memory; default `rw` |
//! | `ostler.rootflags=OPTIONS` | options of the file system |
//! | `ostler.init=agent\|auto\|PATH` | who is process 1: the agent (default), the image's init if it has one, or that program |
//! | `ostler.share=TAG:/PATH[:ro][,9p]` | a folder of the host's; any number |
//! | `ostler.hostname=NAME` | the guest's name |
//! | `ostler.exec="COMMAND"` | run this by the shell on the console, then power off |

use crate::shares::Share;

/// The most shares one command line can ask for.
const SHARES: usize = 64;

/// How the root file system is mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RootMode {
    /// Read and write.
    #[default]
    ReadWrite,
    /// Read only.
    ReadOnly,
    /// Read only, with what is written kept in memory.
    Overlay,
}

/// Who becomes process 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// The agent.
    #[default]
    Agent,
    /// The image's own, if it has one.
    Auto,
    /// This program of the image's.
    Program(String),
}

/// The orders.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// Where the root is; none to stay in the initrd.
    pub root: Option<String>,
    /// Which partition of it.
    pub part: Option<u32>,
    /// How it is mounted.
    pub mode: RootMode,
    /// Options of its file system.
    pub flags: Option<String>,
    /// Who becomes process 1.
    pub init: Init,
    /// Folders of the host's.
    pub shares: Vec<Share>,
    /// The guest's name.
    pub hostname: Option<String>,
    /// A command to run on the console.
    pub exec: Option<String>,
    /// Words that make no sense.
    pub bad: Vec<String>,
}

/// Reads a command line.
pub fn parse(line: &str) -> Orders {
    let mut orders = Orders::default();
    for word in words(line) {
        let Some(rest) = word.strip_prefix("ostler.") else { continue };
        let (name, value) = rest.split_once('=').unwrap_or((rest, ""));
        if !orders.take(name, value) {
            orders.bad.push(word);
        }
    }
    orders
}

impl Orders {
    fn take(&mut self, name: &str, value: &str) -> bool {
        match (name, value) {
            ("root", "none") => self.root = None,
            ("root", _) => self.root = Some(value.into()),
            ("part", _) => match value.parse() {
                Ok(part) => self.part = Some(part),
                Err(_) => return false,
            },
            ("rootmode", "rw") => self.mode = RootMode::ReadWrite,
            ("rootmode", "ro") => self.mode = RootMode::ReadOnly,
            ("rootmode", "overlay") => self.mode = RootMode::Overlay,
            ("rootflags", _) => self.flags = Some(value.into()),
            ("init", "agent") => self.init = Init::Agent,
            ("init", "auto") => self.init = Init::Auto,
            ("init", path) if path.starts_with('/') => self.init = Init::Program(path.into()),
            ("share", _) if self.shares.len() < SHARES => match Share::from_word(value) {
                Some(share) => self.shares.push(share),
                None => return false,
            },
            ("hostname", _) => self.hostname = Some(value.into()),
            ("exec", _) => self.exec = Some(value.into()),
            // Words for the busybox initrd, which shares the prefix.
            ("report" | "poweroff" | "panic" | "tty" | "term", _) => {}
            _ => return false,
        }
        true
    }
}

/// Splits at blanks that are not between double quotes, as the kernel does; the quotes go.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for sign in line.trim_end().chars() {
        match sign {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().expect("never empty").push(sign),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_command_line_becomes_orders() {
        let orders =
            parse("console=ttyS0 ostler.root=serial=root ostler.rootmode=overlay ostler.exec=\"echo a b\" quiet\n");
        assert_eq!(orders.root.as_deref(), Some("serial=root"));
        assert_eq!(orders.mode, RootMode::Overlay);
        assert_eq!(orders.exec.as_deref(), Some("echo a b"));
        assert_eq!(orders.init, Init::Agent);
        assert!(orders.bad.is_empty());
    }

    #[test]
    fn test_quote_around_the_whole_word_is_understood() {
        assert_eq!(parse("\"ostler.exec=a  b\"").exec.as_deref(), Some("a  b"));
    }

    #[test]
    fn test_words_that_make_no_sense_are_kept_for_the_complaint() {
        let orders = parse("ostler.rootmode=sideways ostler.part=x ostler.init=relative ostler.nonsense");
        assert_eq!(orders.bad.len(), 4);
    }
}
