//! The emulated host, from the command line: `mayfly lab`, and runs that need it.

use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Weak;

use base::host::Host;
use base::{Fail, Result, Why};
use clap::ArgMatches;
use devices::catalog;

use super::complain;
use crate::accel::{self, Ring0};
use crate::control::presence::Presence;
use crate::host::elsewhere::Elsewhere;
use crate::lab::Ended;
use crate::machine::{self, Scout};
use crate::outcome::{code, code_before_start};
use crate::plan::{Accel, Period, Plan, Size};
use crate::session::Export;
use crate::{kernels, lab, log};

/// RAM of the emulated host, unless something else is asked for.
const MEMORY: Size = Size::mib(4096);
/// RAM of the emulated host beside that of a guest on it.
const BESIDE: Size = Size::mib(1024);

/// An emulated host and what is to run on it.
pub struct Order {
    /// Its CPUs.
    pub cpus: u32,
    /// Its RAM.
    pub memory: Size,
    /// Virtual time counts instructions.
    pub icount: bool,
    /// Its timers come with a steady tick all the same.
    pub tick: bool,
    /// It ends after this time.
    pub timeout: Option<Period>,
    /// Program and arguments.
    pub command: Vec<OsString>,
}

/// What came of a run on the emulated host.
pub enum Taken {
    /// It ended with this exit code, and has told its result there.
    Ended(u8),
    /// A signal ended it before it began there: who was asked for the result has to tell it.
    Unborn(i32),
}

/// Carries out `mayfly lab`; the exit code of the command.
pub fn lab(matches: &ArgMatches) -> u8 {
    let order = Order {
        cpus: matches.get_one("cpus").copied().unwrap_or(1),
        memory: matches.get_one("memory").copied().unwrap_or_else(|| MEMORY.min(lab::room())),
        icount: matches.get_flag("icount"),
        tick: matches.get_flag("tick"),
        timeout: matches.get_one("timeout").copied(),
        command: matches.get_many::<OsString>("command").into_iter().flatten().cloned().collect(),
    };
    match exec(&order, |_| ()) {
        Ok(ended) => {
            if let Some(number) = ended.unborn {
                let cause = format!("signal {number} ended it");
                complain(&Fail::new(Why::Host, "boot the emulated host").because(cause));
            }
            settled(ended, code::DONE)
        }
        Err(fail) => {
            complain(&fail);
            code_before_start(&fail)
        }
    }
}

/// Runs the plan on the emulated host if it has to run there: this very command line again, with that host's KVM and
/// `more` words. `None` if it can run here.
///
/// # Errors
/// It can run neither here nor there.
pub fn take_over(
    plan: &Plan,
    scout: &Scout,
    more: Vec<OsString>,
    presence: Option<&Presence>,
) -> Result<Option<Taken>> {
    let Some(reason) = reason(plan.accel, || probe(scout))? else { return Ok(None) };
    // Wrong inputs are found here, before an emulated host is booted for them.
    let kernel = kernels::open(&plan.kernel)?;
    machine::check(plan, &kernel)?;
    let memory = memory(plan.memory, lab::room())?;
    // Held to the end of the run: what the other side locks, nobody here would see.
    let _held = claim(plan, &Elsewhere::default())?;
    lab::check()?;
    // The other side finds it unpacked: there it would take twenty times as long.
    kernel.prepare()?;
    boot_and_run(&reason, memory, more, presence).map(Some)
}

/// Runs this very command line on the emulated host if guests have to run there: with these kernels, and `guests` of memory
/// together. `None` if they can run here.
///
/// # Errors
/// They can run neither here nor there.
pub fn hand_over<'a>(
    accel: Accel,
    images: impl Iterator<Item = &'a Path>,
    guests: Size,
    scout: &Scout,
    more: Vec<OsString>,
) -> Result<Option<Taken>> {
    let Some(reason) = reason(accel, || probe(scout))? else { return Ok(None) };
    let memory = memory(guests, lab::room())?;
    lab::check()?;
    for image in images {
        kernels::open(image)?.prepare()?;
    }
    boot_and_run(&reason, memory, more, None).map(Some)
}

fn boot_and_run(
    reason: &str,
    memory: Size,
    more: Vec<OsString>,
    presence: Option<&Presence>,
) -> Result<Taken> {
    log::note(&format!("{reason}; running on an emulated host (slower)"));
    let mut command: Vec<OsString> = vec![std::env::current_exe().unwrap_or_else(|_| "mayfly".into()).into()];
    let name = presence.map(|presence| format!("--name={}", presence.name()).into());
    command.extend(there(std::env::args_os().skip(1), more.into_iter().chain(name).collect()));
    // One CPU, however many the guest has: what QEMU gets wrong, it gets wrong between CPUs.
    let order = Order { cpus: 1, memory, icount: false, tick: false, timeout: None, command };
    let ended =
        exec(&order, |host| presence.into_iter().for_each(|presence| super::relay::begin(presence, &host)))?;
    Ok(match ended.unborn {
        Some(number) => Taken::Unborn(number),
        None => {
            let code = settled(ended, code::QUIT);
            if ![code::NOT_STARTED, code::USAGE].contains(&code) {
                // It may have been over before anybody saw that it was up.
                presence.into_iter().for_each(|presence| _ = presence.rise());
            }
            // It has told its result there; what is known here is this.
            let result = serde_json::json!({ "exit_code": code, "accel": Accel::Emulated });
            presence.into_iter().for_each(|presence| presence.conclude(&result.to_string()));
            Taken::Ended(code)
        }
    })
}

/// The command line for the other side: this one, with the flags for there before the command in the guest.
fn there(words: impl Iterator<Item = OsString>, more: Vec<OsString>) -> Vec<OsString> {
    let flags = ["--accel", "kvm", "--on-emulated-host"].map(OsString::from);
    with_flags(words, flags.into_iter().chain(more))
}

/// A command line with more flags, before the command in the guest.
pub fn with_flags(
    words: impl Iterator<Item = OsString>,
    flags: impl Iterator<Item = OsString>,
) -> Vec<OsString> {
    let mut words: Vec<_> = words.collect();
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    words.splice(end..end, flags);
    words
}

/// Why a run has to go to the emulated host; `None` if it can run here. `probe` is asked only where it matters.
fn reason(accel: Accel, probe: impl FnOnce() -> Result<Ring0>) -> Result<Option<String>> {
    match accel {
        Accel::Unchecked => Ok(None),
        Accel::Emulated => Ok(Some("--accel emulated".to_owned())),
        Accel::Kvm => match probe()? {
            Ring0::Hardware => Ok(None),
            Ring0::Emulated(why) => Err(Fail::new(Why::Unsupported, "run the guest on /dev/kvm")
                .because(format!("it emulates ring 0 and cannot boot Linux: {why}"))
                .hint("leave --accel out to run on an emulated host; --accel unchecked runs small bare-metal guests")),
        },
        Accel::Auto => match probe() {
            Ok(Ring0::Hardware) => Ok(None),
            Ok(Ring0::Emulated(_)) => Ok(Some("/dev/kvm here emulates ring 0 and cannot boot Linux".to_owned())),
            Err(fail) => Ok(Some(fail.summary())),
        },
    }
}

/// Asks this host's KVM whether it has what is needed, and how it runs guest kernels.
fn probe(scout: &Scout) -> Result<Ring0> {
    let hypervisor = scout.hypervisor()?;
    if let Some((name, purpose)) = hypervisor.lacks().first() {
        return Err(
            Fail::new(Why::Unsupported, "use /dev/kvm").because(format!("it lacks {name} ({purpose})"))
        );
    }
    accel::ring0(&hypervisor)
}

/// RAM of the emulated host for a guest with `guest`, where it can have `room`.
fn memory(guest: Size, room: Size) -> Result<Size> {
    let needed = Size::of(guest.bytes().saturating_add(BESIDE.bytes()));
    if needed <= room {
        return Ok(needed.max(MEMORY.min(room)));
    }
    let fail = Fail::new(Why::Unsupported, format!("give the machine {guest} of memory on an emulated host"))
        .because(format!("this machine has {room}, of which the emulated host needs {BESIDE}"));
    Err(match room.bytes().checked_sub(BESIDE.bytes()) {
        Some(left) if left > 0 => fail.hint(format!("pass --memory {} or less", Size::of(left))),
        _ => fail,
    })
}

/// Opens and locks the files of all devices, and opens that of the counters.
fn claim(plan: &Plan, host: &dyn Host) -> Result<Vec<File>> {
    let mut held = Vec::new();
    held.extend(plan.metrics.as_ref().map(|metrics| metrics.open(host)).transpose()?);
    let export = plan.command.as_ref().and_then(|command| command.export_changes.as_deref());
    export.map(Export::open).transpose()?;
    for device in &plan.devices {
        if let Some(entry) = catalog::find(&device.kind) {
            held.extend(entry.claim(&device.spec, &device.name, host)?);
        }
    }
    Ok(held)
}

fn exec(order: &Order, beside: impl FnOnce(Weak<lab::Host>)) -> Result<Ended> {
    let options =
        lab::Options { cpus: order.cpus, memory: order.memory, icount: order.icount, tick: order.tick };
    lab::run(&options, order.timeout.map(Period::duration), &order.command, beside)
}

/// The exit code when output may have been lost on its way from the emulated host: that is no success. A reader who
/// has gone (`| head`) has had enough, for which a run has a code of its own, `gone`; the command there has lost its
/// reader as well and may have ended with that.
fn settled(ended: Ended, gone: u8) -> u8 {
    match ended.lost {
        Some(cause) if cause.kind() == ErrorKind::BrokenPipe => {
            if ended.code == code::DONE {
                gone
            } else {
                ended.code
            }
        }
        Some(cause) => {
            complain(&Fail::new(Why::Host, "write the output").because(cause));
            if [code::DONE, code::QUIT].contains(&ended.code) { code::HOST } else { ended.code }
        }
        None => ended.code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::LinuxHost;
    use crate::plan::Metrics;

    #[test]
    fn flags_for_the_other_side_are_none_for_the_command() {
        let there = |text: &str| {
            let words = there(text.split(' ').map(OsString::from), vec!["--more".into()]);
            words.iter().map(|word| word.display().to_string()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(there("run --cpus 2"), "run --cpus 2 --accel kvm --on-emulated-host --more");
        assert_eq!(there("run -- sh -- x"), "run --accel kvm --on-emulated-host --more -- sh -- x");
    }

    #[test]
    fn lost_output_is_no_success() {
        let ended = |code, errno: i32| Ended {
            code,
            lost: Some(std::io::Error::from_raw_os_error(errno)),
            unborn: None,
        };
        assert_eq!(settled(ended(0, libc::ENOSPC), code::QUIT), code::HOST);
        assert_eq!(settled(ended(code::QUIT, libc::ENOSPC), code::QUIT), code::HOST);
        assert_eq!(settled(ended(7, libc::ENOSPC), code::QUIT), 7, "the command's own failure counts more");
        assert_eq!(settled(ended(0, libc::EPIPE), code::QUIT), code::QUIT);
        assert_eq!(settled(ended(0, libc::EPIPE), code::DONE), code::DONE);
        assert_eq!(settled(Ended { code: 0, lost: None, unborn: None }, code::QUIT), 0);
    }

    #[test]
    fn a_run_goes_where_it_can_run() {
        let emulated = || Ok(Ring0::Emulated("popcnt".into()));
        let absent = || Err(Fail::new(Why::Unsupported, "open /dev/kvm").because("no such device"));
        let hardware = || Ok(Ring0::Hardware);
        let unasked = || -> Result<Ring0> { panic!("asked for nothing") };
        assert_eq!(reason(Accel::Auto, hardware).unwrap(), None);
        assert_eq!(reason(Accel::Kvm, hardware).unwrap(), None);
        assert_eq!(reason(Accel::Unchecked, unasked).unwrap(), None);
        assert!(reason(Accel::Emulated, unasked).unwrap().is_some());
        let told = reason(Accel::Auto, emulated).unwrap().unwrap();
        assert_eq!(told, "/dev/kvm here emulates ring 0 and cannot boot Linux");
        assert_eq!(reason(Accel::Auto, absent).unwrap().unwrap(), "open /dev/kvm: no such device");
        let refusal = reason(Accel::Kvm, emulated).unwrap_err();
        assert_eq!(refusal.why, Why::Unsupported);
        assert!(refusal.summary().ends_with("cannot boot Linux: popcnt") && refusal.remedy().is_some());
        assert!(reason(Accel::Kvm, absent).is_err());
    }

    #[test]
    fn an_emulated_host_fits_into_this_machine() {
        let room = Size::mib(16 << 10);
        assert_eq!(memory(Size::mib(512), room).unwrap(), MEMORY);
        assert_eq!(memory(Size::mib(8 << 10), room).unwrap(), Size::mib(9 << 10));
        assert_eq!(memory(Size::mib(512), Size::mib(2048)).unwrap(), Size::mib(2048));
        assert_eq!(
            memory(Size::mib(16 << 10), room).unwrap_err().to_string(),
            "give the machine 16G of memory on an emulated host: this machine has 16G, of which the emulated host \
             needs 1G\n  hint: pass --memory 15G or less"
        );
    }

    #[test]
    fn a_disk_is_held_for_the_run_elsewhere_and_a_wrong_one_is_found_before() {
        let place = tempfile::tempdir().unwrap();
        let image = place.path().join("a.img");
        let plan = |keys: &str| {
            let mut plan = Plan { kernel: "k".into(), ..Plan::default() };
            let blk = catalog::find("blk").unwrap();
            plan.add_device(blk, &format!("path={}{keys}", image.display())).unwrap();
            plan.complete().unwrap()
        };
        let host = LinuxHost::default();
        let missing = claim(&plan(""), &host).unwrap_err();
        assert!(missing.summary().starts_with("open disk0 image "), "{missing}");
        std::fs::write(&image, [0; 1000]).unwrap();
        assert!(claim(&plan(""), &host).unwrap_err().summary().contains("512-byte sectors"));
        std::fs::write(&image, [0; 1024]).unwrap();
        let held = claim(&plan(""), &host).unwrap();
        assert_eq!(held.len(), 1);
        let second = claim(&plan(",readonly=on"), &host).unwrap_err();
        assert!(second.summary().ends_with("this machine uses it already"), "{second}");
        drop(held);
        let readers = [claim(&plan(",readonly=on"), &host), claim(&plan(",readonly=on"), &host)];
        assert!(readers.iter().all(Result::is_ok), "{readers:?}");
    }

    /// What a run elsewhere would find out, before a host is booted for it: by the words that the run itself has.
    #[test]
    fn what_the_devices_of_a_run_elsewhere_could_not_use_is_found_before() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name).display().to_string();
        let claim = |flags: &[(&str, String)]| {
            let mut plan = Plan { kernel: "k".into(), ..Plan::default() };
            for (kind, text) in flags {
                plan.add_device(catalog::find(kind).unwrap(), text)?;
            }
            claim(&plan.complete()?, &Elsewhere::default())
        };
        let refused = |kind, text: String| claim(&[(kind, text)]).unwrap_err().to_string();
        std::fs::write(path("base"), [0; 1 << 20]).unwrap();
        let over = |name| format!("path={},overlay={}", path("base"), path(name));
        assert!(refused("blk", over("no/over")).ends_with("hint: make its directory first"));
        assert_eq!(claim(&[("blk", over("over"))]).unwrap().len(), 1);
        assert!(!place.path().join("over").exists(), "a claim makes none");
        std::fs::write(path("over"), "no overlay").unwrap();
        assert!(refused("blk", over("over")).contains("as a qcow2 image it cannot be used: "));

        let image = std::fs::File::options().read(true).write(true).create_new(true).open(path("q")).unwrap();
        base::disk::qcow2::create(image, 1 << 20, None).unwrap();
        let whole = std::fs::read(path("q")).unwrap();
        let qcow2 = format!("path={},format=qcow2", path("q"));
        assert_eq!(claim(&[("blk", qcow2.clone())]).unwrap().len(), 1);
        assert_eq!(std::fs::read(path("q")).unwrap(), whole, "a claim changes nothing");
        std::fs::write(path("q"), &whole[..100]).unwrap();
        let told = refused("blk", qcow2.clone());
        assert!(
            told.ends_with("it cannot be used: it ends within its header\n  hint: copy or make it again"),
            "{told}"
        );
        let mut bent = whole;
        bent[20..24].copy_from_slice(&99u32.to_be_bytes());
        std::fs::write(path("q"), bent).unwrap();
        assert!(refused("blk", qcow2).contains("\n  hint: qemu-img check "));

        let twice = claim(&[("blk", path("base")), ("blk", path("base"))]).unwrap_err();
        assert!(twice.summary().ends_with("for disk1: this machine uses it already"), "{twice}");
        assert!(refused("net", format!("user,pcap={}", path("no/p"))).ends_with("make its directory first"));
        assert!(
            refused("vsock", path("v.sock"))
                .contains("its own /run and /dev/shm only\n  hint: name it /run/v.sock")
        );
        assert!(refused("console", format!("socket={}", path("c"))).contains("hint: name it /run/c"));
        assert!(
            refused("net", format!("passt={}", path("p")))
                .contains("cannot be reached from the emulated host")
        );
        let metrics = Some(Metrics::parse(&path("no/counters")).unwrap());
        let plan = Plan { kernel: "k".into(), metrics, ..Plan::default() };
        let told = super::claim(&plan, &Elsewhere::default()).unwrap_err().to_string();
        assert!(
            told.starts_with("open metrics file ") && told.ends_with("make its directory first"),
            "{told}"
        );
    }

    /// What the settings alone say, a plan says whoever carries it out: also `--dry-run`.
    #[test]
    fn settings_that_make_no_sense_are_refused_with_the_plan() {
        for (kind, text) in [
            ("net", "user,allow=10.0.0.1/8"),
            ("net", "user,publish=80"),
            ("net", "user,mac=zz"),
            ("net", "user,dns=nowhere"),
            ("net", "tap=abcdefghijklmnop"),
            ("net", "tap=t0,allow=a.b"),
            ("blk", "path=a,queues=0"),
            ("blk", "path=a,id=123456789012345678901"),
            ("vsock", "path=a,cid=1"),
            ("balloon", "size=1"),
            ("console", "socket=a,to=pty"),
            ("rng", "rate=0"),
        ] {
            let mut plan = Plan { kernel: "k".into(), ..Plan::default() };
            plan.add_device(catalog::find(kind).unwrap(), text).unwrap();
            let fail = plan.complete().expect_err(text);
            assert!(fail.why == Why::Usage && fail.remedy().is_some(), "{text}: {fail}");
        }
    }
}
