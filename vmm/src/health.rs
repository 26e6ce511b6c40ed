//! The health of a guest's kernel, by what it says of itself: each kind of complaint is recognised by the words with which
//! Linux begins it.
//!
//! The agent passes on what the kernel says and leaves out what programs write into its log, so nothing that user space
//! prints is taken for a complaint.

mod words;

use agent::wire::Message;
use serde::Serialize;

use crate::quote;

/// Complaints that are kept; those beyond them are counted.
const KEPT: usize = 32;
/// Lines after the first complaint that are kept to be shown: its trace.
const EXCERPT: usize = 40;
/// Lines within which an oops goes on to say what it began to say: a handful is between its parts.
const ONE_OOPS: usize = 8;

/// A kind of complaint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An oops: a fault in the kernel's own code.
    Oops,
    /// `BUG:` and `BUG_ON`.
    Bug,
    /// `WARN_ON`.
    Warning,
    /// A memory error that KASAN, KFENCE or KMSAN found.
    MemoryError,
    /// Undefined behaviour (UBSAN).
    UndefinedBehaviour,
    /// A data race (KCSAN).
    DataRace,
    /// What lockdep or RCU's checks complain of.
    Locking,
    /// A stall of RCU.
    RcuStall,
    /// A task that waits for too long.
    HungTask,
    /// A processor that does nothing else any more.
    Lockup,
    /// A process killed for lack of memory.
    OutOfMemory,
    /// Memory that nobody refers to (kmemleak).
    Leak,
    /// The end.
    Panic,
}

impl Kind {
    /// Whether the kernel goes on with the count of its faults (`[#1]`): that is the same complaint.
    fn is_followed_by_an_oops(self) -> bool {
        matches!(self, Kind::Oops | Kind::Bug | Kind::MemoryError)
    }
}

/// A complaint of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its kind.
    pub kind: Kind,
    /// Its first line, printable.
    pub text: String,
    /// When, in milliseconds from the kernel's start.
    pub time_ms: u64,
}

impl Finding {
    /// When, in seconds, as kernels print it.
    pub fn seconds(&self) -> f64 {
        std::time::Duration::from_millis(self.time_ms).as_secs_f64()
    }
}

/// What is known of a kernel's health.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Health {
    /// The complaints, the first ones first.
    pub findings: Vec<Finding>,
    /// Those that are not among them.
    pub more: u64,
    /// Text in complaints that are expected.
    #[serde(skip)]
    allowed: Vec<String>,
    /// The first complaint and what followed.
    #[serde(skip)]
    excerpt: Vec<String>,
    /// The last complaint, while more of it may come: its kind, and for how many lines.
    #[serde(skip)]
    open: Option<(Kind, usize)>,
    /// What followed a line to cut at: the words of a warning, before where it was.
    #[serde(skip)]
    cut: Option<String>,
}

impl Health {
    /// Nothing is known yet; complaints with one of the texts `allowed` in them are none.
    pub fn new(allowed: Vec<String>) -> Health {
        Health { allowed, ..Health::default() }
    }

    /// Hears a line.
    pub fn hear(&mut self, message: &Message) {
        let text = quote::line(&message.text);
        if !self.excerpt.is_empty() && self.excerpt.len() < EXCERPT {
            self.excerpt.push(text.clone());
        }
        let before = self.cut.take();
        let Some(kind) = words::judge(&text) else {
            if text.starts_with(words::CUT) {
                self.cut = Some(String::new());
            } else if before.is_some_and(|words| words.is_empty()) {
                self.cut = Some(text.clone());
            }
            self.open = match self.open {
                Some((kind, left)) if left > 0 && !text.starts_with(words::END) => Some((kind, left - 1)),
                _ => None,
            };
            return;
        };
        let goes_on = self.open.is_some_and(|(open, _)| kind == Kind::Oops && open.is_followed_by_an_oops());
        self.open = Some((kind, ONE_OOPS));
        if goes_on {
            return;
        }
        let text = match before {
            Some(words) if !words.is_empty() => format!("{text} ({words})"),
            _ => text,
        };
        if self.allowed.iter().any(|allowed| text.contains(allowed.as_str())) {
            return;
        }
        if self.excerpt.is_empty() {
            self.excerpt.push(text.clone());
        }
        if self.findings.len() < KEPT {
            self.findings.push(Finding { kind, text, time_ms: message.time / 1000 });
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    /// Whether the kernel has complained of nothing.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty()
    }

    /// The first complaint, how many more there are, and what the kernel said next, each on a line of its own; for the end
    /// of a message.
    pub fn summary(&self) -> Option<String> {
        let first = self.findings.first()?;
        let others = u64::try_from(self.findings.len())
            .unwrap_or(u64::MAX)
            .saturating_sub(1)
            .saturating_add(self.more);
        let more = if others > 0 { format!(" (and {others} more)") } else { String::new() };
        let trace = quote::below(self.excerpt.get(1..).unwrap_or_default());
        Some(format!("{}{more}{trace}", first.text))
    }
}

#[cfg(test)]
mod tests;
