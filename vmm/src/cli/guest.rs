//! The flags of `mayfly run` that are about a command in the guest.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use base::{Doing, Fail, Result, Why};
use clap::{Arg, ArgAction, ArgMatches, Command as Clap, ValueHint, value_parser};

use crate::plan::{Cmdline, Command, Initrd, Plan, Root};

/// The environment of a command whose root is not this machine's.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const HOME: &str = "HOME=/root";

/// What a kernel prints on its console if nobody asked for more: warnings and worse. Each line costs a start some time.
const CALM: &str = "loglevel=5";

/// Adds the flags.
pub fn flags(run: Clap) -> Clap {
    run.next_help_heading("Command")
        .arg(
            Arg::new("root")
                .long("root")
                .value_name("IMAGE")
                .value_hint(ValueHint::AnyPath)
                .value_parser(value_parser!(PathBuf))
                .help("Root of the command: a disk image with a file system; writes are thrown away"),
        )
        .arg(
            Arg::new("env")
                .long("env")
                .short('e')
                .value_name("NAME[=VALUE]")
                .action(ArgAction::Append)
                .help("Set a variable for the command, or pass on the one that is set here"),
        )
        .arg(
            Arg::new("workdir")
                .long("workdir")
                .short('w')
                .value_name("DIR")
                .value_parser(value_parser!(PathBuf))
                .help("The directory in the guest that the command starts in [default: /]"),
        )
        .arg(
            Arg::new("user")
                .long("user")
                .short('u')
                .value_name("USER[:GROUP]")
                .help("Run the command as this user of the guest, by name or number [default: root]"),
        )
        .arg(
            Arg::new("tty")
                .long("tty")
                .short('t')
                .action(ArgAction::SetTrue)
                .help("Give the command a terminal"),
        )
        .arg(
            Arg::new("interactive")
                .long("interactive")
                .short('i')
                .action(ArgAction::SetTrue)
                .help("Pass standard input on, which is done anyway: -it is what other tools take"),
        )
        .arg(
            Arg::new("hostname")
                .long("hostname")
                .value_name("NAME")
                .help("What the guest is called [default: mayfly]"),
        )
        .arg(
            Arg::new("command")
                .value_name("COMMAND")
                .num_args(0..)
                .last(true)
                .value_parser(value_parser!(OsString))
                .help("Run this in the guest, with its own streams and exit code; the run ends with it"),
        )
}

/// Takes over what the flags say of a command.
///
/// # Errors
/// [`Why::Usage`]: they make no sense.
pub fn set(matches: &ArgMatches, plan: &mut Plan) -> Result<()> {
    let words = matches.get_many::<OsString>("command").into_iter().flatten();
    let argv = words.map(text).collect::<Result<Vec<_>>>()?;
    if plan.command.is_none() && argv.is_empty() {
        let idle = ["root", "env", "workdir", "user", "hostname"];
        let switches = ["tty", "interactive"];
        let given = |name: &&&str| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
        return match idle.iter().chain(&switches).find(given) {
            None => Ok(()),
            Some(flag) => Err(Fail::new(Why::Usage, format!("apply --{flag}"))
                .because("there is no command it could be for")
                .hint("say what to run in the guest: -- COMMAND ARGUMENT...")),
        };
    }
    let mut command = plan.command.take().unwrap_or_else(usual);
    if !argv.is_empty() {
        command.argv = argv;
    }
    for word in matches.get_many::<String>("env").into_iter().flatten() {
        command.env.extend(variable(word)?);
    }
    if let Some(root) = matches.get_one::<PathBuf>("root") {
        command.root = Root::Image(root.clone());
    }
    super::run::set(matches, "workdir", &mut command.workdir);
    super::run::set(matches, "user", &mut command.user);
    super::run::set(matches, "hostname", &mut command.hostname);
    command.terminal |= matches.get_flag("tty");
    if command.terminal
        && let Ok(term) = std::env::var("TERM")
    {
        command.env.insert(0, format!("TERM={term}"));
    }
    if command.root == Root::Initrd && plan.initrd.iter().all(|initrd| *initrd == Initrd::Builtin) {
        return Err(Fail::new(Why::Usage, "find the root of the command")
            .because("neither --root nor --initrd is given")
            .hint("pass --root IMAGE, or --initrd FILE with the command in it"));
    }
    plan.command = Some(command);
    if matches.get_count("verbose") == 0 && matches!(plan.cmdline, Cmdline::Extend(_)) {
        plan.cmdline.push(CALM);
    }
    Ok(())
}

/// A command before the flags.
fn usual() -> Command {
    Command {
        env: vec![PATH.to_owned(), HOME.to_owned()],
        workdir: Path::new("/").to_owned(),
        hostname: "mayfly".to_owned(),
        ..Command::default()
    }
}

/// What `-e` sets: as it stands, or as it is set here. What is not set here stays unset.
fn variable(word: &str) -> Result<Option<String>> {
    if word.contains('=') {
        return Ok(Some(word.to_owned()));
    }
    match std::env::var_os(word) {
        None => Ok(None),
        Some(value) => Ok(Some(format!("{word}={}", text(&value)?))),
    }
}

fn text(word: &OsString) -> Result<String> {
    let text = word.to_str().ok_or("it is not UTF-8");
    text.map(str::to_owned).doing(Why::Usage, || format!("pass {} to the guest", word.display()))
}
