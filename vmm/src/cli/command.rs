//! The commands and their flags, as clap has them. Device flags are a reading of the catalogue.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command, ValueHint, value_parser};
use devices::catalog::{CATALOG, Entry, Presence};
use serde_json::Value;

use super::legend::{keys, settings, summary};
use super::names::COMMANDS;
use crate::plan::{
    Accel, CPUS_MAX, DEFAULT_CMDLINE, DEFAULT_MEMORY, GenerationId, Irqchip, KernelMemory, NO_PCI, OnReset,
    Period, Protocol, Size, Transport,
};

/// How much of the help is made. A run needs the names of flags only, and should not wait for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Flags and one line for each.
    Names,
    /// All keys of all devices too.
    Keys,
}

impl Detail {
    /// The detail that a command line asks for.
    pub fn for_words(words: &[OsString]) -> Detail {
        let asking = ["-h", "--help", "help", "man", "completions"];
        if words.iter().any(|word| asking.iter().any(|asks| word == asks)) {
            Detail::Keys
        } else {
            Detail::Names
        }
    }
}

const EXIT_CODES: &str = "\
Exit codes: 0 the guest powered off or reset, N it wrote N to a debug-exit port or its command ended with N (126 not \
executable, 127 not found, 128+N ended by signal N), 119 its command succeeded but tests failed, 120 its kernel panicked, 121 its command succeeded but its \
kernel did not stay healthy, 122 it crashed (triple fault), or ended before its command did, 123 the host failed during \
the run, 124 the time was up, 125 the machine could not be started, 2 the command line or plan makes no sense, 130 ended with Ctrl-a x, 128+N ended by signal N";

/// The flag with which one mayfly hands a plan to another.
pub const HANDED: &str = "handed-plan";

/// The heading over what is printed and how.
const OUTPUT: &str = "Output";

/// The whole command.
pub fn command(detail: Detail) -> Command {
    run_alone(detail)
        .subcommands(super::vm::commands())
        .subcommand(
            Command::new("matrix")
                .about("Run a command on several kernels, roots and settings, with one report")
                .defer(super::matrix::flags),
        )
        .subcommand(bisect(detail))
        .subcommand(
            Command::new("image")
                .about("List, load and remove container images of the cache")
                .defer(super::image::commands),
        )
        .subcommand(
            Command::new("inspect")
                .about("Say what a kernel image is and what it lacks, or what a running VM is")
                .defer(super::inspect::flags),
        )
        .subcommand(super::kernels::command())
        .subcommand(
            Command::new("doctor")
                .about("Check this host, with the command that mends each fault")
                .defer(|doctor| doctor.arg(json_switch("Print one JSON object"))),
        )
        .subcommand(Command::new("lab").about("Run a command on the emulated AMD-V host").defer(lab))
        .subcommand(Command::new("completions").about("Print the completion script of a shell").defer(
            |completions| {
                completions.arg(
                    Arg::new("shell")
                        .required(true)
                        .value_name("SHELL")
                        .value_parser(value_parser!(clap_complete::Shell))
                        .help("The shell"),
                )
            },
        ))
        .subcommand(Command::new("man").about("Print a manual page (roff)").defer(|man| {
            let command = Arg::new("command").value_name("COMMAND").value_parser(COMMANDS);
            man.arg(command.help("The page of this command instead of the main one"))
        }))
        .subcommand(Command::new("schema").about("Print the JSON schema of a plan, with all devices"))
}

/// The command line that reads these words: for a run, which is to start fast, without the other commands.
pub fn for_words(words: &[OsString]) -> Command {
    let detail = Detail::for_words(words);
    if words.get(1).is_some_and(|word| word == "run") { run_alone(detail) } else { command(detail) }
}

/// The command line as far as a run needs it.
fn run_alone(detail: Detail) -> Command {
    let run = Command::new("run").about("Boot a kernel and run the guest, or a command in it, to the end");
    Command::new("mayfly")
        .version(env!("CARGO_PKG_VERSION"))
        .about("A hypervisor for virtual machines that live for a test")
        .after_help("Start here: mayfly doctor, then mayfly run --kernel /boot/vmlinuz --initrd builtin")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .max_term_width(110)
        .arg(
            Arg::new("verbose")
                .short('v')
                .long("verbose")
                .help_heading(OUTPUT)
                .global(true)
                .action(ArgAction::Count)
                .help("Say more: -v what is done, -vv details, -vvv everything"),
        )
        .arg(
            Arg::new("quiet")
                .short('q')
                .long("quiet")
                .help_heading(OUTPUT)
                .global(true)
                .action(ArgAction::SetTrue)
                .help("Say nothing but errors"),
        )
        .subcommand(match detail {
            Detail::Names => run.defer(|run| run_flags(run, Detail::Names)),
            // At once: what all commands share then comes after it.
            Detail::Keys => run_flags(run, Detail::Keys),
        })
}

fn bisect(detail: Detail) -> Command {
    let bisect = Command::new("bisect")
        .about("Run a command on a kernel, with the exit codes that `git bisect run` wants");
    match detail {
        Detail::Names => bisect.defer(|bisect| super::bisect::flags(run_flags(bisect, Detail::Names))),
        Detail::Keys => super::bisect::flags(run_flags(bisect, Detail::Keys)),
    }
}

fn path(name: &'static str, value: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name(value)
        .value_hint(ValueHint::FilePath)
        .value_parser(value_parser!(PathBuf))
}

pub(super) fn json_switch(help: &'static str) -> Arg {
    Arg::new("json").long("json").action(ArgAction::SetTrue).help(help)
}

fn size(text: &str) -> Result<Size, String> {
    text.parse()
}

fn count(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "a number of CPUs is written as 1, 2 or 4".to_owned())
}

pub(super) fn period(text: &str) -> Result<Period, String> {
    text.parse()
}

fn run_flags(run: Command, detail: Detail) -> Command {
    let run = run
        // Given twice, the last one counts: scripts append to what they were given.
        .args_override_self(true)
        .disable_help_flag(true)
        .after_help(EXIT_CODES);
    let run = device_flags(machine_flags(super::guest::flags(boot_flags(run))), detail);
    output_flags(tuning_flags(super::detach::flags(end_flags(run))))
}

fn boot_flags(run: Command) -> Command {
    run.next_help_heading("Boot")
        .arg(path("kernel", "FILE").help(
            "Kernel: bzImage, ELF vmlinux, a kernel tree that holds one, a package (linux-image-*.deb), or a name of `mayfly kernel list`",
        ))
        .arg(
            path("initrd", "FILE")
                .action(ArgAction::Append)
                .help("Initial RAM file system; several are joined; `builtin` is mayfly's own"),
        )
        .arg(
            Arg::new("cmdline")
                .long("cmdline")
                .visible_alias("append")
                .value_name("TEXT")
                .allow_hyphen_values(true)
                .action(ArgAction::Append)
                .help(format!("Add to the kernel command line, which begins `{DEFAULT_CMDLINE} {NO_PCI}`")),
        )
        .arg(
            Arg::new("cmdline-only")
                .long("cmdline-only")
                .value_name("TEXT")
                .allow_hyphen_values(true)
                .help("Replace the kernel command line"),
        )
}

fn machine_flags(run: Command) -> Command {
    run.next_help_heading("Machine")
        .arg(
            Arg::new("cpus")
                .long("cpus")
                .short('c')
                .value_name("N")
                .allow_hyphen_values(true)
                .value_parser(count)
                .help(format!("Virtual CPUs, 1 to {CPUS_MAX} [default: 1]")),
        )
        .arg(
            Arg::new("memory")
                .long("memory")
                .visible_alias("mem")
                .short('m')
                .value_name("SIZE")
                .allow_hyphen_values(true)
                .value_parser(size)
                .help(format!("RAM: 512M, 2G, or a number of bytes [default: {DEFAULT_MEMORY}]")),
        )
        .arg(
            Arg::new("smbios")
                .long("smbios")
                .value_name("SPEC")
                .help("What /sys/class/dmi/id says: manufacturer, product, version, serial, uuid, family, oem (--smbios serial=42)"),
        )
        .arg(
            Arg::new("generation-id")
                .long("generation-id")
                .value_name("UUID")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("random")
                .value_parser(generation_id)
                .help("Give the guest a VM generation ID: this one, or a random one"),
        )
        .arg(
            Arg::new("accel")
                .long("accel")
                .value_name("WHAT")
                .value_parser(value_parser!(Accel))
                .help("What runs the virtual CPUs [default: auto]"),
        )
}

/// Devices that have to be asked for come first: they are what one looks for.
fn device_flags(run: Command, detail: Detail) -> Command {
    let on_request = |entry: &&dyn Entry| entry.presence() == Presence::OnRequest;
    let (first, rest): (Vec<&dyn Entry>, Vec<_>) = CATALOG.iter().copied().partition(on_request);
    first.into_iter().chain(rest).fold(run.next_help_heading("Devices"), |run, entry| {
        let flag = Arg::new(entry.name())
            .long(entry.flag())
            .value_name(value_name(entry, detail))
            .action(ArgAction::Append)
            .help(summary(entry));
        run.arg(if detail == Detail::Keys { flag.long_help(keys(entry)) } else { flag })
    })
}

/// What stands for the value of a device's flag. Only who asks for the keys waits for them to be looked up.
fn value_name(entry: &dyn Entry, detail: Detail) -> &'static str {
    if entry.presence() != Presence::Standard("on") {
        return "SPEC";
    }
    let more = detail == Detail::Keys && settings(&Value::from(entry.schema())).next().is_some();
    if more { "on|off|SPEC" } else { "on|off" }
}

fn end_flags(run: Command) -> Command {
    run.next_help_heading("Run")
        .arg(
            Arg::new("timeout")
                .long("timeout")
                .value_name("TIME")
                .allow_hyphen_values(true)
                .value_parser(period)
                .help("End the run after this time (30s, 2m, 500ms) with exit code 124"),
        )
        .arg(
            Arg::new("boot-timeout")
                .long("boot-timeout")
                .value_name("TIME")
                .allow_hyphen_values(true)
                .value_parser(period)
                .help(
                    "End the run if the guest is not in user space after this time, with exit code 124 too",
                ),
        )
        .arg(
            Arg::new("on-reset")
                .long("on-reset")
                .value_name("WHAT")
                .value_parser(value_parser!(OnReset))
                .help("What a reset by the guest does [default: exit]"),
        )
        .arg(path("plan", "FILE.json").help("Take a plan from a file; flags change and extend it"))
        .arg(
            Arg::new(HANDED)
                .long(HANDED)
                .hide(true)
                .value_name("JSON")
                .help("Take this plan, not that of a file"),
        )
        .arg(
            Arg::new("on-emulated-host")
                .long("on-emulated-host")
                .hide(true)
                .action(ArgAction::SetTrue)
                .help("This is the emulated host: use its KVM, and say so in the result"),
        )
}

fn generation_id(text: &str) -> Result<GenerationId, String> {
    text.parse()
}

fn tuning_flags(run: Command) -> Command {
    run.next_help_heading("Fine tuning")
        .arg(
            Arg::new("protocol")
                .long("protocol")
                .value_name("HOW")
                .value_parser(value_parser!(Protocol))
                .help("How the kernel is entered [default: auto]"),
        )
        .arg(
            Arg::new("kernel-memory")
                .long("kernel-memory")
                .value_name("HOW")
                .value_parser(value_parser!(KernelMemory))
                .help("How the code of an uncompressed kernel comes into memory [default: auto]"),
        )
        .arg(
            Arg::new("irqchip")
                .long("irqchip")
                .value_name("WHICH")
                .value_parser(value_parser!(Irqchip))
                .help("Who emulates the interrupt controllers [default: split]"),
        )
        .arg(
            Arg::new("transport")
                .long("transport")
                .value_name("WHICH")
                .value_parser(value_parser!(Transport))
                .help("How drivers reach virtio devices [default: auto]"),
        )
}

fn output_flags(run: Command) -> Command {
    run.next_help_heading(OUTPUT)
        .arg(
            Arg::new("json")
                .long("json")
                .value_name("FILE")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("-")
                .value_parser(value_parser!(PathBuf))
                .help("Write the result as one JSON line: to FILE, or as the last line of standard output"),
        )
        .arg(
            path("junit", "FILE")
                .help("Write the result, and the tests that the guest tells of, as JUnit has it: to FILE, or - for standard output"),
        )
        .arg(Arg::new("metrics").long("metrics").value_name("FILE[,every=TIME]").help(
            "Write the counters of the machine and its devices to FILE while it runs [default: every=1s]",
        ))
        .arg(
            Arg::new("dry-run")
                .long("dry-run")
                .action(ArgAction::SetTrue)
                .help("Print the plan (JSON) and run nothing"),
        )
        .arg(
            Arg::new("help")
                .long("help")
                .short('h')
                .action(ArgAction::Help)
                .help("Print help: the flags with -h, each key of each device too with --help"),
        )
}

fn lab(command: Command) -> Command {
    command
        .arg(
            Arg::new("cpus").long("cpus").value_name("N").allow_hyphen_values(true).value_parser(count).help(
                "CPUs of the emulated host; with several, QEMU before 8 hangs now and then [default: 1]",
            ),
        )
        .arg(
            Arg::new("memory")
                .long("memory")
                .short('m')
                .value_name("SIZE")
                .allow_hyphen_values(true)
                .value_parser(size)
                .help("RAM of the emulated host [default: 4G]"),
        )
        .arg(
            Arg::new("icount")
                .long("icount")
                .action(ArgAction::SetTrue)
                .help("Virtual time counts executed instructions, so that timings repeat (one CPU)"),
        )
        .arg(
            Arg::new("tick")
                .long("tick")
                .requires("icount")
                .action(ArgAction::SetTrue)
                .help("With --icount: timers come with a steady tick of 4 ms, as without --icount"),
        )
        .arg(
            Arg::new("timeout")
                .long("timeout")
                .value_name("TIME")
                .allow_hyphen_values(true)
                .value_parser(period)
                .help("End it after this time with exit code 124"),
        )
        .arg(
            Arg::new("command")
                .required(true)
                .value_name("COMMAND")
                .num_args(1..)
                .last(true)
                .value_parser(value_parser!(OsString))
                .help("The command: same files, directory, environment, streams and exit code"),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_well_formed_with_every_device_in_it() {
        for detail in [Detail::Names, Detail::Keys] {
            let mut command = command(detail);
            command.build();
            command.clone().debug_assert();
            let run = command.find_subcommand("run").unwrap();
            for entry in CATALOG {
                let flag = run.get_arguments().find(|arg| arg.get_long() == Some(entry.flag()));
                let help = flag.unwrap().get_long_help().map(|help| help.to_string());
                assert_eq!(help.is_some(), detail == Detail::Keys, "{}", entry.name());
            }
        }
    }

    #[test]
    fn help_begins_with_what_everybody_needs_and_says_nothing_twice() {
        let mut command = command(Detail::Keys);
        command.build();
        let help = command.find_subcommand_mut("run").unwrap().render_long_help().to_string();
        let at = |word: &str| help.find(word).unwrap_or_else(|| panic!("{word} is not in {help}"));
        let order = [
            "Boot:",
            "--kernel",
            "--initrd",
            "--cmdline",
            "Machine:",
            "--cpus",
            "--memory",
            "Devices:",
            "--disk",
            "--rng <on|off|SPEC>",
            "Run:",
            "--timeout",
            "Fine tuning:",
            "--irqchip",
            "Output:",
            "--verbose",
        ];
        assert!(order.map(at).is_sorted(), "{help}");
        assert!(at("--i8042 <on|off>") > at("rate: Bytes in a second"));
        assert!(at("pty: A new pseudo-terminal") > at("to: A place that is no file"));
        assert!(at("  path: The image file") < at("  readonly: on: the guest"), "as they are declared");
        assert!(at("  readonly: on: the guest") < at("  backing: on: open the"), "not by the alphabet");
        assert!(help.contains("`serial`"));
        assert!(!help.contains("enabled:"), "that a device is on or off needs no key");
    }

    #[test]
    fn only_those_who_ask_for_help_wait_for_it() {
        let detail =
            |words: &[&str]| Detail::for_words(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(detail(&["mayfly", "run", "--kernel", "k"]), Detail::Names);
        assert_eq!(detail(&["mayfly", "run", "--help"]), Detail::Keys);
        assert_eq!(detail(&["mayfly", "run", "-h"]), Detail::Keys);
    }
}
