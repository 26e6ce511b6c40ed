//! `mayfly inspect`: what a kernel image is and what it lacks; or what a running VM is.

use std::path::{Path, PathBuf};

use base::{Fail, Result, Why};
use boot::inspect::{Report, State};
use boot::kernel::{Format, Kernel};
use clap::{Arg, ArgMatches, Command, ValueHint, value_parser};

use super::command::json_switch;
use super::{complain, say, vm};
use crate::outcome::{code, code_before_start};

/// Adds its flags.
pub fn flags(command: Command) -> Command {
    let kernel = Arg::new("kernel").required(true).value_name("KERNEL").value_hint(ValueHint::FilePath);
    command
        .arg(kernel.value_parser(value_parser!(PathBuf)).help(
            "Kernel: bzImage, ELF vmlinux, a kernel tree, a package, or a name of `mayfly kernel list`; or the name of a VM",
        ))
        .arg(json_switch("Print one JSON object"))
}

/// Carries out `mayfly inspect`; its exit code.
pub fn inspect(matches: &ArgMatches) -> u8 {
    let Some(path) = matches.get_one::<PathBuf>("kernel") else { return code::USAGE };
    let json = matches.get_flag("json");
    let text = match path.to_str().filter(|_| vm::is_meant(path)) {
        Some(name) => vm::inspect(name, json),
        None => text(path, json).map_err(|fail| unless_a_vm(path, fail)),
    };
    match text {
        Ok(text) => say(&text),
        Err(fail) => {
            complain(&fail);
            code_before_start(&fail)
        }
    }
}

/// A word that is no path may have been meant for a VM.
fn unless_a_vm(path: &Path, fail: Fail) -> Fail {
    if path.components().count() != 1 || path.exists() || fail.why != Why::Missing {
        return fail;
    }
    Fail::new(fail.why, fail.summary()).hint("check the name; no VM is called so either: mayfly ps -a")
}

fn text(path: &Path, json: bool) -> Result<String> {
    let report = boot::inspect::inspect(&Kernel::find(&super::kernel::resolve(path.to_owned())?)?)?;
    if !json {
        return Ok(render(&report));
    }
    let line = serde_json::to_string(&report)
        .map_err(|cause| Fail::new(Why::Host, "write the report down").because(cause))?;
    Ok(line + "\n")
}

/// The report for people: facts first, then what is missing, what is a module, what is built in.
fn render(report: &Report) -> String {
    let mut text = format!("{}\n", report.kernel);
    let mut fact = |name: &str, value: &str| text.push_str(&format!("  {name:<10}{value}\n"));
    fact("format", format(report).as_str());
    fact("version", report.version.as_deref().unwrap_or("it names none"));
    let entries = [(report.protocols.linux, "linux"), (report.protocols.pvh, "pvh")];
    let entries: Vec<_> = entries.into_iter().filter_map(|(there, name)| there.then_some(name)).collect();
    fact("entry", &entries.join(", "));
    fact(
        "config",
        report.config.as_deref().unwrap_or("none found, so nothing can be said about what it lacks"),
    );
    for state in [State::Missing, State::Module, State::Builtin] {
        for support in report.support.iter().filter(|support| support.state == state) {
            let note = support.note.unwrap_or("built in");
            text.push_str(&format!("  {:<27} {}; {note}\n", support.option, support.purpose));
        }
    }
    text
}

fn format(report: &Report) -> String {
    let name = match report.format {
        Format::Elf => "ELF vmlinux",
        Format::BzImage => "bzImage",
    };
    match (report.compression, report.unpacked_by_host) {
        (None, _) => name.to_owned(),
        (Some(packed), true) => format!("{name}, {} payload, unpacked by the host", packed.name()),
        (Some(packed), false) => format!("{name}, {} payload, left for the guest to unpack", packed.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boot::inspect::{Protocols, Support};

    #[test]
    fn what_a_kernel_lacks_comes_first() {
        let support =
            |option: &str, state, note| Support { option: option.to_owned(), state, purpose: "disks", note };
        let report = Report {
            kernel: "vmlinux".to_owned(),
            format: Format::Elf,
            version: None,
            compression: None,
            unpacked_by_host: false,
            protocols: Protocols { linux: true, pvh: true },
            config: Some("embedded".to_owned()),
            support: vec![
                support("CONFIG_A", State::Builtin, None),
                support("CONFIG_B", State::Missing, Some("not there")),
            ],
        };
        let text = render(&report);
        let lines: Vec<_> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "vmlinux",
                "format ELF vmlinux",
                "version it names none",
                "entry linux, pvh",
                "config embedded",
                "CONFIG_B disks; not there",
                "CONFIG_A disks; built in",
            ]
        );
    }
}
