//! Many more files than places, whatever is done to their names.

use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use tempfile::TempDir;

use super::*;

const PLACES: usize = 16;

struct Tree {
    dir: TempDir,
    nodes: Nodes,
}

impl Tree {
    fn new() -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let root = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let nodes = Nodes::new(root, Limits { nodes: 200, places: PLACES }).unwrap();
        Tree { dir, nodes }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn find(&self, parent: u64, name: &str) -> Answer<u64> {
        let above = self.nodes.place(parent, false)?;
        let place = self.nodes.step(&above, Name::new(name.as_bytes())?, Reach::Any)?;
        let about = files::about(&place)?;
        self.nodes.found(parent, name.as_bytes(), place, &about)
    }

    fn size(&self, node: u64) -> Answer<u64> {
        Ok(files::about(self.nodes.place(node, false)?)?.stx_size)
    }

    /// Files of as many bytes as their number, and their nodes.
    fn files(&self, count: usize) -> Vec<u64> {
        let make = |n: usize| std::fs::write(self.path(&format!("f{n}")), vec![0; n]).unwrap();
        (0..count).map(|n| (make(n), self.find(ROOT, &format!("f{n}")).unwrap()).1).collect()
    }

    fn places(&self) -> usize {
        self.nodes.table().places
    }

    fn rename(&self, from: &str, to: &str) -> files::Result<()> {
        let root = self.nodes.place(ROOT, false).unwrap();
        let (old, new) = (Name::new(from.as_bytes()).unwrap(), Name::new(to.as_bytes()).unwrap());
        let names = [(&root, old), (&root, new)];
        self.nodes.change(&names, || files::rename(names[0], names[1], RenameFlags::empty()))
    }

    fn remove(&self, name: &str) {
        let root = self.nodes.place(ROOT, false).unwrap();
        let name = Name::new(name.as_bytes()).unwrap();
        self.nodes.change(&[(&root, name)], || files::remove(&root, name, false)).unwrap();
    }
}

#[test]
fn places_are_few_and_files_are_many() {
    let tree = Tree::new();
    let nodes = tree.files(150);
    assert!(tree.places() <= PLACES, "{} places", tree.places());
    for (size, node) in (0..).zip(&nodes) {
        assert_eq!(tree.size(*node), Ok(size), "a place is found again by its name");
    }
    assert_eq!(tree.find(ROOT, "f7"), Ok(nodes[7]), "and is the same node");
    let more = (150..).map(|n| {
        std::fs::write(tree.path(&format!("f{n}")), "").unwrap();
        tree.find(ROOT, &format!("f{n}"))
    });
    let last = more.take(100).find_map(Result::err);
    assert_eq!(last, Some(Stop::Refused(Errno::NFILE)), "there is an end to what a guest can know");
}

#[test]
fn a_guest_that_moves_and_removes_loses_nothing_it_knows() {
    let tree = Tree::new();
    let nodes = tree.files(100);
    for n in (0..100).step_by(2) {
        tree.rename(&format!("f{n}"), &format!("moved{n}")).unwrap();
    }
    for n in (1..50).step_by(2) {
        tree.remove(&format!("f{n}"));
    }
    for (size, node) in (0..).zip(&nodes) {
        assert_eq!(tree.size(*node), Ok(size), "file {size}");
    }
}

#[test]
fn what_the_host_swaps_is_not_taken_for_the_same() {
    let tree = Tree::new();
    let nodes = tree.files(100);
    let gone = nodes.iter().position(|id| tree.nodes.table().nodes[id].place.is_none()).unwrap();
    std::fs::write(tree.path("other"), "another file").unwrap();
    std::fs::rename(tree.path("other"), tree.path(&format!("f{gone}"))).unwrap();
    assert_eq!(tree.size(nodes[gone]), Err(STALE), "the guest's kernel looks it up again");
    let new = tree.find(ROOT, &format!("f{gone}")).unwrap();
    assert_ne!(new, nodes[gone]);
    assert_eq!(tree.size(new), Ok(12));
}

#[test]
fn directories_that_change_places_make_no_knot() {
    let tree = Tree::new();
    std::fs::create_dir_all(tree.path("a/b")).unwrap();
    let a = tree.find(ROOT, "a").unwrap();
    let b = tree.find(a, "b").unwrap();
    let swap = |from: &str, to: &str| {
        rustix::fs::renameat_with(CWD, tree.path(from), CWD, tree.path(to), RenameFlags::empty()).unwrap();
    };
    swap("a/b", "b");
    swap("a", "b/a");
    // Found in what it was above of, before that is found elsewhere.
    assert_eq!(tree.find(b, "a"), Ok(a));
    assert_eq!(tree.find(ROOT, "b"), Ok(b));
    assert_eq!(tree.find(b, "a"), Ok(a));
    let mut places = Vec::new();
    for (node, times) in [(a, 3), (b, 2)] {
        tree.nodes.forget(node, times, &mut places);
    }
    let table = tree.nodes.table();
    assert_eq!((table.nodes.len(), table.places), (1, 0), "nothing is left but the root");
    assert!(Path::new(&tree.path("b/a")).exists());
}

#[test]
fn a_directory_is_known_as_long_as_what_is_in_it() {
    let tree = Tree::new();
    std::fs::create_dir_all(tree.path("a/b")).unwrap();
    std::fs::write(tree.path("a/b/c"), "deep").unwrap();
    let a = tree.find(ROOT, "a").unwrap();
    let b = tree.find(a, "b").unwrap();
    let c = tree.find(b, "c").unwrap();
    let mut places = Vec::new();
    for node in [a, b] {
        tree.nodes.forget(node, 1, &mut places);
    }
    tree.files(100);
    assert_eq!(tree.size(c), Ok(4), "found again by names that the guest has forgotten");
    tree.nodes.forget(c, 1, &mut places);
    assert_eq!(tree.nodes.known(a).err(), Some(STALE), "then they go as well");
}
