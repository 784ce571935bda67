//! The program inside the guest. As the first process of Ostler's initrd it brings the guest to its root file system;
//! as a daemon it is the host's hand in it: commands, files, settings. docs/agent-protocol.md says how they talk.
//!
//! One static program without any dependency, so that it runs in every image, an empty one too. No threads: each
//! connection is a process, so fork and exec are always safe and a crash ends one connection only.

mod boot;
mod button;
mod call;
mod cmdline;
mod configure;
mod conn;
mod copy_in;
mod copy_out;
mod descend;
mod exec;
mod freeze;
mod info;
mod late;
mod message;
mod modules;
mod mounts;
mod netlink;
mod power;
mod root;
mod server;
mod session;
mod shares;
mod spawn;
mod superblock;
mod system;
mod users;
mod wire;

use std::process::ExitCode;

use crate::late::Late;
use crate::server::{Place, Server};
use crate::session::Context;

const USAGE: &str = "usage: ostler-agent --listen unix:PATH|vsock[:PORT]|console[:NAME] ...
       ostler-agent call log|get|put|delete|ready|snapshot|own|bench ...
       ostler-agent --version
As process 1 of an initrd it takes its orders from the kernel's command line.";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        boot::run();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("ostler-agent {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if let Some(("call", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return ExitCode::from(call::main(rest));
    }
    let Some(places) = places(&arguments) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let context = Context { late: Late::default(), is_init: false, trouble: None };
    match Server::open(&places, context).and_then(Server::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ostler-agent: {}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn places(arguments: &[String]) -> Option<Vec<Place>> {
    let pairs = arguments.chunks(2).map(|pair| match pair {
        [flag, place] if flag == "--listen" => Place::parse(place),
        _ => None,
    });
    pairs.collect::<Option<Vec<_>>>().filter(|places| !places.is_empty())
}
