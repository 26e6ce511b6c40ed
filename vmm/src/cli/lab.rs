//! The emulated host, from the command line: `mayfly lab`, and runs that need it.

use std::ffi::OsString;
use std::path::Path;

use base::{Fail, Result, Why};
use boot::kernel::Kernel;
use clap::ArgMatches;

use super::complain;
use crate::accel::{self, Ring0};
use crate::hv::kvm::Hypervisor;
use crate::outcome::code_before_start;
use crate::plan::{Accel, Initrd, Period, Plan, Size};
use crate::{lab, log};

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
    /// It ends after this time.
    pub timeout: Option<Period>,
    /// Program and arguments.
    pub command: Vec<OsString>,
}

/// Carries out `mayfly lab`; the exit code of the command.
pub fn lab(matches: &ArgMatches) -> u8 {
    let order = Order {
        cpus: matches.get_one("cpus").copied().unwrap_or(1),
        memory: matches.get_one("memory").copied().unwrap_or(MEMORY),
        icount: matches.get_flag("icount"),
        timeout: matches.get_one("timeout").copied(),
        command: matches.get_many::<OsString>("command").into_iter().flatten().cloned().collect(),
    };
    exec(&order).unwrap_or_else(|fail| {
        complain(&fail);
        code_before_start(&fail)
    })
}

/// Runs the plan on the emulated host if it has to run there: this very command line again, with that host's KVM.
/// `None` if it can run here.
///
/// # Errors
/// It can run neither here nor there.
pub fn take_over(plan: &Plan) -> Result<Option<u8>> {
    let Some(reason) = reason(plan.accel, probe)? else { return Ok(None) };
    check_files(plan)?;
    log::note(&format!("{reason}; running on an emulated host (slower)"));
    let mut command: Vec<OsString> = vec![std::env::current_exe().unwrap_or_else(|_| "mayfly".into()).into()];
    command.extend(std::env::args_os().skip(1));
    command.extend(["--accel", "kvm", "--on-emulated-host"].map(OsString::from));
    let memory = Size::of(plan.memory.bytes().saturating_add(BESIDE.bytes()).max(MEMORY.bytes()));
    exec(&Order { cpus: plan.cpus, memory, icount: false, timeout: None, command }).map(Some)
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
fn probe() -> Result<Ring0> {
    let hypervisor = Hypervisor::open(Path::new("/dev/kvm"))?;
    if let Some((name, purpose)) = hypervisor.lacks().first() {
        return Err(
            Fail::new(Why::Unsupported, "use /dev/kvm").because(format!("it lacks {name} ({purpose})"))
        );
    }
    accel::ring0(&hypervisor)
}

/// Finds wrong inputs here, before an emulated host is booted for them.
fn check_files(plan: &Plan) -> Result<()> {
    Kernel::open(&boot::kernel::locate(&plan.kernel)?)?;
    for initrd in &plan.initrd {
        if let Initrd::File(path) = initrd {
            std::fs::File::open(path).map_err(|cause| {
                Fail::new(base::fail::why_of(&cause), format!("open initrd {}", path.display()))
                    .because(cause)
            })?;
        }
    }
    Ok(())
}

fn exec(order: &Order) -> Result<u8> {
    let options = lab::Options { cpus: order.cpus, memory: order.memory, icount: order.icount };
    lab::run(&options, order.timeout.map(Period::duration), &order.command)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
