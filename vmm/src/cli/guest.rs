//! The flags of `mayfly run` that are about a command in the guest.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use base::{Doing, Fail, Result, Why};
use clap::{Arg, ArgAction, ArgMatches, Command as Clap, ValueHint, value_parser};

use crate::plan::{Access, Cmdline, Command, Container, Initrd, Ktap, Plan, Root, Volume};

/// What a kernel prints on its console if nobody asked for more: warnings and worse. Each line costs a start some time.
const CALM: &str = "loglevel=5";

/// What systemd is told: the root and what is in it are mounted, whatever the table of another machine says, and nobody sits at
/// the console to answer questions.
const SYSTEM: &str = "fstab=no systemd.gpt_auto=no systemd.firstboot=off";

/// What guests on an emulated host warn of: QEMU tells nested guests of an XSAVE area that does not add up. A guest of
/// QEMU's own on the emulated host does so as well.
const NESTED: &str = "arch/x86/kernel/fpu/xstate.c";

/// Adds the flags.
pub fn flags(run: Clap) -> Clap {
    surroundings(roots(run.next_help_heading("Command")))
        .arg(Arg::new("allow").long("allow").value_name("TEXT").action(ArgAction::Append).help(
            "Expect complaints of the guest's kernel with this in them, such as the name of a function",
        ))
        .arg(Arg::new("ktap").long("ktap").value_name("HOW").value_parser(value_parser!(Ktap)).help(
            "What becomes of tests that the command, or the kernel, tells of in KTAP or TAP [default: strict]",
        ))
        .arg(
            Arg::new("systemd")
                .long("systemd")
                .action(ArgAction::SetTrue)
                .help("Start the root's own systemd, and the command when the system is up"),
        )
        .arg(
            Arg::new("export-changes")
                .long("export-changes")
                .value_name("FILE.tar")
                .value_hint(ValueHint::FilePath)
                .value_parser(value_parser!(PathBuf))
                .help("Keep what was written to the root: a tar archive, which is a layer of an image"),
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

fn roots(run: Clap) -> Clap {
    run.arg(
        Arg::new("root")
            .long("root")
            .value_name("DIR|IMAGE")
            .value_hint(ValueHint::AnyPath)
            .value_parser(value_parser!(PathBuf))
            .help("Root of the command: a directory, or a disk image; writes are thrown away [default: /]"),
    )
    .args(super::container::flags())
    .arg(
        Arg::new("rw")
            .long("rw")
            .value_name("DIR")
            .action(ArgAction::Append)
            .value_hint(ValueHint::DirPath)
            .help("A directory that the command may write to, in the same place in the guest"),
    )
    .arg(
        Arg::new("volume")
            .long("volume")
            .value_name("HOST:GUEST[:ro|rw|cow]")
            .action(ArgAction::Append)
            .help(
                "A directory of the host in the guest: read-only, for writing (default), or copied on write",
            ),
    )
}

fn surroundings(run: Clap) -> Clap {
    run
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
                .help("The directory in the guest that the command starts in [default: this one, or / in another root]"),
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
}

/// Takes over what the flags say of a command.
///
/// # Errors
/// [`Why::Usage`]: they make no sense.
pub fn set(matches: &ArgMatches, plan: &mut Plan) -> Result<()> {
    let words = matches.get_many::<OsString>("command").into_iter().flatten();
    let argv = words.map(text).collect::<Result<Vec<_>>>()?;
    if plan.command.is_none() && argv.is_empty() && !matches.contains_id("image") {
        let idle = [
            "root",
            "entrypoint",
            "rw",
            "volume",
            "env",
            "workdir",
            "user",
            "hostname",
            "ktap",
            "export-changes",
        ];
        let switches = ["tty", "interactive", "systemd"];
        let given = |name: &&&str| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
        return match idle.iter().chain(&switches).find(given) {
            None => Ok(()),
            Some(_) if matches.get_flag("detach") => command_line(matches, plan, argv),
            Some(flag) => Err(Fail::new(Why::Usage, format!("apply --{flag}"))
                .because("there is no command it could be for")
                .hint("say what to run in the guest: -- COMMAND ARGUMENT...; or pass -d, and run it later: mayfly exec")),
        };
    }
    command_line(matches, plan, argv)
}

/// Takes over a command; one without words only waits.
fn command_line(matches: &ArgMatches, plan: &mut Plan, argv: Vec<String>) -> Result<()> {
    let other_root = ["root", "image"].iter().any(|flag| matches.contains_id(flag));
    let mut command = match plan.command.take() {
        Some(command) if other_root => Command { root: root(matches, plan)?, ..command },
        Some(command) => command,
        None => usual(root(matches, plan)?, matches.contains_id("user"))?,
    };
    super::container::settle(matches, &mut command, argv)?;
    for word in matches.get_many::<String>("env").into_iter().flatten() {
        command.env.extend(variable(word)?);
    }
    for place in matches.get_many::<String>("rw").into_iter().flatten() {
        let host = std::path::absolute(place).doing(Why::Usage, || format!("use --rw {place}"))?;
        command.volumes.push(Volume { guest: host.clone(), host, access: Access::Rw });
    }
    for text in matches.get_many::<String>("volume").into_iter().flatten() {
        command.volumes.push(Volume::parse(text)?);
    }
    super::run::set(matches, "workdir", &mut command.workdir);
    super::run::set(matches, "user", &mut command.user);
    super::run::set(matches, "hostname", &mut command.hostname);
    super::run::set(matches, "ktap", &mut command.ktap);
    if let Some(path) = matches.get_one::<PathBuf>("export-changes") {
        command.export_changes = Some(export(path)?);
    }
    command.allow.extend(matches.get_many::<String>("allow").into_iter().flatten().cloned());
    if crate::lab::is_here() {
        command.allow.push(NESTED.to_owned());
    }
    command.systemd |= matches.get_flag("systemd");
    command.terminal |= matches.get_flag("tty");
    if command.terminal
        && let Ok(term) = std::env::var("TERM")
    {
        command.env.insert(0, format!("TERM={term}"));
    }
    if plan.kernel.as_os_str().is_empty() {
        plan.kernel = super::kernel::find()?;
    }
    if command.systemd && matches!(plan.cmdline, Cmdline::Extend(_)) {
        plan.cmdline.ensure(SYSTEM);
    }
    plan.command = Some(command);
    if matches.get_count("verbose") == 0 && matches!(plan.cmdline, Cmdline::Extend(_)) {
        plan.cmdline.ensure(CALM);
    }
    Ok(())
}

/// The root that the flags ask for: without any, initial RAM disks if there are some, and else this machine's own.
fn root(matches: &ArgMatches, plan: &Plan) -> Result<Root> {
    if let Some(image) = matches.get_one::<String>("image") {
        return Ok(Root::Container(Container { image: image.clone(), digest: String::new() }));
    }
    let Some(path) = matches.get_one::<PathBuf>("root") else {
        let own = plan.initrd.iter().all(|initrd| *initrd == Initrd::Builtin);
        return Ok(if own { Root::Directory("/".into()) } else { Root::Initrd });
    };
    let path = std::path::absolute(path).doing(Why::Usage, || format!("use --root {}", path.display()))?;
    Ok(if path.is_dir() { Root::Directory(path) } else { Root::Image(path) })
}

/// The file that changes go to.
fn export(path: &Path) -> Result<PathBuf> {
    let doing = || format!("use --export-changes {}", path.display());
    if path == "-" {
        let fail = Fail::new(Why::Usage, doing()).because("standard output is the command's");
        return Err(fail.hint("name a file"));
    }
    std::path::absolute(path).doing(Why::Usage, doing)
}

/// A command before the flags. Over this machine's own root it finds what it would find here: environment and directory; but
/// who runs as an `other` user has a home of their own, which the guest knows.
fn usual(root: Root, other: bool) -> Result<Command> {
    let here = root == Root::Directory("/".into());
    let command = Command { root, ..Command::default() };
    if !here {
        return Ok(command);
    }
    // What is no text stays here.
    let vars = std::env::vars_os()
        .filter(|(name, _)| !other || name != "HOME")
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let env = vars.map(|(name, value)| format!("{name}={value}")).collect();
    let workdir = std::env::current_dir().doing(Why::Host, || "find the current directory")?;
    Ok(Command { env, workdir, ..command })
}

/// What `-e` sets: as it stands, or as it is set here. What is not set here stays unset.
pub fn variable(word: &str) -> Result<Option<String>> {
    if word.contains('=') {
        return Ok(Some(word.to_owned()));
    }
    match std::env::var_os(word) {
        None => Ok(None),
        Some(value) => Ok(Some(format!("{word}={}", text(&value)?))),
    }
}

pub fn text(word: &OsString) -> Result<String> {
    let text = word.to_str().ok_or("it is not UTF-8");
    text.map(str::to_owned).doing(Why::Usage, || format!("pass {} to the guest", word.display()))
}
