//! The command line: what was typed becomes a [`crate::plan::Plan`] or an answer.

mod bisect;
mod command;
mod container;
mod copy;
mod detach;
mod doctor;
mod exec;
mod guest;
mod image;
mod inspect;
mod kernel;
mod kernels;
mod lab;
mod legend;
mod matrix;
mod names;
mod papers;
mod relay;
mod result;
mod run;
mod vm;
mod vm_flags;

use std::ffi::OsString;

use base::sys::program;
use base::{Fail, Result};
use clap::ArgMatches;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::log;
use crate::machine::Scout;
use crate::outcome::code;

/// Carries out the command line of this process; its exit code.
pub fn main() -> u8 {
    crate::outcome::process_start();
    program::prepare();
    let words: Vec<OsString> = std::env::args_os().collect();
    // KVM takes a while to answer; the command line can be read meanwhile.
    let scout = words.get(1).filter(|word| *word == "run").map(|_| Scout::send());
    match command::for_words(&words).try_get_matches_from(&words) {
        Ok(matches) => carry_out(matches, scout),
        Err(error) => usage(&error, &words),
    }
}

fn carry_out(mut matches: ArgMatches, scout: Option<Result<Scout>>) -> u8 {
    log::start(log::level(matches.get_count("verbose"), matches.get_flag("quiet")));
    let Some((name, matches)) = matches.remove_subcommand() else { return code::USAGE };
    match name.as_str() {
        "run" => run::run(matches, scout.unwrap_or_else(Scout::send)),
        "image" => image::image(&matches),
        "inspect" => inspect::inspect(&matches),
        "doctor" => doctor::doctor(&matches),
        "kernel" => kernels::kernel(&matches),
        "lab" => lab::lab(&matches),
        "matrix" => matrix::matrix(&matches),
        "bisect" => bisect::bisect(&matches),
        "completions" => papers::completions(&matches),
        "man" => papers::man(&matches),
        "schema" => papers::schema(),
        "exec" => exec::exec(&matches),
        "cp" => copy::copy(&matches),
        relay::NAME => relay::relay(&matches),
        other => vm::carry_out(other, &matches),
    }
}

/// Tells the operator about a failure.
fn complain(fail: &Fail) {
    log::tell(&format!("error: {fail}"));
}

/// Prints what a command has to say on standard output. A reader that has gone away (`| head`) has had enough.
fn say(text: &str) -> u8 {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            complain(&Fail::new(base::Why::Host, "write to standard output").because(error));
            code::HOST
        }
        _ => code::DONE,
    }
}

/// The parser's complaints in the form of ours: one `error:` line, then hints.
fn usage(error: &clap::Error, words: &[OsString]) -> u8 {
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => say(&text),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            log::tell(text.trim_end());
            code::USAGE
        }
        _ => {
            log::tell(&reword(&text, names::typed(words), astray(error, words)));
            code::USAGE
        }
    }
}

/// What a bare word after `run` was meant for: the command, which docker takes so, or the kernel, if none is named.
fn astray(error: &clap::Error, words: &[OsString]) -> Option<String> {
    let named = words.iter().any(|word| word.as_encoded_bytes().starts_with(b"--kernel"));
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word))
            if error.kind() == ErrorKind::UnknownArgument
                && names::typed(words) == Some("run")
                && !word.starts_with('-') =>
        {
            let kernel =
                if named { String::new() } else { format!("a kernel is passed as --kernel {word}, ") };
            Some(format!("{kernel}a command after --: mayfly run -- {word}"))
        }
        _ => None,
    }
}

/// Keeps the message and the tips of a parser's text; its usage and its advice become one hint, the last.
fn reword(text: &str, command: Option<&str>, hint: Option<String>) -> String {
    let mut hints = hint.map_or_else(String::new, |hint| format!("\n  hint: {hint}"));
    let mut message = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.starts_with("Usage: ") {
            break;
        } else if let Some(tip) = line.strip_prefix("tip: ") {
            if tip.contains("as a value, use '-- ") {
                // What follows `--` is for the guest.
                continue;
            }
            hints += &format!("\n  hint: {tip}");
        } else if let Some(values) = line.strip_prefix("[possible values: ") {
            hints += &format!("\n  hint: it can be {}", values.trim_end_matches(']'));
        } else if !line.starts_with("For more information") {
            message.push(line);
        }
    }
    let command = command.map_or(String::new(), |command| format!(" {command}"));
    format!("{}{hints}\n  hint: see mayfly{command} --help", message.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parser_complains_like_everyone_else() {
        let text = |words: &[&str]| {
            let error = command::command(command::Detail::Names).try_get_matches_from(words).unwrap_err();
            let words: Vec<_> = words.iter().map(OsString::from).collect();
            reword(&error.render().to_string(), names::typed(&words), astray(&error, &words))
        };
        assert_eq!(
            text(&["mayfly", "run", "--memroy", "1G"]),
            "error: unexpected argument '--memroy' found\n  \
             hint: a similar argument exists: '--memory'\n  hint: see mayfly run --help"
        );
        assert_eq!(
            text(&["mayfly", "rum"]),
            "error: unrecognized subcommand 'rum'\n  \
             hint: a similar subcommand exists: 'run'\n  hint: see mayfly --help"
        );
        assert_eq!(
            text(&["mayfly", "-v", "run", "--accel", "xen"]),
            "error: invalid value 'xen' for '--accel <WHAT>'\n  \
             hint: it can be auto, kvm, emulated, unchecked\n  hint: see mayfly run --help"
        );
    }
}
