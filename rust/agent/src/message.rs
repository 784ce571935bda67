//! What requests and answers say: docs/agent-protocol.md, "Operations".
//!
//! Payloads are JSON. Paths, arguments and variables are byte strings in Linux: where they are no UTF-8 they stand in the
//! JSON as the bytes they are, which [`Bytes`] reads and writes.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use serde::de::{self, DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer};
use thiserror::Error;

/// Why the agent will not do what it was asked for: `code` for programs, `message` for people.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct Refusal {
    /// One of the codes of the specification.
    pub code: &'static str,
    /// One line that names what failed.
    pub message: String,
}

impl Refusal {
    /// A refusal with its line.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// A refusal because the system refused `what`.
    pub fn io(what: impl std::fmt::Display, error: &io::Error) -> Self {
        let code = match error.raw_os_error() {
            Some(libc::ENOENT) => "not-found",
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => "denied",
            Some(libc::ENOSPC | libc::EDQUOT) => "no-space",
            Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY | libc::ENODEV) => "unsupported",
            Some(libc::ENOTDIR | libc::EISDIR | libc::EEXIST | libc::ENOTEMPTY) => "wrong-type",
            _ => "failed",
        };
        Self::new(code, format!("{what}: {}", reason(error)))
    }
}

/// The system's own words for an error, without Rust's number behind them.
pub fn reason(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| nix::errno::Errno::from_raw(code).desc().to_string())
}

/// Why an operation ended early.
#[derive(Debug, Error)]
pub enum Failure {
    /// The host is told, and the connection goes on.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is nobody left to tell.
    #[error("connection lost: {0}")]
    Lost(#[from] io::Error),
}

/// What an operation gives.
pub type Outcome<T> = Result<T, Failure>;

/// A byte string, which need not be UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// As an argument or variable.
    pub fn to_os(&self) -> OsString {
        OsString::from_vec(self.0.clone())
    }

    /// As a path.
    pub fn to_path(&self) -> PathBuf {
        PathBuf::from(self.to_os())
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Taker;
        impl Visitor<'_> for Taker {
            type Value = Bytes;
            fn expecting(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
                out.write_str("a string without zero bytes")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                self.visit_bytes(text.as_bytes())
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                if bytes.contains(&0) {
                    return Err(E::custom("a string with a zero byte"));
                }
                Ok(Bytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_byte_buf(Taker)
    }
}

/// Reads a payload.
pub fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(payload).map_err(|error| Refusal::new("bad-request", format!("request: {error}")))
}

/// The host's greeting.
#[derive(Deserialize)]
pub struct Hello {
    /// Always [`PROTOCOL`].
    pub protocol: String,
    /// Oldest and newest version the host speaks.
    pub versions: (u32, u32),
}

/// The protocol's name.
pub const PROTOCOL: &str = "ostler-agent";
/// The one version this agent speaks.
pub const VERSION: u32 = 1;

/// The part of a request that says which it is.
#[derive(Deserialize)]
pub struct Operation {
    /// The operation's name.
    pub op: String,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// A number of a signal.
#[derive(Deserialize)]
pub struct SignalNumber {
    /// As the kernel numbers them.
    pub signal: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_bytes_that_are_no_utf8_are_taken_as_they_are() {
        #[derive(Deserialize)]
        struct Request {
            argv: Vec<Bytes>,
        }
        let request: Request = parse(b"{\"argv\":[\"caf\xe9\",\"\\u00e9\"],\"more\":\"\xff\"}").expect("taken");
        assert_eq!(request.argv, [Bytes(b"caf\xe9".to_vec()), Bytes("é".as_bytes().to_vec())]);
    }

    #[test]
    fn test_bytes_with_a_zero_are_refused() {
        assert!(parse::<Vec<Bytes>>(b"[\"a\\u0000b\"]").is_err());
    }
}
