//! Plans read, completed and refused.

use ::devices::catalog::CATALOG;

use super::*;
use base::Doing;

fn plan(json: &str) -> Result<Plan> {
    serde_json::from_str::<Plan>(json).doing(Why::Usage, || "read")
}

fn complaint(json: &str) -> String {
    plan(json).and_then(Plan::complete).expect_err(json).to_string()
}

#[test]
fn an_empty_plan_has_the_defaults_and_needs_a_kernel() {
    assert_eq!(plan("{}").unwrap(), Plan::default());
    assert_eq!(
        complaint("{}"),
        "find out what to boot: no kernel is named\n  hint: pass --kernel FILE, or a command: mayfly run -- uname -a"
    );
}

#[test]
fn completing_adds_what_every_machine_has_and_is_repeatable() {
    let once = plan(r#"{"kernel": "k", "initrd": ["builtin", "./builtin"]}"#).unwrap().complete().unwrap();
    assert_eq!(once.initrd, [Initrd::Builtin, Initrd::File("./builtin".into())]);
    let standard = CATALOG.iter().filter(|e| matches!(e.presence(), Presence::Standard(_)));
    assert_eq!(
        once.devices.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(),
        standard.map(|e| e.name()).collect::<Vec<_>>()
    );
    let text = serde_json::to_string(&once).unwrap();
    assert_eq!(plan(&text).unwrap().complete().unwrap(), once, "{text}");
}

#[test]
fn every_kind_is_named_after_its_flag_and_counted() {
    for entry in CATALOG.iter().filter(|e| e.presence() == Presence::OnRequest) {
        let mut plan = Plan { kernel: "k".into(), ..Plan::default() };
        for _ in 0..2 {
            plan.add_device(*entry, entry.example()).unwrap();
        }
        let taken = format!("{}0", entry.flag());
        plan.devices[1].name = taken.clone();
        let plan = plan.complete().unwrap();
        let names: Vec<_> =
            plan.devices.iter().filter(|d| d.kind == entry.name()).map(|d| d.name.as_str()).collect();
        assert_eq!(names, [format!("{}1", entry.flag()).as_str(), taken.as_str()]);
    }
}

#[test]
fn a_flag_for_a_standard_device_replaces_it() {
    for entry in CATALOG.iter().filter(|e| e.presence() != Presence::OnRequest) {
        let mut plan = Plan { kernel: "k".into(), ..Plan::default() };
        plan.add_device(*entry, entry.example()).unwrap();
        plan.add_device(*entry, entry.example()).unwrap();
        let plan = plan.complete().unwrap();
        assert_eq!(plan.devices.iter().filter(|d| d.kind == entry.name()).count(), 1, "{}", entry.name());
    }
}

#[test]
fn the_command_line_extends_or_replaces() {
    let mut line = Cmdline::default();
    assert_eq!(line.text(true, None), DEFAULT_CMDLINE);
    assert_eq!(line.text(false, Some("ttyS0")), format!("{DEFAULT_CMDLINE} pci=off"));
    assert_eq!(line.text(true, Some("hvc0")), format!("{DEFAULT_CMDLINE} console=hvc0"));
    ["quiet", "init=/x"].iter().for_each(|word| line.push(word));
    assert_eq!(line.text(true, None), format!("{DEFAULT_CMDLINE} quiet init=/x"));
    let plan = plan(r#"{"kernel": "k", "cmdline": {"only": "a"}}"#).unwrap();
    assert_eq!(plan.cmdline.text(false, Some("ttyS0")), "a");
}

#[test]
fn nonsense_is_refused_by_name() {
    for (json, expected) in [
        (r#"{"kernel": "k", "cpus": 0}"#, "give the machine 0 CPUs: it takes 1 to 64"),
        (r#"{"kernel": "k", "cpus": 65}"#, "give the machine 65 CPUs: it takes 1 to 64"),
        (r#"{"kernel": "k", "memory": "10T"}"#, "give the machine 10T of memory: the most is 1T"),
        (
            r#"{"kernel": "k", "memory": "1048577"}"#,
            "give the machine 1048577 of memory: it is not a whole number of 4 KiB pages",
        ),
        (
            r#"{"kernel": "k", "memory": 512}"#,
            "give the machine 512 of memory: the least is 1M\n  hint: a plain number counts bytes; for MiB write 512M",
        ),
        (
            r#"{"kernel": "k", "devices": [{"kind": "serial", "name": "A"}]}"#,
            "name a device `A`: a name is at most 32 small letters, digits, `-` and `_`",
        ),
    ] {
        if json.contains("serial") && catalog::find("serial").is_none() {
            continue;
        }
        assert_eq!(complaint(json), expected);
    }
    let unknown = complaint(r#"{"kernal": "k"}"#);
    assert!(unknown.contains("unknown field `kernal`, expected one of `kernel`, `initrd`"), "{unknown}");
    let kind = complaint(r#"{"kernel": "k", "devices": [{"kind": "floppy"}]}"#);
    assert!(kind.starts_with("add a device of kind `floppy`: the kinds are "), "{kind}");
    let long = format!(r#"{{"kernel": "k", "cmdline": {{"only": "{}"}}}}"#, "x".repeat(2048));
    assert_eq!(complaint(&long), "pass the kernel command line: it has 2048 bytes and the kernel takes 2047");
}

/// The device of that name, as kind and settings.
fn device<'a>(plan: &'a Plan, name: &str) -> Option<(&'a str, &'a serde_json::Value)> {
    plan.devices.iter().find(|device| device.name == name).map(|device| (device.kind.as_str(), &device.spec))
}

#[test]
fn the_least_that_can_be_said_of_a_command_is_enough() {
    for rest in [
        "",
        r#", "root": {"directory": "/r"}"#,
        r#", "root": {"image": "/r.img"}"#,
        r#", "volumes": [{"host": "/h", "guest": "/g"}]"#,
    ] {
        let text = format!(r#"{{"kernel": "k", "command": {{"argv": ["true"]{rest}}}}}"#);
        let once = plan(&text).unwrap().complete().unwrap();
        let command = once.command.clone().unwrap();
        assert_eq!((command.workdir.to_str(), command.hostname.as_str()), (Some("/"), "mayfly"), "{text}");
        assert!(command.env.iter().all(|word| word.starts_with("PATH=")), "{text}: {:?}", command.env);
        let written = serde_json::to_string(&once).unwrap();
        assert_eq!(plan(&written).unwrap().complete().unwrap(), once, "{written}");
    }
}

#[test]
fn devices_of_a_command_are_those_of_the_command_that_is_there() {
    let first = r#"{"kernel": "k", "command": {"argv": ["true"], "root": {"image": "/old.img"},
                    "volumes": [{"host": "/h", "guest": "/g"}, {"host": "/i", "guest": "/j", "access": "cow"}]}}"#;
    let first = plan(first).unwrap().complete().unwrap();
    assert_eq!(device(&first, "root").unwrap().1["path"], "/old.img");
    let again = |change: &dyn Fn(&mut Plan)| {
        let mut plan = first.clone();
        change(&mut plan);
        plan.complete()
    };
    let root = |root: Root| move |plan: &mut Plan| plan.command.as_mut().unwrap().root = root.clone();
    let new = again(&root(Root::Image("/new.qcow2".into()))).unwrap();
    let found = device(&new, "root").unwrap();
    assert_eq!(
        (found.0, &found.1["path"], &found.1["format"]),
        ("blk", &"/new.qcow2".into(), &"qcow2".into())
    );
    let directory = again(&root(Root::Directory("/d".into()))).unwrap();
    let found = device(&directory, "root").unwrap();
    assert_eq!((found.0, &found.1["path"]), ("virtiofs", &"/d".into()));
    assert_eq!(device(&again(&root(Root::Initrd)).unwrap(), "root"), None);
    let fewer = again(&|plan| drop(plan.command.as_mut().unwrap().volumes.remove(0))).unwrap();
    assert_eq!(device(&fewer, "volume1").unwrap().1["path"], "/i");
    assert_eq!(device(&fewer, "volume2"), None);
    // Tuned by hand it stays, for the root it was tuned for.
    let tune = |plan: &mut Plan| {
        let device = plan.devices.iter_mut().find(|device| device.name == "root").unwrap();
        device.spec["iops"] = 100.into();
    };
    assert_eq!(device(&again(&tune).unwrap(), "root").unwrap().1["iops"], 100);
    let both = |plan: &mut Plan| {
        tune(plan);
        root(Root::Image("/new.img".into()))(plan);
    };
    assert_eq!(
        again(&both).unwrap_err().to_string(),
        "give the guest its root: the plan has another device `root`, of kind blk\n  \
         hint: take it out of the plan, or give it another name"
    );
}

#[test]
fn a_device_of_the_users_is_not_taken_for_one_of_a_command() {
    let with = |kind: &str, name: &str, spec: &str| {
        format!(
            r#"{{"kernel": "k", "command": {{"argv": ["true"], "root": {{"image": "/r.img"}}}},
                "devices": [{{"kind": "{kind}", "name": "{name}", "spec": {spec}}}]}}"#
        )
    };
    for (kind, name, spec) in
        [("blk", "root", r#"{"path": "/mine.img"}"#), ("rng", "root", "{}"), ("rng", "agent", "{}")]
    {
        let text = complaint(&with(kind, name, spec));
        let wanted =
            format!("give the guest its {name}: the plan has another device `{name}`, of kind {kind}\n");
        assert!(text.starts_with(&wanted), "{text}");
    }
    // A disk that nobody asks for by this name is the user's, and a way for calls is one whoever made it.
    let disk = with("blk", "volume1", r#"{"path": "/mine.img"}"#);
    assert_eq!(device(&plan(&disk).unwrap().complete().unwrap(), "volume1").unwrap().1["path"], "/mine.img");
    let own = with("vsock", "agent", r#"{"path": "/s.sock", "cid": 9}"#);
    assert_eq!(device(&plan(&own).unwrap().complete().unwrap(), "agent").unwrap().1["cid"], 9);
}

#[test]
fn commands_that_make_no_sense_are_refused_with_a_remedy() {
    for (command, expected) in [
        (r#"{"argv": [""]}"#, "run a command in the guest: it has no name\n  hint: say what to run: "),
        (r#"{"argv": ["a"], "env": ["=b"]}"#, "set `=b` in the environment: it is not NAME=VALUE\n  hint: "),
        (r#"{"argv": ["a"], "workdir": "b"}"#, "start in `b`: it is no absolute path\n  hint: "),
        (r#"{"argv": ["a"], "export_changes": "/c.tar"}"#, "export changes: initial RAM disks are no root"),
        (r#"{"argv": ["a"], "systemd": true}"#, "start systemd: initial RAM disks are no root that has it\n"),
        (r#"{"argv": ["a"], "hostname": "b c"}"#, "call the guest `b c`: a name is 1 to 64 letters, "),
    ] {
        let text = complaint(&format!(r#"{{"kernel": "k", "command": {command}}}"#));
        assert!(text.starts_with(expected) && text.contains("\n  hint: "), "{text}");
    }
}

#[test]
fn the_agent_is_told_of_changes_of_a_system_and_of_the_network() {
    let text = r#"{"kernel": "k", "command": {"argv": ["true"], "root": {"image": "/r.img"}, "export_changes": "/c.tar",
                   "systemd": true}, "devices": [{"kind": "net", "name": "n", "spec": {"mode": "user"}}]}"#;
    let whole = plan(text).unwrap().complete().unwrap();
    let orders = whole.command.as_ref().unwrap().orders();
    assert_eq!((orders.changes, orders.systemd), (true, true));
    // Not the disk that forgets keeps what is written, but a layer in the guest.
    assert_eq!(orders.root.unwrap().writes, agent::orders::Writes::Private);
    let (vital, _) = whole.modules(Transport::Mmio.driver());
    for module in ["overlay", "virtio_net", "virtio_blk"] {
        assert!(vital.iter().any(|driver| driver.module == module), "{module} in {vital:?}");
    }
    let interfaces = whole.interfaces().unwrap();
    assert_eq!(interfaces.len(), 1);
    assert_eq!(interfaces[0].addresses[0], ([10, 0, 2, 15].into(), 24));
    let plain =
        plan(r#"{"kernel": "k", "command": {"argv": ["true"], "root": {"image": "/r.img"}}}"#).unwrap();
    let orders = plain.command.unwrap().orders();
    assert_eq!((orders.changes, orders.systemd), (false, false));
    assert_eq!(orders.root.unwrap().writes, agent::orders::Writes::Through);
}
