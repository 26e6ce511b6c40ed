//! Names: none that say nothing, no device by name above the devices, nothing of the place where it was built.

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::{Source, Violation, for_tests_only, line};

const EMPTY: [&str; 9] =
    ["manager", "managers", "helper", "helpers", "util", "utils", "common", "misc", "stuff"];

/// What an item begins with.
const ITEMS: [&str; 8] = ["fn", "mod", "struct", "enum", "trait", "type", "const", "static"];

/// Checks the name of a file and of the directories it stands in: each says what is in it.
pub fn check_path(source: &Source) -> Vec<Violation> {
    let parts = source.path.iter().filter_map(|part| part.to_str());
    let words = parts.flat_map(|part| part.split(['_', '-', '.']));
    words.filter(|word| EMPTY.contains(word)).map(|word| source.violation(0, empty(word))).collect()
}

fn empty(word: &str) -> String {
    format!("the name {word} says nothing: name what it is")
}

/// Checks the modules written inside a Rust file.
pub fn check_modules(source: &Source) -> Vec<Violation> {
    struct Modules<'a>(&'a Source, Vec<Violation>);
    impl<'ast> Visit<'ast> for Modules<'_> {
        fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
            let name = item.ident.to_string();
            if let Some(word) = name.split('_').find(|word| EMPTY.contains(word)) {
                self.1.push(self.0.violation(line(item), empty(word)));
            }
            visit::visit_item_mod(self, item);
        }
    }
    let Ok(tree) = source.parse() else { return Vec::new() };
    let mut modules = Modules(source, Vec::new());
    modules.visit_file(&tree);
    modules.1
}

/// The names in the catalogue of devices, read from its source.
pub fn catalogue(source: &Source) -> Vec<String> {
    let Ok(tree) = source.parse() else { return Vec::new() };
    let lists = tree.items.iter().filter_map(|item| match item {
        syn::Item::Macro(item) if item.mac.path.is_ident("catalog") => Some(item.mac.tokens.clone()),
        _ => None,
    });
    lists
        .flatten()
        .filter_map(|token| matches!(token, TokenTree::Ident(_)).then(|| token.to_string()))
        .collect()
}

/// Checks a Rust file above the devices: it names no device, neither in a path nor in the name of an item nor as a
/// whole string. It reads the list.
pub fn check_devices(source: &Source, catalogue: &[String]) -> Vec<Violation> {
    struct Items(Vec<proc_macro2::TokenStream>);
    impl Items {
        fn take(&mut self, item: &syn::Item) {
            use quote::ToTokens;
            match item {
                syn::Item::Mod(item) if for_tests_only(&item.attrs) => {}
                syn::Item::Fn(item) if for_tests_only(&item.attrs) => {}
                syn::Item::Mod(syn::ItemMod { content: Some((_, items)), .. }) => {
                    items.iter().for_each(|item| self.take(item));
                }
                other => self.0.push(other.to_token_stream()),
            }
        }
    }
    let Ok(tree) = source.parse() else { return Vec::new() };
    let mut items = Items(Vec::new());
    tree.items.iter().for_each(|item| items.take(item));
    let mut found = Vec::new();
    for tokens in items.0 {
        scan(source, tokens, catalogue, &mut found);
    }
    found
}

fn scan(source: &Source, tokens: TokenStream, catalogue: &[String], found: &mut Vec<Violation>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let text =
        |at: Option<usize>| at.and_then(|at| tokens.get(at)).map(ToString::to_string).unwrap_or_default();
    for (at, token) in tokens.iter().enumerate() {
        let before = text(at.checked_sub(1));
        let named = match token {
            TokenTree::Group(group) => {
                scan(source, group.stream(), catalogue, found);
                None
            }
            // Doc comments are `doc = "..."` here.
            TokenTree::Literal(_) if before == "=" && text(at.checked_sub(2)) == "doc" => None,
            TokenTree::Literal(literal) => {
                let literal = literal.to_string();
                let literal = literal.trim_matches('"').trim_start_matches("--");
                catalogue.iter().find(|name| *name == literal).cloned()
            }
            TokenTree::Ident(word) => {
                let word = word.to_string();
                let in_path = before == ":" && text(at.checked_sub(2)) == ":"
                    || text(Some(at + 1)) == ":" && text(Some(at + 2)) == ":";
                // `std::net` is no card of ours.
                let colon = |at: usize, back: usize| text(at.checked_sub(back)) == ":";
                let mut first = at;
                while colon(first, 1) && colon(first, 2) && first > 2 {
                    first -= 3;
                }
                let foreign = ["std", "core", "rustix"].contains(&text(Some(first)).as_str());
                let whole = in_path && !foreign && (catalogue.contains(&word) || word == "kinds");
                let part = ITEMS.contains(&before.as_str())
                    && words(&word).iter().any(|part| catalogue.contains(part));
                (whole || part).then_some(word)
            }
            TokenTree::Punct(_) => None,
        };
        if let Some(word) = named {
            let what = format!("{word} names a device above the devices: read devices::catalog::CATALOG");
            found.push(source.violation(token.span().start().line, what));
        }
    }
}

/// The words of a name, in small letters: `make_blk` and `BlkSpec` both hold `blk`.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in name.chars() {
        if c == '_' || c.is_uppercase() {
            words.push(String::new());
        }
        if let (Some(last), true) = (words.last_mut(), c != '_') {
            last.extend(c.to_lowercase());
        }
    }
    words
}

/// Checks any text: it names no path of the place where it was written.
pub fn check_place(source: &Source) -> Vec<Violation> {
    // Put together here, so that this file does not name them either.
    let places = [
        concat!("/wo", "rk/"),
        concat!("../sha", "red"),
        concat!("sha", "red/facts"),
        concat!(".lib", "rary"),
    ];
    let mut found = Vec::new();
    for (number, text) in source.text.lines().enumerate() {
        for place in places {
            let before = text.find(place).map(|at| text[..at].chars().next_back());
            // `src/work/` is somebody's directory; ` /work/` is ours.
            if before.is_some_and(|before| before.is_none_or(|c| !c.is_alphanumeric())) {
                found.push(source.violation(number + 1, format!("{place} is a path of one machine")));
            }
        }
    }
    found
}
