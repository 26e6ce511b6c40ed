//! The flags of the commands for running VMs.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command, value_parser};
use rustix::process::Signal;

use super::command::{json_switch, period};

/// These commands, in the order of their help.
pub fn commands() -> [Command; 10] {
    [
        Command::new("ps")
            .visible_alias("ls")
            .about("List running VMs")
            .arg(switch("all", 'a', "Also those that have ended, and whose output is kept"))
            .arg(json_switch("Print one JSON array")),
        exec(),
        Command::new("logs")
            .about("Print what a VM in the background has said")
            .arg(switch("follow", 'f', "Go on until it ends"))
            .arg(vms()),
        copy(),
        set(),
        Command::new("stop")
            .about("End VMs in an orderly way: SIGTERM to their commands, and the end at once if that does not help")
            .arg(
                Arg::new("time")
                    .long("time")
                    .short('t')
                    .value_name("TIME")
                    .value_parser(period)
                    .help("How long a command may take to end [default: 10s]"),
            )
            .arg(vms()),
        Command::new("kill")
            .about("End VMs at once, or send their commands a signal")
            .arg(
                Arg::new("signal")
                    .long("signal")
                    .short('s')
                    .value_name("SIGNAL")
                    .value_parser(signal)
                    .help("A signal for the command: TERM, HUP, USR1, or a number [default: KILL, the VM's end]"),
            )
            .arg(vms()),
        Command::new("wait").about("Wait until VMs have ended, and print their exit codes").arg(vms()),
        Command::new("rm")
            .about("Remove what is left of VMs that have ended")
            .arg(switch("force", 'f', "End those that run"))
            .arg(vms()),
        super::relay::command(),
    ]
}

fn switch(name: &'static str, short: char, help: &'static str) -> Arg {
    Arg::new(name).long(name).short(short).action(ArgAction::SetTrue).help(help)
}

fn vm() -> Arg {
    Arg::new("vm").required(true).value_name("NAME").help("The VM, as `mayfly ps` calls it")
}

fn vms() -> Arg {
    vm().num_args(1..)
}

fn exec() -> Command {
    let text = |name: &'static str, short: char, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).short(short).value_name(value).help(help)
    };
    Command::new("exec")
        .about("Run a command in a running VM, with its own streams and exit code")
        .arg(switch("tty", 't', "Give the command a terminal"))
        .arg(switch("interactive", 'i', "Pass standard input on, which is done anyway"))
        .arg(
            text(
                "env",
                'e',
                "NAME[=VALUE]",
                "Set a variable for the command, or pass on the one that is set here",
            )
            .action(ArgAction::Append),
        )
        .arg(text(
            "workdir",
            'w',
            "DIR",
            "The directory that it starts in [default: that of the VM's command]",
        ))
        .arg(text(
            "user",
            'u',
            "USER[:GROUP]",
            "Run it as this user of the guest [default: as the VM's command]",
        ))
        .arg(vm())
        .arg(
            Arg::new("command")
                .required(true)
                .value_name("COMMAND")
                .num_args(1..)
                .trailing_var_arg(true)
                .allow_hyphen_values(true)
                .value_parser(value_parser!(OsString))
                .help("The command and its arguments"),
        )
}

fn copy() -> Command {
    let place = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .required(true)
            .value_name("[NAME:]PATH")
            .value_parser(value_parser!(OsString))
            .help(help)
    };
    Command::new("cp")
        .about("Copy a file or a directory into a running VM, or out of one")
        .arg(place("from", "What to copy"))
        .arg(place("to", "Where to: into this directory, or as this file"))
}

fn set() -> Command {
    Command::new("set")
        .about("Change settings of a device while its VM runs")
        .after_help(
            "A disk takes size=SIZE (the image grows) or size=auto (as long as the image is now), and iops, iops_burst, \
             bandwidth and bandwidth_burst, where off is no limit; a balloon takes size=SIZE. `mayfly inspect NAME` lists the \
             devices.",
        )
        .arg(vm())
        .arg(Arg::new("device").required(true).value_name("DEVICE").help("The device, such as disk0"))
        .arg(Arg::new("change").required(true).value_name("KEY=VALUE").num_args(1..).help("What is to change"))
}

/// Signals by their names.
const SIGNALS: [(&str, Signal); 17] = [
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("ABRT", Signal::ABORT),
    ("KILL", Signal::KILL),
    ("USR1", Signal::USR1),
    ("SEGV", Signal::SEGV),
    ("USR2", Signal::USR2),
    ("PIPE", Signal::PIPE),
    ("ALRM", Signal::ALARM),
    ("TERM", Signal::TERM),
    ("CHLD", Signal::CHILD),
    ("CONT", Signal::CONT),
    ("STOP", Signal::STOP),
    ("TSTP", Signal::TSTP),
    ("WINCH", Signal::WINCH),
    ("PWR", Signal::POWER),
];

fn signal(text: &str) -> Result<u8, String> {
    let upper = text.to_ascii_uppercase();
    let word = upper.strip_prefix("SIG").unwrap_or(&upper);
    let named = SIGNALS.iter().find(|(name, _)| *name == word).map(|(_, signal)| signal.as_raw());
    let number = named.or_else(|| word.parse().ok()).and_then(|number| u8::try_from(number).ok());
    number.filter(|number| (1..=64).contains(number)).ok_or_else(|| {
        let names: Vec<&str> = SIGNALS.iter().map(|(name, _)| *name).collect();
        format!("it is a number from 1 to 64, or one of {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_by_name_or_number() {
        for (text, number) in [("TERM", 15), ("sigterm", 15), ("15", 15), ("usr1", 10), ("64", 64)] {
            assert_eq!(signal(text), Ok(number));
        }
        for text in ["", "0", "65", "FOO", "-9"] {
            assert!(signal(text).unwrap_err().contains("one of HUP, INT"), "{text}");
        }
    }

    #[test]
    fn a_command_in_a_vm_keeps_its_own_flags() {
        for words in ["exec -it -e A=1 web ls -l -- x", "exec -it -e A=1 web -- ls -l -- x"] {
            let words = words.split(' ');
            let matches = exec().try_get_matches_from(words).unwrap();
            let command: Vec<_> = matches.get_many::<OsString>("command").unwrap().collect();
            assert_eq!(command, ["ls", "-l", "--", "x"]);
        }
    }
}
