//! Frames of the agent's protocol: docs/agent-protocol.md, "Frames".
//!
//! A frame is eight bytes of head (payload length, kind, stream, zero; little endian) and at most [`MAX_PAYLOAD`] bytes.
//! Left out on purpose: what the frames mean; that is `message.rs` and the operations.

use thiserror::Error;

/// The longest payload of a frame, in bytes. It bounds what either side has to hold.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// The length of a frame's head, in bytes.
pub const HEAD: usize = 8;
/// How much of one stream of a command may be under way before its reader makes room, in bytes.
pub const WINDOW: usize = 256 * 1024;

/// What a frame is. The numbers are on the wire and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The greeting, first in both directions.
    Hello = 1,
    /// The host asks for an operation.
    Request = 2,
    /// The operation succeeded, or the command runs.
    Reply = 3,
    /// The operation failed.
    Error = 4,
    /// Bytes of a stream; none at all is its end.
    Data = 5,
    /// The reader of a stream has room for so many bytes more.
    Window = 6,
    /// A signal for the command.
    Signal = 7,
    /// The size of the command's terminal.
    Resize = 8,
    /// How the command ended.
    Exit = 9,
    /// The head of one file, folder or link of a tree.
    Entry = 10,
    /// No more entries.
    End = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Data, End, Entry, Error, Exit, Hello, Reply, Request, Resize, Signal, Window};
        [Hello, Request, Reply, Error, Data, Window, Signal, Resize, Exit, Entry, End]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// One frame, taken off the wire.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The stream it belongs to, for DATA and WINDOW.
    pub stream: u8,
    /// Its content.
    pub payload: Vec<u8>,
}

/// The peer does not speak this protocol.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("bytes {0:02x?}: expected the head of a frame")]
pub struct WireError(pub [u8; HEAD]);

/// Frames out of a stream of bytes. Holds less than one frame beyond what was fed last.
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// Adds what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next whole frame, if there is one.
    pub fn next(&mut self) -> Result<Option<Frame>, WireError> {
        let rest = &self.buffer[self.taken..];
        let Some(head) = rest.first_chunk::<HEAD>() else { return Ok(None) };
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let kind = Kind::from_byte(head[4]).ok_or(WireError(*head))?;
        if length > MAX_PAYLOAD || head[6] != 0 || head[7] != 0 {
            return Err(WireError(*head));
        }
        let Some(payload) = rest.get(HEAD..HEAD + length) else { return Ok(None) };
        let frame = Frame { kind, stream: head[5], payload: payload.to_vec() };
        self.taken += HEAD + length;
        Ok(Some(frame))
    }
}

/// Returns the head of a frame of `length` payload bytes, which the caller keeps to [`MAX_PAYLOAD`].
pub fn head(kind: Kind, stream: u8, length: usize) -> [u8; HEAD] {
    let size = (length as u32).to_le_bytes();
    [size[0], size[1], size[2], size[3], kind as u8, stream, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: Kind, stream: u8, payload: &[u8]) -> Vec<u8> {
        [&head(kind, stream, payload.len())[..], payload].concat()
    }

    #[test]
    fn test_decoder_fed_byte_by_byte_gives_every_frame_once() {
        let bytes = [frame(Kind::Hello, 0, b"{}"), frame(Kind::Data, 2, b""), frame(Kind::Data, 1, &[7; 300])].concat();
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for byte in &bytes {
            decoder.feed(std::slice::from_ref(byte));
            frames.extend(decoder.next().expect("well-formed"));
        }
        let found: Vec<_> = frames.iter().map(|f| (f.kind, f.stream, f.payload.len())).collect();
        assert_eq!(found, [(Kind::Hello, 0, 2), (Kind::Data, 2, 0), (Kind::Data, 1, 300)]);
    }

    #[test]
    fn test_decoder_given_a_length_beyond_the_limit_refuses_before_the_payload() {
        let mut decoder = Decoder::default();
        decoder.feed(&head(Kind::Data, 0, MAX_PAYLOAD + 1));
        assert!(decoder.next().is_err());
    }

    #[test]
    fn test_decoder_given_an_unknown_kind_or_a_reserved_byte_refuses() {
        for bytes in [[0, 0, 0, 0, 99, 0, 0, 0], [0, 0, 0, 0, 5, 0, 0, 1], *b"GET / HT"] {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            assert_eq!(decoder.next(), Err(WireError(bytes)));
        }
    }
}
