//! `unsafe` lives in a few rooms only; every crate without a room forbids it.

use std::path::Path;

use proc_macro2::{TokenStream, TokenTree};

use super::{Source, Violation};

/// Where `unsafe` may stand: directories, and the file of the same name beside them.
pub const ROOMS: [&str; 4] =
    ["devices/base/src/sys", "vmm/src/hv/kvm", "vmm/src/sandbox/sys", "tests/guests"];

/// The door: it gives `main` its name, which the language counts as unsafe, and does nothing else.
const DOOR: &str = "vmm/src/main.rs";

/// Whether a file is in a room.
pub fn is_room(path: &Path) -> bool {
    ROOMS.iter().any(|room| path.starts_with(room) || path.with_extension("") == Path::new(room))
}

/// Checks one Rust file: no `unsafe` in any form, also inside macros, and no lifting of the ban, outside the rooms.
pub fn check(source: &Source) -> Vec<Violation> {
    if is_room(&source.path) {
        return Vec::new();
    }
    let Ok(tokens) = source.text.parse::<TokenStream>() else {
        return vec![source.violation(1, "read: these are no Rust tokens")];
    };
    let mut found = Vec::new();
    scan(source, tokens, "", &mut found);
    // The lifted ban, and the word in the attribute.
    if source.path == Path::new(DOOR) && found.len() == 2 && source.text.contains("#[unsafe(no_mangle)]") {
        found.clear();
    }
    found
}

/// Looks through `tokens`, which stand in the brackets that follow the word `before`.
fn scan(source: &Source, tokens: TokenStream, before: &str, found: &mut Vec<Violation>) {
    let mut last = String::new();
    for token in tokens {
        match token {
            TokenTree::Ident(word) => {
                let line = word.span().start().line;
                if word == "unsafe" {
                    found.push(
                        source.violation(line, format!("unsafe outside its rooms ({})", ROOMS.join(", "))),
                    );
                }
                if word == "unsafe_code" && !["forbid", "deny"].contains(&before) {
                    found.push(source.violation(line, "the ban on unsafe is lifted outside its rooms"));
                }
                last = word.to_string();
            }
            TokenTree::Group(group) => scan(source, group.stream(), &last, found),
            _ => {}
        }
    }
}

/// Checks the root of a crate: without a room below it, it says `#![forbid(unsafe_code)]`.
pub fn check_root(source: &Source) -> Vec<Violation> {
    if source.path == Path::new(DOOR) {
        return Vec::new();
    }
    let crate_dir = source.path.parent().unwrap_or(Path::new(""));
    let has_room = ROOMS.iter().any(|room| {
        Path::new(room).starts_with(crate_dir)
            || crate_dir.parent().is_some_and(|top| top == Path::new("tests") && room.starts_with("tests"))
    });
    if source.path.ends_with("main.rs") || !has_room {
        let said = source.parse().is_ok_and(|tree| {
            tree.attrs.iter().any(|attribute| {
                attribute.path().is_ident("forbid")
                    && attribute
                        .meta
                        .require_list()
                        .is_ok_and(|list| list.tokens.to_string().contains("unsafe_code"))
            })
        });
        if !said {
            return vec![
                source.violation(1, "the crate has no room for unsafe: say #![forbid(unsafe_code)]"),
            ];
        }
    }
    Vec::new()
}
