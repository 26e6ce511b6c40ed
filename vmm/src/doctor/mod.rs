//! The doctor: what this host has of what mayfly needs, and the command that mends each lack.

mod site;

use std::io;

use base::host::vhost::Back;
use base::{Fail, Why};
use serde::Serialize;

use crate::accel::Ring0;

pub use site::{Kvm, Limit, Site, ThisHost};

/// Exit codes of `mayfly doctor`, besides 0: nothing is wrong that would stop a run.
mod code {
    /// There is no /dev/kvm.
    pub const ABSENT: u8 = 3;
    /// /dev/kvm may not be opened.
    pub const DENIED: u8 = 4;
    /// KVM is there, but lacks something.
    pub const LACKING: u8 = 5;
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Something works slower, or not at all, that not everybody needs.
    Warn,
    /// Runs on /dev/kvm do not work.
    Fail,
}

impl State {
    /// Its word in the first column.
    pub fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "fail",
        }
    }
}

/// One line of the doctor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// How it came out.
    pub state: State,
    /// What was looked at.
    pub name: &'static str,
    /// What was seen.
    pub detail: String,
    /// The command that mends it, or what to do.
    pub fix: Option<String>,
    #[serde(skip)]
    code: u8,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Check {
        Check { state: State::Ok, name, detail: detail.into(), fix: None, code: 0 }
    }
    fn warn(name: &'static str, detail: impl Into<String>, fix: &str) -> Check {
        Check { state: State::Warn, fix: Some(fix.to_owned()), ..Check::ok(name, detail) }
    }
    fn fail(name: &'static str, detail: impl Into<String>, fix: &str, code: u8) -> Check {
        Check { state: State::Fail, code, ..Check::warn(name, detail, fix) }
    }
}

/// All lines of the doctor.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// In the order in which they are printed.
    pub checks: Vec<Check>,
}

impl Findings {
    /// 0 if nothing failed, else the code of the first failure.
    pub fn exit_code(&self) -> u8 {
        self.checks.iter().find(|check| check.state == State::Fail).map_or(0, |check| check.code)
    }

    /// One JSON object on one line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    /// The check called `name`.
    pub fn get(&self, name: &str) -> Option<&Check> {
        self.checks.iter().find(|check| check.name == name)
    }
}

/// Looks at everything.
pub fn examine(site: &dyn Site) -> Findings {
    let emulated = emulated_host(site);
    let cache = cache(site);
    let mut checks = kvm(site, [&emulated, &cache].iter().all(|check| check.state == State::Ok));
    checks.extend([emulated, cache, io_uring(site), huge_pages(site), userfaultfd(site), tun(site)]);
    checks.extend([
        vhost(site, "vhost-net", Back::Net, "no --net tap,vhost=on"),
        vhost(site, "vhost-vsock", Back::Vsock, "no --vsock vhost=on"),
    ]);
    checks.extend([open_files(site), locked_memory(site)]);
    Findings { checks }
}

const ELSEWHERE: &str = "runs go to the emulated host";

fn kvm(site: &dyn Site, emulated: bool) -> Vec<Check> {
    let kvm = match site.kvm() {
        Ok(kvm) => kvm,
        Err(fail) => return vec![no_kvm(site, &fail)],
    };
    let mut checks = vec![Check::ok("kvm", "/dev/kvm opens and speaks API version 12")];
    checks.push(if kvm.lacks.is_empty() {
        Check::ok("capabilities", "all that are needed")
    } else {
        let lacks: Vec<_> = kvm.lacks.iter().map(|(name, purpose)| format!("{name} ({purpose})")).collect();
        let detail = format!("KVM lacks {}", lacks.join(", "));
        Check::fail("capabilities", detail, "run a newer kernel, or pass --accel emulated", code::LACKING)
    });
    let fix = "use a host with VT-x or AMD-V (nested, if it is a VM itself), or pass --accel emulated";
    checks.push(match kvm.ring0 {
        Ok(Ring0::Hardware) => Check::ok("processor", "hardware virtualization runs guest kernels"),
        Ok(Ring0::Emulated(_)) if emulated => Check::warn(
            "processor",
            format!("KVM emulates guest kernels here and cannot boot Linux; {ELSEWHERE}"),
            fix,
        ),
        Ok(Ring0::Emulated(why)) => Check::fail(
            "processor",
            format!("KVM emulates guest kernels here and cannot boot Linux: {why}"),
            fix,
            code::LACKING,
        ),
        Err(fail) => Check::fail("processor", fail.summary(), fix, code::LACKING),
    });
    checks
}

fn no_kvm(site: &dyn Site, fail: &Fail) -> Check {
    if !site.path("dev/kvm").exists() {
        return Check::fail("kvm", "there is no /dev/kvm", load_module(site), code::ABSENT);
    }
    if fail.why == Why::Denied {
        let fix = "sudo usermod -aG kvm $USER and log in again, or: sudo setfacl -m u:$USER:rw /dev/kvm";
        return Check::fail("kvm", fail.summary(), fix, code::DENIED);
    }
    let fix = fail.remedy().unwrap_or("ls -l /dev/kvm should show major 10, minor 232").to_owned();
    Check::fail("kvm", fail.summary(), &fix, code::LACKING)
}

/// What brings /dev/kvm, by what the processor shows.
fn load_module(site: &dyn Site) -> &'static str {
    let cpuinfo = site.read("proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let shows = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    if shows("vmx") {
        "sudo modprobe kvm_intel (if it refuses, enable VT-x in the firmware)"
    } else if shows("svm") {
        "sudo modprobe kvm_amd (if it refuses, enable SVM in the firmware)"
    } else {
        "enable VT-x or AMD-V in the firmware, or nested virtualization if this is a VM; or pass --accel emulated"
    }
}

fn emulated_host(site: &dyn Site) -> Check {
    let lacks = site.emulated_host_lacks();
    if lacks.is_empty() {
        return Check::ok("emulated host", "QEMU and a kernel are there for runs that KVM here cannot do");
    }
    let missing: Vec<_> = lacks.iter().map(Fail::summary).collect();
    let fixes: Vec<_> = lacks.iter().filter_map(Fail::remedy).map(as_root).collect();
    Check::warn("emulated host", format!("not available: {}", missing.join("; ")), &fixes.join("; "))
}

/// A remedy as somebody types it who is not root.
fn as_root(remedy: &str) -> String {
    if remedy.starts_with("apt-get ") { format!("sudo {remedy}") } else { remedy.to_owned() }
}

fn cache(site: &dyn Site) -> Check {
    match site.cache() {
        Ok(dir) => {
            Check::ok("cache", format!("the kernel of the emulated host is kept in {}", dir.display()))
        }
        Err(fail) => Check::warn(
            "cache",
            format!("{}; the emulated host does not start", fail.summary()),
            fail.remedy().unwrap_or_default(),
        ),
    }
}

fn io_uring(site: &dyn Site) -> Check {
    let slower = "disks use threads instead, a little slower";
    match site.io_uring() {
        Ok(()) => Check::ok("io_uring", "usable"),
        Err(error) => {
            let switched = site.read("proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            let fix = match switched.trim() {
                "1" | "2" => "sudo sysctl kernel.io_uring_disabled=0",
                _ => "allow io_uring_setup in the container's seccomp profile, or run Linux 5.6 or later",
            };
            Check::warn("io_uring", format!("{}; {slower}", plain(&error)), fix)
        }
    }
}

fn huge_pages(site: &dyn Site) -> Check {
    let path = "sys/kernel/mm/transparent_hugepage/enabled";
    let text = site.read(path).unwrap_or_default();
    let chosen = text.split_ascii_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    let fix = format!("echo madvise | sudo tee /{path}");
    match chosen {
        Some(mode @ ("always" | "madvise")) => Check::ok("huge pages", format!("transparent, {mode}")),
        Some(mode) => {
            Check::warn("huge pages", format!("transparent ones are off ({mode}); guests fault more"), &fix)
        }
        None => Check::warn("huge pages", "this kernel has no transparent ones; guests fault more", &fix),
    }
}

fn userfaultfd(site: &dyn Site) -> Check {
    let allowed = site.read("proc/sys/vm/unprivileged_userfaultfd").is_some_and(|text| text.trim() == "1");
    if allowed || site.opens("dev/userfaultfd").is_ok() {
        return Check::ok("userfaultfd", "usable");
    }
    Check::warn(
        "userfaultfd",
        "not for this user; snapshots could not be restored lazily",
        "sudo setfacl -m u:$USER:rw /dev/userfaultfd, or: sudo sysctl vm.unprivileged_userfaultfd=1",
    )
}

fn tun(site: &dyn Site) -> Check {
    match site.opens("dev/net/tun") {
        Ok(()) => Check::ok("tun", "/dev/net/tun opens"),
        Err(error) => Check::warn(
            "tun",
            format!("open /dev/net/tun: {}; no TAP networks", plain(&error)),
            "sudo modprobe tun, and let this user open it: sudo setfacl -m u:$USER:rw /dev/net/tun",
        ),
    }
}

fn vhost(site: &dyn Site, name: &'static str, back: Back, without: &str) -> Check {
    let (path, module) = (back.path(), back.module());
    match site.opens(path.trim_start_matches('/')) {
        Ok(()) => Check::ok(name, format!("{path} opens")),
        Err(error) => Check::warn(
            name,
            format!("open {path}: {}; {without}", plain(&error)),
            &format!("sudo modprobe {module}, and let this user open it: sudo setfacl -m u:$USER:rw {path}"),
        ),
    }
}

fn open_files(site: &dyn Site) -> Check {
    const ENOUGH: u64 = 512;
    match site.limit(Limit::OpenFiles) {
        Some(limit) if limit < ENOUGH => Check::warn(
            "open files",
            format!("at most {limit}; large machines need {ENOUGH}"),
            "ulimit -n 1024",
        ),
        limit => Check::ok("open files", spell(limit)),
    }
}

fn locked_memory(site: &dyn Site) -> Check {
    const ENOUGH: u64 = 1 << 20;
    match site.limit(Limit::LockedMemory) {
        Some(limit) if limit < ENOUGH => Check::warn(
            "locked memory",
            format!("at most {limit} bytes; io_uring on kernels before 5.12 needs more"),
            "ulimit -l unlimited, or raise memlock in /etc/security/limits.conf",
        ),
        limit => Check::ok("locked memory", spell(limit)),
    }
}

fn spell(limit: Option<u64>) -> String {
    limit.map_or_else(|| "no limit".to_owned(), |limit| format!("at most {limit}"))
}

/// The words of an error, without its number.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
