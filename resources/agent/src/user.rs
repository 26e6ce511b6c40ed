//! Users by name: looked up in the guest's own files.

use std::fs;

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) id: u32,
    pub(crate) group: u32,
    /// The home directory, if the user is a known one.
    pub(crate) home: Option<String>,
}

impl User {
    /// The home directory; of one whom nobody knows, root's usual place, or the top.
    pub(crate) fn into_home(self) -> String {
        let usual = if self.id == 0 { "/root" } else { "/" };
        self.home.filter(|home| !home.is_empty()).unwrap_or_else(|| usual.to_owned())
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
    let group = match group {
        None => number(3).unwrap_or(0),
        Some(group) => group.parse().ok().or_else(|| {
            // group(5): name, password, number, members.
            let line = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
            line.into_iter().find(|entry| entry.first() == Some(&group))?.get(2)?.parse().ok()
        })?,
    };
    Some(User { id, group, home: entry.and_then(|entry| entry.get(5).map(|home| (*home).to_owned())) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001:Ann:/home/ann:/bin/bash\nbroken\n";
    const GROUPS: &str = "root:x:0:\nkvm:x:106:ann\n";

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
            assert_eq!(find_in(text, passwd, "").unwrap().into_home(), home, "{text}");
        }
    }

    #[test]
    fn users_are_names_or_numbers() {
        for (text, id, group, home) in [
            ("ann", 1000, 1001, Some("/home/ann")),
            ("1000", 1000, 1001, Some("/home/ann")),
            ("ann:kvm", 1000, 106, Some("/home/ann")),
            ("ann:7", 1000, 7, Some("/home/ann")),
            ("4242", 4242, 0, None),
            ("4242:root", 4242, 0, None),
        ] {
            let home = home.map(str::to_owned);
            assert_eq!(find_in(text, PASSWD, GROUPS), Some(User { id, group, home }), "{text}");
        }
        for text in ["", "nobody", "ann:nogroup", ":kvm", "-1"] {
            assert_eq!(find_in(text, PASSWD, GROUPS), None, "{text}");
        }
        assert_eq!(find_in("0", "", "").unwrap().id, 0, "a RAM disk needs no list of users");
    }
}
