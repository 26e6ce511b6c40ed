//! Nothing a guest can reach panics: no unwrap, no expect, no panicking macro, no index.

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::{Source, Violation, for_tests_only, line};

const METHODS: [&str; 4] = ["unwrap", "expect", "unwrap_err", "expect_err"];
const MACROS: [&str; 7] =
    ["panic", "todo", "unimplemented", "unreachable", "assert", "assert_eq", "assert_ne"];

/// Checks one Rust file, leaving out what is compiled for tests only.
pub fn check(source: &Source) -> Vec<Violation> {
    match source.parse() {
        Ok(tree) => {
            let mut visitor = Panics { source, found: Vec::new() };
            visitor.visit_file(&tree);
            visitor.found
        }
        Err(violation) => vec![violation],
    }
}

struct Panics<'a> {
    source: &'a Source,
    found: Vec<Violation>,
}

impl Panics<'_> {
    fn report(&mut self, line: usize, what: &str) {
        self.found
            .push(self.source.violation(line, format!("{what}: a guest must not be able to panic a device")));
    }

    /// The inside of a macro is not parsed: its words tell.
    fn scan(&mut self, tokens: TokenStream) {
        let mut last: Option<TokenTree> = None;
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            let after_dot = matches!(&last, Some(TokenTree::Punct(dot)) if dot.as_char() == '.');
            let after_value = match &last {
                Some(TokenTree::Ident(word)) => {
                    !["in", "return", "mut", "ref", "else", "let"].contains(&word.to_string().as_str())
                }
                Some(TokenTree::Group(group)) => group.delimiter() != Delimiter::Brace,
                _ => false,
            };
            match &token {
                TokenTree::Ident(word) => {
                    let name = word.to_string();
                    let at = word.span().start().line;
                    let bang = matches!(tokens.peek(), Some(TokenTree::Punct(mark)) if mark.as_char() == '!');
                    if (after_dot && METHODS.contains(&name.as_str()))
                        || (bang && MACROS.contains(&name.as_str()))
                    {
                        self.report(at, &name);
                    }
                }
                TokenTree::Group(group) => {
                    if group.delimiter() == Delimiter::Bracket && after_value {
                        self.report(group.span_open().start().line, "index");
                    }
                    self.scan(group.stream());
                }
                _ => {}
            }
            last = Some(token);
        }
    }
}

impl<'ast> Visit<'ast> for Panics<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = match item {
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            syn::Item::Struct(item) => &item.attrs,
            // Evaluated by the compiler: a panic there is an error of the build.
            syn::Item::Const(_) => return,
            _ => return visit::visit_item(self, item),
        };
        if !for_tests_only(attributes) {
            visit::visit_item(self, item);
        }
    }
    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !for_tests_only(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }
    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}
    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        if METHODS.iter().any(|name| call.method == name) {
            self.report(line(&call.method), &call.method.to_string());
        }
        visit::visit_expr_method_call(self, call);
    }
    fn visit_expr_index(&mut self, index: &'ast syn::ExprIndex) {
        self.report(line(index), "index");
        visit::visit_expr_index(self, index);
    }
    fn visit_macro(&mut self, invoked: &'ast syn::Macro) {
        if let Some(name) = MACROS.iter().find(|name| invoked.path.is_ident(name)) {
            self.report(line(&invoked.path), name);
        }
        self.scan(invoked.tokens.clone());
    }
}
