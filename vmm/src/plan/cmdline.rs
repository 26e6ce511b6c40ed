//! The kernel command line of a plan.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What every kernel is told unless `--cmdline-only` says otherwise: talk on the first serial port (there is no
/// other), reset through the keyboard controller (the shortest way to the machine), and reset at once after a panic.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 8250.nr_uarts=1 reboot=k panic=-1";
/// What follows it where there is no PCI bus: look for none.
pub const NO_PCI: &str = "pci=off";

/// The kernel command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cmdline {
    /// The default command line, then this.
    Extend(String),
    /// Exactly this.
    Only(String),
}

impl Default for Cmdline {
    fn default() -> Self {
        Cmdline::Extend(String::new())
    }
}

impl Cmdline {
    /// Adds `text` at its end.
    pub fn push(&mut self, text: &str) {
        let (Cmdline::Extend(old) | Cmdline::Only(old)) = self;
        if !old.is_empty() {
            old.push(' ');
        }
        old.push_str(text);
    }

    /// Adds `text` at its end, unless it is in there: a plan that was printed has it already.
    pub fn ensure(&mut self, text: &str) {
        let (Cmdline::Extend(old) | Cmdline::Only(old)) = self;
        if !format!(" {old} ").contains(&format!(" {text} ")) {
            self.push(text);
        }
    }

    /// The text for the kernel of a machine with a PCI bus, or without, whose console to be seen is `terminal`.
    pub fn text(&self, pci: bool, terminal: Option<&str>) -> String {
        match self {
            Cmdline::Extend(text) => {
                let more = terminal.map(|name| format!("console={name}"));
                let more = more.filter(|word| !DEFAULT_CMDLINE.contains(word.as_str())).unwrap_or_default();
                let words = [DEFAULT_CMDLINE, if pci { "" } else { NO_PCI }, &more, text];
                words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
            }
            Cmdline::Only(text) => text.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_added_once_where_once_is_enough() {
        let mut cmdline = Cmdline::default();
        for text in ["loglevel=5", "a=1 b", "loglevel=5", "level=5", "a=1 b"] {
            cmdline.ensure(text);
        }
        assert_eq!(cmdline, Cmdline::Extend("loglevel=5 a=1 b level=5".into()));
    }
}
