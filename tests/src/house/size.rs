//! No file and no function grows so long that nobody reads it to the end.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::{Source, Violation};

/// Lines a source file stays below.
pub const FILE: usize = 500;
/// Lines a function stays below.
pub const FUNCTION: usize = 80;

/// Checks one Rust file.
pub fn check(source: &Source) -> Vec<Violation> {
    let mut found = Vec::new();
    let lines = source.text.lines().count();
    if lines >= FILE {
        found.push(
            source.violation(lines, format!("the file has {lines} lines, fewer than {FILE} are allowed")),
        );
    }
    match source.parse() {
        Ok(tree) => Functions { source, found: &mut found }.visit_file(&tree),
        Err(violation) => found.push(violation),
    }
    let in_src = source.path.components().any(|part| part.as_os_str() == "src");
    if in_src && !source.test && !source.text.starts_with("//!") {
        found.push(source.violation(1, "the module has no opening sentence: begin with a //! line"));
    }
    found
}

struct Functions<'a> {
    source: &'a Source,
    found: &'a mut Vec<Violation>,
}

impl Functions<'_> {
    fn measure(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let first = signature.span().start().line;
        let lines = body.span().end().line - first + 1;
        if lines >= FUNCTION {
            let what = format!("fn {} has {lines} lines, fewer than {FUNCTION} are allowed", signature.ident);
            self.found.push(self.source.violation(first, what));
        }
    }
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.measure(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }
    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.measure(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }
    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.measure(&item.sig, body);
        }
        visit::visit_trait_item_fn(self, item);
    }
}
