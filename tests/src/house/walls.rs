//! The floors: no crate stands on one above it, and the modules of a crate are not knotted together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

use super::rooms::is_room;
use super::{Source, Violation, for_tests_only};

/// Every crate with those it may stand on. Each names only crates above it in this list, so there is no circle.
pub const FLOORS: [(&str, &[&str]); 7] = [
    ("agent", &[]),
    ("arch", &[]),
    ("base", &[]),
    ("boot", &["arch", "base"]),
    ("devices", &["base"]),
    ("vmm", &["agent", "arch", "base", "boot", "devices"]),
    ("tests", &["agent", "arch", "base", "boot", "devices", "vmm"]),
];

/// The crates that may know the hypervisor: its data, or its calls. The agent keeps a VM open on the emulated host.
const HYPERVISOR: [(&str, &[&str]); 2] =
    [("kvm-bindings", &["agent", "arch", "vmm"]), ("kvm-ioctls", &["agent", "vmm"])];

/// Checks what `cargo metadata --no-deps` says, with paths relative to `top`.
pub fn check(metadata: &serde_json::Value, top: &Path) -> Vec<Violation> {
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
        let file = manifest.strip_prefix(top).unwrap_or(&manifest).to_owned();
        let mut report = |what: String| found.push(Violation { file: file.clone(), line: 0, what });
        let Some((_, below)) = FLOORS.iter().find(|(known, _)| *known == name) else {
            report(format!("{name} has no floor: give it one in FLOORS"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            if dependency["path"].is_string() && !below.contains(&on) {
                report(format!("{name} must not stand on {on}: it may stand on {below:?}"));
            }
            let knows = HYPERVISOR.iter().find(|(hypervisor, _)| *hypervisor == on);
            if let Some((_, allowed)) = knows.filter(|(_, allowed)| !allowed.contains(&name)) {
                report(format!("{name} must not know {on}: only {allowed:?} may"));
            }
        }
    }
    found
}

/// Modules that may use each other in a circle: as many as can be one thing in several files.
pub const KNOT: usize = 4;

/// Which module uses which, and where it says so.
type Graph = BTreeMap<String, BTreeMap<String, (PathBuf, usize)>>;

/// Checks the sources of one crate, all below `src`: no more than [`KNOT`] of its top-level modules use each other in
/// a circle. A room for `unsafe` does not count: it is the lower part of whoever uses it.
pub fn check_modules(src: &Path, sources: &[Source]) -> Vec<Violation> {
    let mut uses = Graph::new();
    for source in sources.iter().filter(|source| source.path.starts_with(src) && !source.test) {
        let module = module_of(src, &source.path);
        let Ok(tree) = source.parse() else { continue };
        if module.is_empty() || is_room(&source.path) {
            continue;
        }
        let mut visitor = Uses::default();
        visitor.visit_file(&tree);
        for (target, line) in visitor.found.into_iter().filter(|(target, _)| *target != module) {
            uses.entry(module.clone()).or_default().entry(target).or_insert((source.path.clone(), line));
        }
    }
    let below: BTreeMap<&String, BTreeSet<&String>> =
        uses.keys().map(|from| (from, reach(&uses, from))).collect();
    let mut knots: BTreeSet<Vec<&str>> = BTreeSet::new();
    for (module, reached) in &below {
        let back = |other: &&String| below.get(*other).is_some_and(|reached| reached.contains(module));
        let knot: Vec<&str> = reached.iter().copied().filter(back).map(String::as_str).collect();
        if knot.len() > KNOT {
            knots.insert(knot);
        }
    }
    knots.iter().map(|knot| tell(&uses, knot)).collect()
}

fn tell(uses: &Graph, knot: &[&str]) -> Violation {
    let what = format!("{} modules use each other in a circle: {}", knot.len(), knot.join(", "));
    let inside =
        uses.iter().filter(|(module, _)| knot.contains(&module.as_str())).flat_map(|(_, targets)| targets);
    let place = inside
        .into_iter()
        .find(|(target, _)| knot.contains(&target.as_str()))
        .map(|(_, place)| place.clone());
    let (file, line) = place.unwrap_or_default();
    Violation { file, line, what }
}

/// Every module that `from` uses, itself or through others.
fn reach<'a>(uses: &'a Graph, from: &'a String) -> BTreeSet<&'a String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(module) = open.pop() {
        for next in uses.get(module).into_iter().flat_map(BTreeMap::keys) {
            if seen.insert(next) {
                open.push(next);
            }
        }
    }
    seen
}

/// The top-level module that a file belongs to; empty for the root of the crate.
fn module_of(src: &Path, path: &Path) -> String {
    let first = path.strip_prefix(src).ok().and_then(|rest| rest.iter().next());
    let name = first.and_then(|name| name.to_str()).unwrap_or_default().trim_end_matches(".rs");
    if ["lib", "main"].contains(&name) { String::new() } else { name.to_owned() }
}

/// The modules named after `crate::`, outside test code.
#[derive(Default)]
struct Uses {
    found: Vec<(String, usize)>,
}

impl Uses {
    fn note(&mut self, ident: &syn::Ident) {
        let name = ident.to_string();
        // Types re-exported at the root belong to no module.
        if name.starts_with(|c: char| c.is_lowercase()) {
            self.found.push((name, ident.span().start().line));
        }
    }
}

impl<'ast> Visit<'ast> for Uses {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !for_tests_only(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if let syn::UseTree::Path(path) = &item.tree
            && path.ident == "crate"
        {
            match &*path.tree {
                syn::UseTree::Path(next) => self.note(&next.ident),
                syn::UseTree::Group(group) => {
                    for tree in &group.items {
                        match tree {
                            syn::UseTree::Path(next) => self.note(&next.ident),
                            syn::UseTree::Name(name) => self.note(&name.ident),
                            _ => {}
                        }
                    }
                }
                syn::UseTree::Name(name) => self.note(&name.ident),
                _ => {}
            }
        }
    }
    fn visit_path(&mut self, path: &'ast syn::Path) {
        let mut parts = path.segments.iter();
        if parts.next().is_some_and(|first| first.ident == "crate")
            && let Some(next) = parts.next()
            && path.segments.len() > 2
        {
            self.note(&next.ident);
        }
        visit::visit_path(self, path);
    }
}
