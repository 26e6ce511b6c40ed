//! What a guest can make a device log is rationed: such a line names the target that the log counts.

use syn::visit::{self, Visit};

use super::{Source, Violation, line};

/// Checks one Rust file that works for a guest.
pub fn check(source: &Source) -> Vec<Violation> {
    match source.parse() {
        Ok(tree) => {
            let mut visitor = Lines { source, found: Vec::new() };
            visitor.visit_file(&tree);
            visitor.found
        }
        Err(violation) => vec![violation],
    }
}

struct Lines<'a> {
    source: &'a Source,
    found: Vec<Violation>,
}

impl<'ast> Visit<'ast> for Lines<'_> {
    fn visit_macro(&mut self, invoked: &'ast syn::Macro) {
        let words: Vec<String> = invoked.path.segments.iter().map(|part| part.ident.to_string()).collect();
        let rationed = invoked.tokens.to_string().replace(' ', "").starts_with("target:\"guest\"");
        if words.first().is_some_and(|word| word == "log") && !rationed {
            let what = "log: a guest can cause this line: begin it with `target: \"guest\"`";
            self.found.push(self.source.violation(line(&invoked.path), what));
        }
        visit::visit_macro(self, invoked);
    }
}
