//! The rules of the house, read from the manifests and the sources themselves.
//!
//! Each rule is a function from text to violations, so that it can be shown to fail on a small offending piece as
//! well as be run over the whole tree.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

pub mod names;
pub mod panics;
pub mod rations;
pub mod rooms;
pub mod size;
pub mod walls;

/// One place that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// File, relative to the root of the tree.
    pub file: PathBuf,
    /// Line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// The rule and what breaks it.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.what)
    }
}

/// A text file of the tree.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its path, relative to the root of the tree.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
    /// Whether all of it is compiled for tests only.
    pub test: bool,
}

impl Source {
    /// A source that stands in no tree, to show a rule at work.
    pub fn new(path: &str, text: &str) -> Self {
        let path = PathBuf::from(path);
        // Anything below a crate's `tests` directory, and anything of the crate `tests`.
        let test = path.components().any(|part| part.as_os_str() == "tests");
        Source { path, text: text.to_owned(), test }
    }

    /// Whether it is Rust.
    pub fn is_rust(&self) -> bool {
        self.path.extension().is_some_and(|end| end == "rs")
    }

    /// A violation at `line` of this file.
    pub fn violation(&self, line: usize, what: impl Into<String>) -> Violation {
        Violation { file: self.path.clone(), line, what: what.into() }
    }

    /// Its syntax tree.
    ///
    /// # Errors
    /// It is not Rust: that too is a violation.
    pub fn parse(&self) -> Result<syn::File, Violation> {
        syn::parse_file(&self.text)
            .map_err(|cause| self.violation(cause.span().start().line, format!("parse: {cause}")))
    }
}

/// The root of the tree.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// All text files below `top`, without what is built or belongs to git.
pub fn sources(top: &Path) -> Vec<Source> {
    let mut found = Vec::new();
    let mut open = vec![top.to_owned()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() {
                if name != "target" && name != ".git" {
                    open.push(path);
                }
            } else if let (Ok(text), Ok(short)) = (fs::read_to_string(&path), path.strip_prefix(top)) {
                found.push(Source::new(&short.display().to_string(), &text));
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    let tests: Vec<PathBuf> = found.iter().filter(|source| source.is_rust()).flat_map(test_modules).collect();
    for source in &mut found {
        source.test |= tests
            .iter()
            .any(|module| source.path.starts_with(module) || source.path.with_extension("") == *module);
    }
    found
}

/// The modules that a file declares for tests only and keeps in files of their own, as paths without extension.
fn test_modules(source: &Source) -> Vec<PathBuf> {
    let Ok(tree) = source.parse() else { return Vec::new() };
    let here = source.path.parent().unwrap_or(Path::new(""));
    let name = source.path.file_stem().unwrap_or_default();
    let below = if ["lib", "main", "mod"].iter().any(|root| name == *root) {
        here.to_owned()
    } else {
        here.join(name)
    };
    let declared = tree.items.iter().filter_map(|item| match item {
        syn::Item::Mod(item) if item.content.is_none() && for_tests_only(&item.attrs) => Some(item),
        _ => None,
    });
    declared
        .map(|item| match item.attrs.iter().find_map(path_attribute) {
            Some(path) => here.join(path).with_extension(""),
            None => below.join(item.ident.to_string()),
        })
        .collect()
}

/// The value of `#[path = "..."]`.
fn path_attribute(attribute: &syn::Attribute) -> Option<String> {
    match &attribute.meta {
        syn::Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
            _ => None,
        },
        _ => None,
    }
}

/// Whether an item is compiled for tests only: `#[cfg(test)]`, `#[cfg(any(test, fuzzing))]`, `#[test]`.
pub fn for_tests_only(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || (attribute.path().is_ident("cfg")
                && attribute.meta.require_list().is_ok_and(|list| {
                    let words = list.tokens.to_string();
                    words.split(|c: char| !c.is_alphanumeric()).any(|word| word == "test")
                        && !words.contains("not")
                }))
    })
}

/// The line on which something begins.
pub fn line(of: &impl syn::spanned::Spanned) -> usize {
    of.span().start().line
}
