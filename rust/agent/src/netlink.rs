//! Links, addresses and routes by rtnetlink(7): one request, one acknowledgement.
//!
//! Four messages are all the agent needs, so they are put together here rather than by a library ten times its size.
//! Left out on purpose: listing (info.rs asks libc), and everything that is no plain address or unicast route.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{recv, send, socket, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};

const NLMSG_ERROR: u16 = 2;
const HEAD: usize = 16;

/// A connection to the kernel's routing.
pub struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens one.
    pub fn open() -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Switches an interface on, with another MTU if one is given.
    pub fn link_up(&mut self, index: u32, mtu: Option<u32>) -> io::Result<()> {
        let up = libc::IFF_UP as u32;
        let mut body = vec![libc::AF_UNSPEC as u8, 0, 0, 0];
        for word in [index, up, up] {
            body.extend(word.to_ne_bytes()); // flags, then which of them are meant
        }
        if let Some(mtu) = mtu {
            attribute(&mut body, libc::IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.ask(libc::RTM_NEWLINK, 0, &body)
    }

    /// Gives an interface another hardware address.
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut body = vec![libc::AF_UNSPEC as u8, 0, 0, 0];
        for word in [index, 0, 0] {
            body.extend(word.to_ne_bytes());
        }
        attribute(&mut body, libc::IFLA_ADDRESS, &mac);
        self.ask(libc::RTM_NEWLINK, 0, &body)
    }

    /// Gives an interface an address, or leaves the one it has.
    pub fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut body = vec![family(address), prefix, libc::IFA_F_NODAD as u8, 0];
        body.extend(index.to_ne_bytes());
        attribute(&mut body, libc::IFA_LOCAL, &octets(address));
        attribute(&mut body, libc::IFA_ADDRESS, &octets(address));
        self.ask(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &body)
    }

    /// Adds a route to `target`, or replaces the one there is; `gateway` is none where the target is on the link.
    pub fn add_route(&mut self, index: u32, target: (IpAddr, u8), gateway: Option<IpAddr>) -> io::Result<()> {
        let (address, prefix) = target;
        let scope = if gateway.is_some() { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
        let table = libc::RT_TABLE_MAIN;
        let mut body =
            vec![family(address), prefix, 0, 0, table, libc::RTPROT_STATIC, scope, libc::RTN_UNICAST, 0, 0, 0, 0];
        if prefix > 0 {
            attribute(&mut body, libc::RTA_DST, &octets(address));
        }
        if let Some(gateway) = gateway {
            attribute(&mut body, libc::RTA_GATEWAY, &octets(gateway));
        }
        attribute(&mut body, libc::RTA_OIF, &index.to_ne_bytes());
        self.ask(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &body)
    }

    /// Sends a request and waits for the kernel's verdict.
    fn ask(&mut self, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let mut message = ((HEAD + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(((flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        send(self.fd.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0; 4096];
        loop {
            let count = recv(self.fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            if let Some(result) = verdict(&answer[..count], self.sequence) {
                return result;
            }
        }
    }
}

/// The kernel's answer to one request, if it is in these bytes.
fn verdict(bytes: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let number = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let code = i32::from_ne_bytes(bytes.get(HEAD..HEAD + 4)?.try_into().ok()?);
    let is_mine = kind == NLMSG_ERROR && number == sequence;
    is_mine.then(|| if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code).into()) })
}

/// Appends an attribute, which starts at a multiple of four.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend(((4 + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_attribute_is_padded_but_its_length_is_not() {
        let mut body = Vec::new();
        attribute(&mut body, 4, &[1, 2, 3, 4, 5]);
        assert_eq!(body, [&9u16.to_ne_bytes()[..], &4u16.to_ne_bytes(), &[1, 2, 3, 4, 5, 0, 0, 0]].concat());
    }

    #[test]
    fn test_verdict_of_another_request_is_not_taken() {
        let mut bytes = vec![20, 0, 0, 0, 2, 0, 0, 0];
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend((-libc::EEXIST).to_ne_bytes());
        assert!(verdict(&bytes, 8).is_none());
        let error = verdict(&bytes, 7).expect("mine").expect_err("an error");
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
    }
}
