//! The house itself is under test: its floors, its rooms, its sizes and its names. And each rule can fail.

use std::path::Path;
use std::process::Command;

use tests::house::{Source, Violation, names, panics, rations, rooms, root, size, sources, walls};

fn demand(rule: &str, violations: &[Violation]) {
    let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
    assert!(lines.is_empty(), "{rule}: {} places\n{}", lines.len(), lines.join("\n"));
}

/// All Rust of the tree, checked by `rule` where `applies`.
fn demand_of_rust(rule: &str, applies: impl Fn(&Source) -> bool, check: impl Fn(&Source) -> Vec<Violation>) {
    let sources: Vec<Source> = sources(&root()).into_iter().filter(|s| s.is_rust() && applies(s)).collect();
    assert!(!sources.is_empty(), "{rule}: no file to look at under {}", root().display());
    demand(rule, &sources.iter().flat_map(check).collect::<Vec<_>>());
}

#[test]
fn crates_stand_on_lower_floors_only() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("run cargo metadata");
    let metadata = serde_json::from_slice(&output.stdout).expect("read what cargo metadata says");
    demand("floors", &walls::check(&metadata, &root()));
}

#[test]
fn modules_make_no_knots() {
    let sources: Vec<Source> = sources(&root()).into_iter().filter(Source::is_rust).collect();
    let roots: Vec<&Path> =
        sources.iter().filter(|s| is_crate_root(s)).filter_map(|s| s.path.parent()).collect();
    assert!(roots.len() >= 6, "found only {roots:?}");
    demand("no knots", &roots.iter().flat_map(|src| walls::check_modules(src, &sources)).collect::<Vec<_>>());
}

fn is_crate_root(source: &Source) -> bool {
    source.path.ends_with("src/lib.rs") || source.path.ends_with("src/main.rs")
}

#[test]
fn unsafe_stays_in_its_rooms() {
    demand_of_rust("rooms", |_| true, rooms::check);
    demand_of_rust("crates without a room forbid unsafe", is_crate_root, rooms::check_root);
}

#[test]
fn files_and_functions_are_short_enough_to_read() {
    demand_of_rust("size", |_| true, size::check);
}

#[test]
fn a_guest_cannot_panic_a_device() {
    demand_of_rust("no panics", |s| s.path.starts_with("devices/src") && !s.test, panics::check);
}

#[test]
fn a_guest_cannot_fill_the_log() {
    // All of it: what is told once in a machine's life is told as often as a guest resets the machine.
    demand_of_rust("rations", |s| s.path.starts_with("devices/src"), rations::check);
}

#[test]
fn nothing_above_the_devices_names_one() {
    let list = Source::new("", &std::fs::read_to_string(root().join("devices/src/catalog.rs")).unwrap());
    let catalogue = names::catalogue(&list);
    assert!(!catalogue.is_empty(), "the catalogue of devices is empty, or is not written catalog! {{ ... }}");
    demand_of_rust(
        "the list is read",
        |s| s.path.starts_with("vmm/src") && !s.test,
        |s| names::check_devices(s, &catalogue),
    );
}

#[test]
fn names_say_what_is_there() {
    demand("paths", &sources(&root()).iter().flat_map(names::check_path).collect::<Vec<_>>());
    demand_of_rust("modules", |_| true, names::check_modules);
}

#[test]
fn nothing_names_the_place_where_it_was_written() {
    demand("places", &sources(&root()).iter().flat_map(names::check_place).collect::<Vec<_>>());
}

/// The lines on which a rule finds something in `text`.
const NONE: [usize; 0] = [];

fn lines(check: impl Fn(&Source) -> Vec<Violation>, path: &str, text: &str) -> Vec<usize> {
    check(&Source::new(path, text)).iter().map(|violation| violation.line).collect()
}

#[test]
fn the_rule_of_floors_can_fail() {
    let metadata = serde_json::json!({"packages": [
        {"name": "devices", "manifest_path": "/t/devices/Cargo.toml", "dependencies": [
            {"name": "vmm", "path": "/t/vmm"}, {"name": "kvm-ioctls", "path": null}, {"name": "base", "path": "/t/b"}]},
        {"name": "arch", "manifest_path": "/t/arch/Cargo.toml", "dependencies": [
            {"name": "kvm-bindings", "path": null}, {"name": "base", "path": "/t/b"}]},
        {"name": "attic", "manifest_path": "/t/attic/Cargo.toml", "dependencies": []},
    ]});
    let said: Vec<String> =
        walls::check(&metadata, Path::new("/t")).iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 4, "{said:#?}");
    assert!(said[0].starts_with("devices/Cargo.toml:0: devices must not stand on vmm"), "{}", said[0]);
    assert!(said[1].contains("must not know kvm-ioctls"), "{}", said[1]);
    assert!(said[2].contains("arch must not stand on base"), "{}", said[2]);
    assert!(said[3].contains("attic has no floor"), "{}", said[3]);
}

#[test]
fn the_rule_of_knots_can_fail() {
    let ring: Vec<Source> = ["a", "b", "c", "d", "e"]
        .windows(2)
        .map(|pair| Source::new(&format!("x/src/{}.rs", pair[0]), &format!("\nuse crate::{}::X;", pair[1])))
        .collect();
    let knots = |back: &str| {
        let mut files = ring.clone();
        files.push(Source::new("x/src/e/mod.rs", back));
        walls::check_modules(Path::new("x/src"), &files)
    };
    assert_eq!(knots("use crate::b::{C, D};"), [], "four modules may be one thing");
    assert_eq!(knots("#[cfg(test)] mod tests { use crate::a::A; }"), [], "tests may look anywhere");
    for back in ["use crate::{a::A, Fail};", "fn f() { crate::a::go() }", "use crate::a;"] {
        let found = knots(back);
        assert!(found.len() == 1 && found[0].what.contains("a, b, c, d, e"), "{back}: {found:#?}");
        assert_eq!((found[0].file.as_path(), found[0].line), (Path::new("x/src/a.rs"), 2));
    }
}

#[test]
fn the_rule_of_rooms_can_fail() {
    let text = "fn f() {\n  m!(unsafe { g() });\n}\n#[allow(unsafe_code)]\nmod m;\n#![forbid(unsafe_code)]\n";
    assert_eq!(lines(rooms::check, "vmm/src/machine.rs", text), [2, 4]);
    assert_eq!(lines(rooms::check, "vmm/src/hv/kvm.rs", text), NONE);
    assert_eq!(lines(rooms::check, "vmm/src/hv/kvm/vm.rs", text), NONE);
    assert_eq!(lines(rooms::check, "vmm/src/hv/kvmish.rs", text), [2, 4]);
    assert_eq!(lines(rooms::check_root, "boot/src/lib.rs", "//! x"), [1]);
    assert_eq!(lines(rooms::check_root, "boot/src/lib.rs", "#![forbid(unsafe_code)]"), NONE);
    assert_eq!(lines(rooms::check_root, "devices/base/src/lib.rs", "//! x"), NONE);
    assert_eq!(lines(rooms::check_root, "resources/agent/src/main.rs", "//! x"), [1]);
    assert_eq!(lines(rooms::check_root, "vmm/src/main.rs", "//! x"), NONE);
    let door = "#[allow(unsafe_code)]\n#[unsafe(no_mangle)]\nfn main() {}\n";
    assert_eq!(lines(rooms::check, "vmm/src/main.rs", door), NONE);
    assert_eq!(lines(rooms::check, "vmm/src/main.rs", &format!("{door}unsafe fn f() {{}}")), [1, 2, 4]);
    assert_eq!(lines(rooms::check, "vmm/src/main/x.rs", door), [1, 2]);
}

#[test]
fn the_rule_of_sizes_can_fail() {
    let long = format!("//! x\nimpl X {{\nfn f() {{\n{}}}\n}}\n", "g();\n".repeat(size::FUNCTION - 2));
    assert_eq!(lines(size::check, "a/src/b.rs", &long), [3]);
    assert_eq!(lines(size::check, "a/src/b.rs", &long.replacen("g();\n", "", 1)), NONE);
    assert_eq!(
        lines(size::check, "a/src/b.rs", &format!("//! x\n{}", "\n".repeat(size::FILE))),
        [size::FILE + 1]
    );
    assert_eq!(lines(size::check, "a/src/b.rs", "mod x;"), [1]);
}

#[test]
fn the_rule_of_panics_can_fail() {
    let text = "
        fn f(a: &[u8]) -> u8 {
            a[0];
            a.first().unwrap();
            b.expect(\"x\");
            panic!(\"no\");
            log!(\"{}\", a[1]);
            log!(\"{}\", g().unwrap());
            let [x, y] = [1, 2]; vec![1]; for _ in [1] {} a.unwrap_or(0); a.get(0)?; Vec::<[u8; 2]>::new();
            m!(return [1], [2], &[3], x = [4]);
            match x { _ => unreachable!() }
        }
        const FINE: u8 = TABLE[0];
        #[test] fn t() { a[0]; }
        #[cfg(test)] mod tests { fn g() { a.unwrap(); } }
        #[cfg(not(test))] mod other { fn g() { a.unwrap(); } }
    ";
    assert_eq!(lines(panics::check, "devices/src/x.rs", text), [3, 4, 5, 6, 7, 8, 11, 16]);
}

#[test]
fn the_rule_of_rations_can_fail() {
    let text = "fn f() {
        log::warn!(target: \"guest\", \"{x}\");
        log::warn!(\"{x}\");
        if y { ::log::error!(target: \"machine\", \"{x}\") }
        say!(\"{x}\");
    }";
    assert_eq!(lines(rations::check, "devices/src/virtio/x.rs", text), [3, 4]);
}

#[test]
fn the_rules_of_names_can_fail() {
    let list = Source::new("", "macro_rules! catalog { () => {} }\ncatalog! { blk rng }");
    let catalogue = names::catalogue(&list);
    assert_eq!(catalogue, ["blk", "rng"]);
    let text =
        "/// A blk.\nfn f(kinds: u8) {\n find(\"blk\");\n say(\"the blk device\");\n devices::kinds::x();
 x.rng;\n rng::X;\n}\nfn make_blk() {}\nstruct RngSpec;
        #[cfg(test)] mod tests { fn g() { find(\"blk\") } }";
    assert_eq!(lines(|s| names::check_devices(s, &catalogue), "vmm/src/x.rs", text), [3, 5, 7, 9, 10]);
    assert_eq!(lines(names::check_path, "vmm/src/vm_manager.rs", ""), [0]);
    assert_eq!(lines(names::check_path, "vmm/src/utils/x.rs", ""), [0]);
    assert_eq!(lines(names::check_path, "vmm/src/utility.rs", ""), NONE);
    assert_eq!(lines(names::check_modules, "vmm/src/x.rs", "mod a {\n mod disk_helpers {}\n}"), [2]);
    let place = concat!("see\n cd /wo", "rk/main\n my/wo", "rk/dir");
    assert_eq!(lines(names::check_place, "README.md", place), [2]);
}
