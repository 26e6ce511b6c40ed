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
    assert_eq!(complaint("{}"), "find out what to boot: no kernel is named\n  hint: pass --kernel FILE");
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
