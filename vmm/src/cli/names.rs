//! The names of the commands.

use std::ffi::OsString;

/// All commands, in the order of their help.
pub const COMMANDS: [&str; 20] = [
    "run",
    "matrix",
    "bisect",
    "ps",
    "exec",
    "logs",
    "cp",
    "set",
    "stop",
    "kill",
    "wait",
    "rm",
    "image",
    "inspect",
    "kernel",
    "doctor",
    "lab",
    "completions",
    "man",
    "schema",
];

/// The command that was typed, if it is one.
pub fn typed(words: &[OsString]) -> Option<&'static str> {
    let word = words.iter().skip(1).find(|word| !word.as_encoded_bytes().starts_with(b"-"))?;
    COMMANDS.into_iter().find(|command| word == command)
}
