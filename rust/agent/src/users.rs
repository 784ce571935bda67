//! Users and groups from `/etc/passwd` and `/etc/group`, read by hand.
//!
//! A static glibc cannot load the name services the guest may be configured for, and a busybox guest has none. So users
//! that exist only in a directory service are not found; a numeric `uid:gid` always works.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use crate::message::Refusal;

/// A file of accounts larger than this is read up to here, in bytes.
const FILE_LIMIT: u64 = 16 << 20;

/// Whom a command runs as.
#[derive(Debug, PartialEq, Eq)]
pub struct User {
    /// Numeric user.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one among them.
    pub groups: Vec<u32>,
    /// The name, where the user has one.
    pub name: Option<OsString>,
    /// The home folder, `/` where there is none.
    pub home: OsString,
    /// The shell, `/bin/sh` where there is none.
    pub shell: OsString,
}

/// Looks up `wish`: a name or a number, then perhaps a colon and a group's name or number.
pub fn find(wish: &str, etc: &Path) -> Result<User, Refusal> {
    let (user, group) = wish.split_once(':').map_or((wish, None), |(user, group)| (user, Some(group)));
    let mut found = account(user, etc)?;
    if let Some(group) = group.filter(|group| !group.is_empty()) {
        found.gid = group_id(group, etc)?;
        found.groups = vec![found.gid];
    }
    Ok(found)
}

fn account(user: &str, etc: &Path) -> Result<User, Refusal> {
    let number = user.parse::<u32>().ok();
    let is_wanted =
        |fields: &[Vec<u8>]| fields[0] == user.as_bytes() || (number.is_some() && number == numeric(&fields[2]));
    // A name made of digits is a name first, as for chown.
    let line = lines(&etc.join("passwd"), 7).find(|fields| is_wanted(fields));
    let Some(fields) = line else {
        let Some(uid) = number.or((user == "root").then_some(0)) else {
            return Err(Refusal::new("no-user", format!("user {user:?}: not in the guest's /etc/passwd")));
        };
        let home = if uid == 0 { "/root" } else { "/" };
        let home = if Path::new(home).is_dir() { home } else { "/" };
        return Ok(User { uid, gid: uid, groups: vec![uid], name: None, home: home.into(), shell: "/bin/sh".into() });
    };
    let (Some(uid), Some(gid)) = (numeric(&fields[2]), numeric(&fields[3])) else {
        return Err(Refusal::new("no-user", format!("user {user:?}: its line in /etc/passwd has no numbers")));
    };
    let or = |field: &[u8], other: &str| OsString::from_vec(if field.is_empty() { other.into() } else { field.into() });
    Ok(User {
        uid,
        gid,
        groups: memberships(&fields[0], gid, etc),
        name: Some(OsString::from_vec(fields[0].clone())),
        home: or(&fields[5], "/"),
        shell: or(&fields[6], "/bin/sh"),
    })
}

/// The group's number.
fn group_id(group: &str, etc: &Path) -> Result<u32, Refusal> {
    lines(&etc.join("group"), 3)
        .find(|fields| fields[0] == group.as_bytes())
        .and_then(|fields| numeric(&fields[2]))
        .or_else(|| group.parse().ok())
        .ok_or_else(|| Refusal::new("no-user", format!("group {group:?}: not in the guest's /etc/group")))
}

fn memberships(name: &[u8], gid: u32, etc: &Path) -> Vec<u32> {
    let mut groups = vec![gid];
    for fields in lines(&etc.join("group"), 4) {
        if fields[3].split(|byte| *byte == b',').any(|member| member == name) {
            groups.extend(numeric(&fields[2]).filter(|id| !groups.contains(id)));
        }
    }
    groups.truncate(1024); // setgroups takes more, but nobody means it
    groups
}

/// The lines of a file of accounts that have at least `count` fields.
fn lines(path: &Path, count: usize) -> impl Iterator<Item = Vec<Vec<u8>>> {
    File::open(path)
        .into_iter()
        .flat_map(|file| BufReader::new(file.take(FILE_LIMIT)).split(b'\n').map_while(Result::ok))
        .map(|line| line.split(|byte| *byte == b':').map(<[u8]>::to_vec).collect::<Vec<_>>())
        .filter(move |fields| fields.len() >= count)
}

fn numeric(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etc() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(
            folder.path().join("passwd"),
            "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:100:Ann:/home/ann:\n7:x:1007:1007::/:/bin/sh\n",
        )
        .expect("written");
        std::fs::write(folder.path().join("group"), "users:x:100:\nkvm:x:104:bob,ann\nwheel:x:10:ann\n")
            .expect("written");
        folder
    }

    #[test]
    fn test_user_by_name_has_its_groups_home_and_a_shell() {
        let found = find("ann", etc().path()).expect("ann");
        assert_eq!((found.uid, found.gid, found.groups), (1000, 100, vec![100, 104, 10]));
        assert_eq!((found.home, found.shell), ("/home/ann".into(), "/bin/sh".into()));
    }

    #[test]
    fn test_user_by_number_and_group_by_name_are_found() {
        let found = find("1000:kvm", etc().path()).expect("1000");
        assert_eq!((found.uid, found.gid, found.groups), (1000, 104, vec![104]));
    }

    #[test]
    fn test_name_made_of_digits_is_a_name_first() {
        assert_eq!(find("7", etc().path()).expect("7").uid, 1007);
    }

    #[test]
    fn test_unknown_number_is_taken_and_unknown_name_refused() {
        assert_eq!(find("4242", etc().path()).expect("4242").gid, 4242);
        assert_eq!(find("nobody-here", etc().path()).expect_err("refused").code, "no-user");
        assert_eq!(find("ann:nowhere", etc().path()).expect_err("refused").code, "no-user");
    }

    #[test]
    fn test_root_is_known_without_any_file() {
        assert_eq!(find("root", Path::new("/nonexistent")).expect("root").uid, 0);
    }
}
