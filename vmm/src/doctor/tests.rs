use std::path::{Path, PathBuf};

use super::*;

/// A host made of a tree of files and of answers.
struct Fake {
    tree: tempfile::TempDir,
    kvm: fn() -> base::Result<Kvm>,
    io_uring: fn() -> io::Result<()>,
    limit: Option<u64>,
    lacks: fn() -> Vec<Fail>,
    cache: fn() -> base::Result<PathBuf>,
}

impl Site for Fake {
    fn root(&self) -> &Path {
        self.tree.path()
    }
    fn kvm(&self) -> base::Result<Kvm> {
        (self.kvm)()
    }
    fn io_uring(&self) -> io::Result<()> {
        (self.io_uring)()
    }
    fn limit(&self, _: Limit) -> Option<u64> {
        self.limit
    }
    fn emulated_host_lacks(&self) -> Vec<Fail> {
        (self.lacks)()
    }
    fn cache(&self) -> base::Result<PathBuf> {
        (self.cache)()
    }
}

fn healthy_kvm() -> base::Result<Kvm> {
    Ok(Kvm { lacks: Vec::new(), ring0: Ok(Ring0::Hardware) })
}

fn emulating_kvm() -> base::Result<Kvm> {
    Ok(Kvm { lacks: Vec::new(), ring0: Ok(Ring0::Emulated("popcnt is not emulated".into())) })
}

fn write(site: &Fake, path: &str, text: &str) {
    let path = site.path(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn healthy() -> Fake {
    let tree = tempfile::tempdir().unwrap();
    let site = Fake {
        tree,
        kvm: healthy_kvm,
        io_uring: || Ok(()),
        limit: None,
        lacks: Vec::new,
        cache: || Ok("/c".into()),
    };
    write(&site, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
    for device in ["dev/kvm", "dev/net/tun", "dev/userfaultfd", "dev/vhost-net", "dev/vhost-vsock"] {
        write(&site, device, "");
    }
    site
}

fn look(site: &Fake, name: &str) -> (State, String, String) {
    let findings = examine(site);
    let check = findings.get(name).unwrap();
    (check.state, check.detail.clone(), check.fix.clone().unwrap_or_default())
}

#[test]
fn a_healthy_host_has_nothing_to_mend() {
    let findings = examine(&healthy());
    assert!(
        findings.checks.iter().all(|check| check.state == State::Ok && check.fix.is_none()),
        "{findings:?}"
    );
    assert_eq!(findings.exit_code(), 0);
}

#[test]
fn absent_denied_and_lacking_kvm_are_three_messages_and_three_codes() {
    let mut absent = healthy();
    absent.kvm = || Err(Fail::new(Why::Unsupported, "open /dev/kvm"));
    std::fs::remove_file(absent.path("dev/kvm")).unwrap();
    let mut denied = healthy();
    denied.kvm = || Err(Fail::new(Why::Denied, "open /dev/kvm").because("Permission denied"));
    let mut lacking = healthy();
    lacking.kvm =
        || Ok(Kvm { lacks: vec![("KVM_CAP_IOEVENTFD", "virtio doorbells")], ring0: Ok(Ring0::Hardware) });
    let told = |site: &Fake, name| (look(site, name).1, examine(site).exit_code());
    assert_eq!(told(&absent, "kvm"), ("there is no /dev/kvm".into(), 3));
    assert_eq!(told(&denied, "kvm"), ("open /dev/kvm: Permission denied".into(), 4));
    assert!(look(&denied, "kvm").2.contains("usermod -aG kvm $USER"));
    let expected = ("KVM lacks KVM_CAP_IOEVENTFD (virtio doorbells)".into(), 5);
    assert_eq!(told(&lacking, "capabilities"), expected);
}

#[test]
fn a_file_that_is_not_kvm_is_recognised() {
    let tree = healthy();
    let findings = examine(&ThisHost::below(tree.root()));
    let kvm = findings.get("kvm").unwrap();
    assert_eq!((kvm.state, findings.exit_code()), (State::Fail, 5), "{kvm:?}");
    assert!(kvm.fix.is_some(), "{kvm:?}");
}

#[test]
fn the_processor_decides_what_brings_kvm() {
    let mut site = healthy();
    site.kvm = || Err(Fail::new(Why::Unsupported, "open /dev/kvm"));
    std::fs::remove_file(site.path("dev/kvm")).unwrap();
    for (flags, fix) in [("fpu vmx", "kvm_intel"), ("svm fpu", "kvm_amd"), ("fpu xsvm", "firmware")] {
        write(&site, "proc/cpuinfo", &format!("processor\t: 0\nflags\t\t: {flags}\n"));
        let found = look(&site, "kvm").2;
        assert!(found.contains(fix), "{flags}: {found}");
    }
}

#[test]
fn an_emulating_kvm_is_a_warning_only_where_there_is_another_way() {
    let mut site = healthy();
    site.kvm = emulating_kvm;
    assert_eq!((look(&site, "processor").0, examine(&site).exit_code()), (State::Warn, 0));
    site.lacks = || {
        let lack = |doing, hint| Fail::new(Why::Missing, doing).hint(hint);
        vec![lack("find QEMU's pvh.bin", "apt-get install q"), lack("fetch a kernel", "install one")]
    };
    assert_eq!((look(&site, "processor").0, examine(&site).exit_code()), (State::Fail, 5));
    let (state, detail, fix) = look(&site, "emulated host");
    assert_eq!(state, State::Warn);
    assert_eq!(detail, "not available: find QEMU's pvh.bin; fetch a kernel");
    assert_eq!(fix, "sudo apt-get install q; install one");
}

#[test]
fn each_other_lack_is_a_warning_with_its_own_remedy() {
    let mut site = healthy();
    site.io_uring = || Err(io::Error::from_raw_os_error(1));
    site.limit = Some(64);
    site.cache = || Err(Fail::new(Why::Denied, "write to /c").hint("set XDG_CACHE_HOME"));
    write(&site, "proc/sys/kernel/io_uring_disabled", "2\n");
    write(&site, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n");
    std::fs::remove_file(site.path("dev/net/tun")).unwrap();
    std::fs::remove_file(site.path("dev/userfaultfd")).unwrap();
    std::fs::remove_file(site.path("dev/vhost-net")).unwrap();
    std::fs::remove_file(site.path("dev/vhost-vsock")).unwrap();
    for (name, detail, fix) in [
        ("io_uring", "Operation not permitted; disks use threads", "sysctl kernel.io_uring_disabled=0"),
        ("cache", "write to /c; the emulated host does not start", "set XDG_CACHE_HOME"),
        ("huge pages", "off (never)", "echo madvise"),
        ("userfaultfd", "not for this user", "unprivileged_userfaultfd=1"),
        ("tun", "No such file or directory; no TAP", "modprobe tun"),
        ("vhost-net", "No such file or directory; no --net tap,vhost=on", "modprobe vhost_net"),
        ("vhost-vsock", "; no --vsock vhost=on", "setfacl -m u:$USER:rw /dev/vhost-vsock"),
        ("open files", "at most 64", "ulimit -n"),
        ("locked memory", "at most 64 bytes", "ulimit -l"),
    ] {
        let found = look(&site, name);
        assert_eq!(found.0, State::Warn, "{name}");
        assert!(found.1.contains(detail) && found.2.contains(fix), "{name}: {found:?}");
    }
    assert_eq!(examine(&site).exit_code(), 0);
    write(&site, "proc/sys/vm/unprivileged_userfaultfd", "1\n");
    assert_eq!(look(&site, "userfaultfd").0, State::Ok);
}

#[test]
fn the_json_has_a_line_for_each_check() {
    let findings = examine(&healthy());
    let json: serde_json::Value = serde_json::from_str(&findings.json()).unwrap();
    assert_eq!(json["checks"].as_array().unwrap().len(), findings.checks.len());
    assert_eq!(json["checks"][0]["state"], "ok");
}
