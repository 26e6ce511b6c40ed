//! What of the host this process has open: what a guest could reach by a fault of ours.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

/// One thing that is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostObject {
    /// Its path; what has none is named as the kernel names it.
    pub path: String,
    /// `r`, `w`, `rw`, or `place`: a directory that a guest may see, with all that is below it.
    pub access: &'static str,
    /// How many descriptors lead there.
    pub descriptors: u32,
}

/// All that is open, by path.
pub fn list() -> Vec<HostObject> {
    let mut open = Vec::new();
    let descriptors = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    // All first: then the one that reads this directory has gone by the time it is looked at.
    let descriptors: Vec<_> = descriptors.map(|entry| entry.path()).collect();
    for path in descriptors {
        let (Ok(target), Ok(link)) = (fs::read_link(&path), fs::symlink_metadata(&path)) else { continue };
        // The rights of such a link are those of the descriptor (proc_pid_fd(5)); one of a place (`O_PATH`) has none.
        let access = match link.mode() & 0o600 {
            0o600 => "rw",
            0o400 => "r",
            0o200 => "w",
            _ => PLACE,
        };
        open.push((name(&target.to_string_lossy()), access));
    }
    gather(open)
}

const PLACE: &str = "place";

/// What the kernel calls something, without a number that says nothing.
fn name(target: &str) -> String {
    let kind = if target.starts_with('/') { target } else { target.split(":[").next().unwrap_or(target) };
    kind.to_owned()
}

/// Counts what is open twice. A place stands for those below it: a share holds one for each file that its guest knows.
fn gather(open: Vec<(String, &'static str)>) -> Vec<HostObject> {
    let mut counts: BTreeMap<(String, &'static str), u32> = BTreeMap::new();
    for found in open {
        let count = counts.entry(found).or_default();
        *count = count.saturating_add(1);
    }
    let mut list: Vec<HostObject> = Vec::new();
    let mut last: Option<usize> = None;
    let mut counts: Vec<_> = counts.into_iter().collect();
    // By the parts of their paths: then a directory comes right before what is below it.
    counts.sort_by(|((a, _), _), ((b, _), _)| Path::new(a).cmp(Path::new(b)));
    for ((path, access), descriptors) in counts {
        if access == PLACE {
            let above = last.and_then(|at| list.get_mut(at));
            if let Some(above) = above.filter(|above| Path::new(&path).starts_with(&above.path)) {
                above.descriptors = above.descriptors.saturating_add(descriptors);
                continue;
            }
            last = Some(list.len());
        }
        list.push(HostObject { path, access, descriptors });
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_stands_for_what_is_below_it() {
        let open = [
            ("/data", PLACE),
            ("/data/a", PLACE),
            ("/data/a", "rw"),
            ("/data-2/x", PLACE),
            ("/data/b/c", PLACE),
            ("/dev/kvm", "rw"),
            ("/dev/kvm", "rw"),
            ("socket:[1]", "rw"),
            ("socket:[2]", "rw"),
        ];
        let list = gather(open.map(|(path, access)| (name(path), access)).into());
        let found: Vec<_> = list.iter().map(|o| (o.path.as_str(), o.access, o.descriptors)).collect();
        assert_eq!(
            found,
            [
                ("/data", PLACE, 3),
                ("/data/a", "rw", 1),
                ("/data-2/x", PLACE, 1),
                ("/dev/kvm", "rw", 2),
                ("socket", "rw", 2),
            ]
        );
    }

    #[test]
    fn what_this_process_has_open_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let _file = fs::File::create(&path).unwrap();
        let name = path.to_str().unwrap();
        let list = list();
        let found = list.iter().find(|object| object.path == name);
        assert_eq!(found.map(|object| object.access), Some("w"));
        assert!(!list.iter().any(|object| object.path.starts_with("/proc/")), "{list:?}");
    }
}
