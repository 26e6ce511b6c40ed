//! Users by name: looked up in the guest's own files.

use std::fs;

use rustix::fs::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) id: u32,
    pub(crate) group: u32,
    /// Further groups: those that list the user as a member, unless a group was asked for.
    pub(crate) groups: Vec<u32>,
    /// The home directory, if the user is a known one.
    pub(crate) home: Option<String>,
}

impl User {
    /// Whether the calling thread is one of this user already.
    pub(crate) fn is_here(&self) -> bool {
        let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        // Who is not root has their groups already, and could not take on others.
        let groups = user != 0 || self.groups.iter().all(|one| *one == group);
        (user, group) == (self.id, self.group) && groups
    }

    /// Makes the calling thread, and no other, one of this user: what it starts is the user's.
    pub(crate) fn take_on(&self) -> std::io::Result<()> {
        let groups: Vec<Gid> = self.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        set_thread_groups(&groups)?;
        let (group, user) = (Some(Gid::from_raw(self.group)), Some(Uid::from_raw(self.id)));
        set_thread_res_gid(group, group, group)?;
        Ok(set_thread_res_uid(user, user, user)?)
    }

    /// The home directory; of one whom nobody knows, root's usual place, or the top.
    pub(crate) fn home(&self) -> &str {
        let usual = if self.id == 0 { "/root" } else { "/" };
        self.home.as_deref().filter(|home| !home.is_empty()).unwrap_or(usual)
    }
}

/// Finds `USER[:GROUP]`, each a name or a number. Without a group it is the user's own, or 0 for a number that nobody
/// has.
pub(crate) fn find(text: &str) -> Option<User> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    find_in(text, &read("/etc/passwd"), &read("/etc/group"))
}

fn find_in(text: &str, passwd: &str, groups: &str) -> Option<User> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    // passwd(5): name, password, user, group, comment, home, shell.
    let known = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = known.into_iter().find(|entry| entry.first() == Some(&user) || entry.get(2) == Some(&user));
    let number = |at: usize| entry.as_ref()?.get(at)?.parse().ok();
    let id = user.parse().ok().or_else(|| number(2))?;
    // group(5): name, password, number, members.
    let mut lines = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let (group, groups) = match group {
        None => {
            let group = number(3).unwrap_or(0);
            let name = entry.as_ref().and_then(|entry| entry.first().copied());
            let member =
                |line: &Vec<&str>| line.get(3)?.split(',').any(|one| Some(one) == name).then_some(());
            let others =
                lines.filter(|line| member(line).is_some()).filter_map(|line| line.get(2)?.parse().ok());
            (group, std::iter::once(group).chain(others.filter(|other| *other != group)).collect())
        }
        Some(group) => {
            let known = || lines.find(|entry| entry.first() == Some(&group))?.get(2)?.parse().ok();
            let group = group.parse().ok().or_else(known)?;
            (group, vec![group])
        }
    };
    let home = entry.and_then(|entry| entry.get(5).map(|home| (*home).to_owned()));
    Some(User { id, group, groups, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001:Ann:/home/ann:/bin/bash\nbroken\n";
    const GROUPS: &str = "root:x:0:\nkvm:x:106:bob,ann\nsudo:x:27:ann\nown:x:1001:ann\nbad:x:no:ann\nshort\n";

    #[test]
    fn everybody_has_a_home() {
        let passwd =
            "root:x:0:0::/var/root:/bin/sh\nann:x:1000:1000::/home/ann:\nbare:x:7:7:::\nshort:x:8:8\n";
        for (text, passwd, home) in [
            ("root", passwd, "/var/root"),
            ("0", passwd, "/var/root"),
            ("ann:0", passwd, "/home/ann"),
            ("bare", passwd, "/"),
            ("short", passwd, "/"),
            ("4242", passwd, "/"),
            ("0", "", "/root"),
        ] {
            assert_eq!(find_in(text, passwd, "").unwrap().home(), home, "{text}");
        }
    }

    #[test]
    fn users_are_names_or_numbers() {
        for (text, id, group, home) in [
            ("ann", 1000, [1001, 106, 27].as_slice(), Some("/home/ann")),
            ("1000", 1000, &[1001, 106, 27], Some("/home/ann")),
            ("ann:kvm", 1000, &[106], Some("/home/ann")),
            ("ann:7", 1000, &[7], Some("/home/ann")),
            ("root", 0, &[0], Some("/root")),
            ("4242", 4242, &[0], None),
            ("4242:root", 4242, &[0], None),
        ] {
            let home = home.map(str::to_owned);
            let user = User { id, group: group[0], groups: group.to_vec(), home };
            assert_eq!(find_in(text, PASSWD, GROUPS), Some(user), "{text}");
        }
        for text in ["", "nobody", "ann:nogroup", ":kvm", "-1"] {
            assert_eq!(find_in(text, PASSWD, GROUPS), None, "{text}");
        }
        assert_eq!(find_in("0", "", "").unwrap().id, 0, "a RAM disk needs no list of users");
    }
}
