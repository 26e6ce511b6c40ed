//! `mayfly run`: the flags become a plan, the plan a machine, its report an exit code.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use base::sys::signals;
use base::{Fail, Result, Why};
use clap::ArgMatches;
use devices::catalog::CATALOG;

use super::command::HANDED;
use super::detach::{self, Detached};
use super::lab::{Taken, take_over};
use super::result::Papers;
use super::{complain, say};
use crate::control::presence::Presence;
use crate::hang::Hang;
use crate::log;
use crate::machine::{self, Scout};
use crate::outcome::{self, End, Report};
use crate::plan::{Accel, Cmdline, Initrd, Metrics, Plan, Smbios};

/// Carries out `mayfly run`; its exit code.
pub fn run(matches: ArgMatches, scout: Result<Scout>) -> u8 {
    // Before all else: a result that cannot be written should not cost a run.
    let papers = match Papers::open(&matches) {
        Ok(papers) => papers,
        Err(fail) => {
            complain(&fail);
            return outcome::code_before_start(&fail);
        }
    };
    signals::prefer_errors();
    let mut detached = match detach::leave(&matches) {
        Ok(detached) => detached,
        Err(fail) => {
            complain(&fail);
            return outcome::code_before_start(&fail);
        }
    };
    let mut presence = None;
    let code = match attempt(matches, scout, detached.as_mut(), &mut presence) {
        Ok(Attempt::Ran(report)) => {
            detached.iter().for_each(Detached::recall);
            let told = presence.as_ref().map(|_| report.json());
            let code = conclude(*report, papers);
            told.iter().zip(&presence).for_each(|(line, presence)| presence.conclude(line));
            code
        }
        Ok(Attempt::Answered(code)) => code,
        Err(fail) => {
            detach::complain_to(detached.as_ref(), &fail);
            papers.tell_failure(&fail)
        }
    };
    presence.iter().for_each(Presence::leave);
    code
}

/// What came of the flags.
enum Attempt {
    /// A run, here.
    Ran(Box<Report>),
    /// Something else, or a run that has told its result elsewhere; the exit code.
    Answered(u8),
}

fn attempt(
    matches: ArgMatches,
    scout: Result<Scout>,
    detached: Option<&mut Detached>,
    presence: &mut Option<Presence>,
) -> Result<Attempt> {
    let begun = beginning(&matches)?;
    let plan = plan(&matches, begun.clone())?.complete()?;
    if matches.get_flag("dry-run") {
        return print(&plan).map(Attempt::Answered);
    }
    if detach::is_asked(&matches) {
        return detach::send(handed(&matches, &begun)?).map(Attempt::Answered);
    }
    *presence = detach::presence(&matches, &plan, detached)?;
    let scout = scout?;
    let emulated = matches.get_flag("on-emulated-host");
    let mut there = handed(&matches, &begun)?;
    // Found here: the host there is another one, with a kernel of its own.
    there.extend(["--kernel".into(), plan.kernel.clone().into()]);
    match take_over(&plan, &scout, there, presence.as_ref())? {
        Some(Taken::Ended(code)) => return Ok(Attempt::Answered(code)),
        Some(Taken::Unborn(signal)) => {
            let report = Report::unborn(&plan, End::Signalled(signal), outcome::process_start());
            return Ok(Attempt::Ran(Box::new(Report { accel: Accel::Emulated, ..report })));
        }
        None => {}
    }
    // Small pieces all over the heap: gone, they let go of whole pages.
    drop((matches, begun));
    let mut report = machine::run(&plan, &scout, outcome::process_start(), presence.as_ref())?;
    if emulated {
        report.accel = Accel::Emulated;
    }
    Ok(Attempt::Ran(Box::new(report)))
}

/// The whole plan that flags ask for.
///
/// # Errors
/// They make no sense, or what they name cannot be read.
pub(super) fn planned(matches: &ArgMatches) -> Result<Plan> {
    plan(matches, beginning(matches)?)?.complete()
}

/// The plan that flags change and extend: that of the plan file, if there is one.
fn beginning(matches: &ArgMatches) -> Result<Plan> {
    match (matches.get_one::<String>(HANDED), matches.get_one::<PathBuf>("plan")) {
        (Some(text), _) => Plan::parse(Path::new(HANDED), text.as_bytes()),
        (None, Some(path)) => Plan::read(path),
        (None, None) => Ok(Plan::default()),
    }
}

/// Words for the mayfly on the emulated host, for which a plan that came out of a pipe (`--plan <(...)`) would be gone.
fn handed(matches: &ArgMatches, begun: &Plan) -> Result<Vec<OsString>> {
    match matches.get_one::<PathBuf>("plan") {
        Some(path) if !path.is_file() => {
            let text = serde_json::to_string(begun)
                .map_err(|cause| Fail::new(Why::Invalid, "write the plan down").because(cause))?;
            Ok(vec![format!("--{HANDED}={text}").into()])
        }
        _ => Ok(Vec::new()),
    }
}

/// The plan that the flags ask for, on top of one.
fn plan(matches: &ArgMatches, mut plan: Plan) -> Result<Plan> {
    set(matches, "kernel", &mut plan.kernel);
    plan.kernel = super::kernel::resolve(plan.kernel)?;
    set(matches, "protocol", &mut plan.protocol);
    set(matches, "kernel-memory", &mut plan.kernel_memory);
    set(matches, "cpus", &mut plan.cpus);
    set(matches, "memory", &mut plan.memory);
    set(matches, "irqchip", &mut plan.irqchip);
    set(matches, "transport", &mut plan.transport);
    set(matches, "on-reset", &mut plan.on_reset);
    set(matches, "accel", &mut plan.accel);
    plan.timeout = matches.get_one("timeout").copied().or(plan.timeout);
    plan.boot_timeout = matches.get_one("boot-timeout").copied().or(plan.boot_timeout);
    plan.generation_id = matches.get_one("generation-id").copied().or(plan.generation_id);
    if let Some(text) = matches.get_one::<String>("smbios") {
        plan.smbios = Smbios::parse(text)?;
    }
    if let Some(text) = matches.get_one::<String>("metrics") {
        plan.metrics = Some(Metrics::parse(text)?);
    }
    plan.initrd
        .extend(matches.get_many::<PathBuf>("initrd").into_iter().flatten().cloned().map(Initrd::from));
    super::guest::set(matches, &mut plan)?;
    if let Some(text) = matches.get_one::<String>("cmdline-only") {
        plan.cmdline = Cmdline::Only(text.clone());
    }
    for text in matches.get_many::<String>("cmdline").into_iter().flatten() {
        plan.cmdline.push(text);
    }
    for entry in CATALOG {
        for text in matches.get_many::<String>(entry.name()).into_iter().flatten() {
            plan.add_device(*entry, text)?;
        }
    }
    Ok(plan)
}

/// Takes over the value of a flag that was given.
pub(super) fn set<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, flag: &str, value: &mut T) {
    if let Some(given) = matches.get_one::<T>(flag) {
        value.clone_from(given);
    }
}

fn print(plan: &Plan) -> Result<u8> {
    let text = serde_json::to_string_pretty(plan)
        .map_err(|cause| Fail::new(Why::Invalid, "write the plan down").because(cause))?;
    Ok(say(&(text + "\n")))
}

/// Tells how it ended; the exit code.
fn conclude(report: Report, papers: Papers) -> u8 {
    if report.mid_line && !papers.on_stdout() && std::io::stdout().is_terminal() {
        say("\n");
    }
    if let Some(fail) = report.complaint() {
        complain(&fail);
        report.hang.iter().flat_map(Hang::lines).for_each(|line| log::tell(&line));
        for line in report.last_words() {
            log::tell(&format!("  | {line}"));
        }
    }
    papers.tell(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command::{Detail, command};
    use crate::plan::{GenerationId, Irqchip, KernelMemory, OnReset, Protocol, Size, Transport};

    fn parse(words: &[&str]) -> Plan {
        let words = ["mayfly", "run"].iter().chain(words);
        let matches = command(Detail::Names).try_get_matches_from(words).unwrap();
        let matches = matches.subcommand_matches("run").unwrap();
        plan(matches, beginning(matches).unwrap()).unwrap()
    }

    #[test]
    fn every_flag_reaches_the_plan() {
        let plan = parse(&[
            "--kernel",
            "k",
            "--initrd",
            "a",
            "--initrd",
            "builtin",
            "--append",
            "quiet",
            "--cmdline",
            "-x",
            "--protocol",
            "pvh",
            "--kernel-memory",
            "copied",
            "-c",
            "2",
            "--cpus",
            "3",
            "-m",
            "1G",
            "--irqchip",
            "full",
            "--transport",
            "pci",
            "--on-reset",
            "restart",
            "--accel",
            "unchecked",
            "--timeout",
            "1m",
            "--boot-timeout",
            "30s",
            "--smbios",
            "serial=7",
            "--generation-id",
            "--metrics",
            "c,every=2s",
        ]);
        assert_eq!(plan.kernel, Path::new("k"));
        assert_eq!(plan.initrd, [Initrd::File("a".into()), Initrd::Builtin]);
        assert_eq!(plan.cmdline, Cmdline::Extend("quiet -x".into()));
        assert_eq!((plan.protocol, plan.cpus, plan.memory), (Protocol::Pvh, 3, Size::mib(1024)));
        assert_eq!(plan.kernel_memory, KernelMemory::Copied);
        assert_eq!((plan.irqchip, plan.on_reset), (Irqchip::Full, OnReset::Restart));
        assert_eq!(plan.transport, Transport::Pci);
        assert_eq!(plan.smbios.serial.as_deref(), Some("7"));
        assert_eq!(plan.generation_id, Some(GenerationId::Random));
        let metrics = plan.metrics.unwrap();
        assert_eq!((metrics.path.as_path(), metrics.every.to_string()), (Path::new("c"), "2s".into()));
        assert_eq!(plan.boot_timeout.unwrap().to_string(), "30s");
        assert_eq!((plan.accel, plan.timeout.unwrap().to_string()), (Accel::Unchecked, "1m".into()));
    }

    #[test]
    fn a_plan_out_of_a_pipe_is_handed_to_the_emulated_host() {
        let dir = tempfile::tempdir().unwrap();
        let (file, fifo) = (dir.path().join("p.json"), dir.path().join("fifo"));
        std::fs::write(&file, r#"{"kernel": "k", "cpus": 4}"#).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let begun = Plan::read(&file).unwrap();
        let words = |path: &Path| {
            let words = ["mayfly", "run", "--plan", path.to_str().unwrap()];
            let matches = command(Detail::Names).try_get_matches_from(words).unwrap();
            handed(matches.subcommand_matches("run").unwrap(), &begun).unwrap()
        };
        assert!(words(&file).is_empty());
        let handed = words(&fifo);
        let plan = parse(&["--plan", fifo.to_str().unwrap(), "--memory", "1G", handed[0].to_str().unwrap()]);
        assert_eq!((plan.cpus, plan.memory), (4, Size::mib(1024)));
    }

    #[test]
    fn flags_change_and_extend_a_plan_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            r#"{"kernel": "k", "cpus": 4, "initrd": ["a"], "cmdline": {"extend": "q"}}"#,
        )
        .unwrap();
        let from = file.path().to_str().unwrap();
        let plan = parse(&["--plan", from, "--initrd", "b", "--cmdline", "z", "--memory", "2G"]);
        assert_eq!((plan.cpus, plan.memory), (4, Size::mib(2048)));
        assert_eq!(plan.initrd, [Initrd::File("a".into()), Initrd::File("b".into())]);
        assert_eq!(plan.cmdline, Cmdline::Extend("q z".into()));
        let only = parse(&["--plan", from, "--cmdline-only", "a", "--cmdline", "b"]);
        assert_eq!(only.cmdline, Cmdline::Only("a b".into()));
    }
}
