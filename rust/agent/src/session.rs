//! One connection from the greeting to its end: requests, one after the other.
//!
//! Each connection has a process of its own, so an operation may block, hold a freeze or crash without touching the
//! others. Frames that still belong to an operation that has failed meanwhile are skipped between requests.

use std::time::Instant;

use nix::poll::PollTimeout;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;

use crate::configure;
use crate::conn::Conn;
use crate::freeze::{self, Frozen};
use crate::late::Late;
use crate::message::{parse, Failure, Hello, Operation, Outcome, Refusal, PROTOCOL, VERSION};
use crate::wire::{Frame, Kind};
use crate::{copy_in, copy_out, exec, info, power, system};

/// The operations this agent knows, and what else the host may rely on.
pub const FEATURES: &[&str] = &[
    "ping",
    "exec",
    "tty",
    "get",
    "put",
    "info",
    "shutdown",
    "set-time",
    "freeze",
    "thaw",
    "grow-root",
    "configure",
    "entropy",
];

/// What the connections share with the agent that accepted them.
#[derive(Clone)]
pub struct Context {
    /// What is still being loaded.
    pub late: Late,
    /// Whether the agent is the guest's first process.
    pub is_init: bool,
    /// Why the guest did not come to its root file system.
    pub trouble: Option<String>,
}

/// Serves a connection until the host ends it or breaks the protocol.
pub fn serve(conn: &mut Conn, context: &Context) {
    // A host that is gone is told nothing; one that broke the protocol sees the end of the connection.
    let _ = converse(conn, context);
}

fn converse(conn: &mut Conn, context: &Context) -> Outcome<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None).map_err(std::io::Error::from)?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let children = SignalFd::with_flags(&mask, flags).map_err(std::io::Error::from)?;
    if !greet(conn, context)? {
        return Ok(());
    }
    let mut frozen: Option<Frozen> = None;
    loop {
        if let Some(frame) = next(conn, &mut frozen)? {
            match handle(conn, &frame, context, &children, &mut frozen) {
                Err(Failure::Refused(refusal)) => tell(conn, &refusal)?,
                other => other?,
            }
        } else if conn.ended() {
            return Ok(());
        }
    }
}

/// Exchanges greetings; false where there is nobody to talk to or no common version.
fn greet(conn: &mut Conn, context: &Context) -> Outcome<bool> {
    let Some(frame) = conn.recv()? else { return Ok(false) };
    answer_greeting(conn, &frame, context)
}

fn answer_greeting(conn: &mut Conn, frame: &Frame, context: &Context) -> Outcome<bool> {
    let hello = if frame.kind == Kind::Hello { parse::<Hello>(&frame.payload).ok() } else { None };
    let Some(hello) = hello.filter(|hello| hello.protocol == PROTOCOL) else {
        tell(conn, &Refusal::new("bad-request", "greeting: expected HELLO of ostler-agent"))?;
        return Ok(false);
    };
    if !(hello.versions.0..=hello.versions.1).contains(&VERSION) {
        let text =
            format!("version: the host speaks {} to {}, the agent {VERSION}", hello.versions.0, hello.versions.1);
        tell(conn, &Refusal::new("version", text))?;
        return Ok(false);
    }
    let agent = env!("CARGO_PKG_VERSION");
    let mut hello = json!({"protocol": PROTOCOL, "version": VERSION, "agent": agent, "features": FEATURES});
    if let Some(trouble) = &context.trouble {
        hello["trouble"] = trouble.as_str().into();
    }
    conn.send_json(Kind::Hello, &hello)?;
    Ok(true)
}

/// Waits for the next frame, but not beyond the end of a freeze.
fn next(conn: &mut Conn, frozen: &mut Option<Frozen>) -> Outcome<Option<Frame>> {
    if let Some(frame) = conn.next_frame()? {
        return Ok(Some(frame));
    }
    let timeout = frozen.as_ref().map_or(PollTimeout::NONE, |frozen| {
        let left = frozen.until.saturating_duration_since(Instant::now()).as_millis() + 1;
        PollTimeout::try_from(left.min(60_000) as i32).unwrap_or(PollTimeout::MAX)
    });
    if conn.readable(timeout)? {
        conn.read_some()?;
    }
    if frozen.as_ref().is_some_and(|frozen| Instant::now() >= frozen.until) {
        *frozen = None; // thaws
    }
    conn.next_frame()
}

fn handle(
    conn: &mut Conn,
    frame: &Frame,
    context: &Context,
    children: &SignalFd,
    frozen: &mut Option<Frozen>,
) -> Outcome<()> {
    match frame.kind {
        Kind::Request => {}
        // On a console port one host may follow another so quickly that nothing tells of the change.
        Kind::Hello => return answer_greeting(conn, frame, context).map(drop),
        Kind::Reply | Kind::Error | Kind::Exit => {
            return Err(Refusal::new("bad-request", "protocol: expected a REQUEST").into());
        }
        _ => return Ok(()), // the rest of an operation that failed
    }
    let payload = &frame.payload;
    let operation: Operation = parse(payload)?;
    let answer = match operation.op.as_str() {
        "ping" => json!({}),
        "exec" => return exec::serve(conn, payload, children),
        "get" => copy_out::serve(conn, payload)?,
        "put" => copy_in::serve(conn, payload)?,
        "info" => info::collect(context),
        "shutdown" => return power::serve(conn, payload, context),
        "set-time" => system::set_time(payload)?,
        "entropy" => system::add_entropy(payload)?,
        "grow-root" => system::grow_root()?,
        "freeze" => freeze::freeze(payload, frozen)?,
        "thaw" => freeze::thaw(frozen),
        "configure" => configure::serve(payload, context)?,
        other => {
            return Err(Refusal::new("unsupported", format!("operation {other:?}: this agent does not know it")).into())
        }
    };
    conn.send_json(Kind::Reply, &answer)
}

fn tell(conn: &mut Conn, refusal: &Refusal) -> Outcome<()> {
    let message: String = refusal.message.chars().take(2000).collect();
    conn.send_json(Kind::Error, &json!({"code": refusal.code, "message": message}))
}
