//! Kernels by package and by name, with the real binary and an apt that is a script.

mod tiny;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use self::tiny::tiny;

/// A Debian package with these files.
fn package(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, *content).unwrap();
    }
    let data = archive.into_inner().unwrap();
    let mut file = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", b"2.0\n".as_slice()), ("data.tar", &data)] {
        file.extend(format!("{name:<16}{:<32}{:<10}`\n", 0, content.len()).into_bytes());
        file.extend(content);
    }
    file
}

/// apt-get and apt-cache in one script. The lists of the machine know the flavour `known`, those of its own `fresh` too.
const APT: &str = r#"#!/bin/sh
lists=machine
while [ "$1" = -o ]; do
  case $2 in Dir::State::lists=*) lists=own ;; esac
  shift 2
done
echo "${0##*/} $lists $*" >> "$HOME/log"
for word; do last=$word; done
case "$1 $last $lists" in
  "depends linux-image-known "*) echo " |Depends: linux-image-6.1.0-1-known" ;;
  "depends linux-image-fresh own") echo "  Depends: linux-image-6.2.0-1-fresh" ;;
  "depends linux-image-cloud-amd64 own") echo "  Depends: linux-image-6.2.0-1-fresh" ;;
  "depends linux-image-6.1.0-1-known "*) printf '  Depends: kmod\n  Depends: linux-modules-6.1.0-1-known\n' ;;
  "depends linux-image-6.2.0-1-fresh own") echo "  Depends: kmod" ;;
  "depends linux-image-old "*) echo "  Depends: kmod" ;;
  "update "*) ;;
  "download "*)
    file=${last}_1_amd64.deb
    [ "$last $lists" != "linux-image-old machine" ] || [ "$2" = --print-uris ] || { echo "E: 404 not found" >&2; exit 100; }
    [ -e "$HOME/pool/$file" ] || exit 100
    if [ "$2" = --print-uris ]; then echo "'http://x/$file' $file 1000 SHA256:0"; else /bin/cp "$HOME/pool/$file" .; fi ;;
  *) exit 100 ;;
esac
"#;

/// A home with a pool of packages, and an apt beside it.
fn home() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let put = |path: &str, bytes: &[u8]| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let tiny = tiny();
    for release in ["6.1.0-1-known", "6.2.0-1-fresh", "old"] {
        let image = package(&[(&format!("boot/vmlinuz-{release}"), &tiny)]);
        put(&format!("pool/linux-image-{release}_1_amd64.deb"), &image);
    }
    let modules = package(&[("usr/lib/modules/6.1.0-1-known/kernel/a.ko", b"module")]);
    put("pool/linux-modules-6.1.0-1-known_1_amd64.deb", &modules);
    for name in ["apt-get", "apt-cache"] {
        put(&format!("bin/{name}"), APT.as_bytes());
        fs::set_permissions(dir.path().join("bin").join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

/// Runs mayfly with that home: exit code, standard output, standard error.
fn mayfly(home: &Path, words: &str) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mayfly"));
    command.args(words.split_ascii_whitespace()).current_dir(home).stdin(Stdio::null()).env_clear();
    let output = command.env("HOME", home).env("PATH", home.join("bin")).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The kernel in the plan of a run.
fn planned(home: &Path, words: &str) -> PathBuf {
    let (code, plan, told) = mayfly(home, &format!("run {words} --dry-run -- true"));
    assert_eq!(code, 0, "{told}");
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    plan["kernel"].as_str().unwrap().into()
}

fn log(home: &Path) -> String {
    let text = fs::read_to_string(home.join("log")).unwrap_or_default();
    let _ = fs::remove_file(home.join("log"));
    text
}

#[test]
fn a_kernel_is_pulled_once_listed_used_by_name_and_removed() {
    let home = home();
    let home = home.path();
    let name = "6.1.0-1-known\n".to_owned();
    assert_eq!(mayfly(home, "kernel pull known"), (0, name.clone(), String::new()), "quiet in a pipe");
    let did = log(home);
    assert!(did.contains("apt-get machine download -q linux-modules-6.1.0-1-known"), "{did}");
    assert!(!did.contains("update"), "{did}");
    assert_eq!(mayfly(home, "kernel pull known"), (0, name, String::new()));
    assert!(!log(home).contains("download -q"), "it is there");

    let (code, list, _) = mayfly(home, "kernel list --json");
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let first = &list["kernels"][0];
    assert_eq!((code, &first["name"], &first["origin"]), (0, &"6.1.0-1-known".into(), &"pulled".into()));
    assert_eq!(first["package"], "linux-image-6.1.0-1-known_1_amd64.deb");
    let image = planned(home, "--kernel 6.1.0-1-known");
    assert_eq!(image, Path::new(first["image"].as_str().unwrap()));
    assert!(image.ends_with("boot/vmlinuz-6.1.0-1-known"));
    let top = image.ancestors().nth(2).unwrap();
    assert_eq!(fs::read(top.join("lib/modules/6.1.0-1-known/kernel/a.ko")).unwrap(), b"module");
    let (code, told, _) = mayfly(home, "inspect 6.1.0-1-known");
    assert!(code == 0 && told.contains("ELF vmlinux"), "{told}");
    assert!(mayfly(home, "kernel list").1.starts_with("NAME "));

    let (code, gone, _) = mayfly(home, "kernel rm 6.1.0-1-known");
    assert!(code == 0 && gone.starts_with("6.1.0-1-known."), "{gone}");
    assert!(!top.exists());
    let (code, _, told) = mayfly(home, "kernel rm 6.1.0-1-known");
    assert!(
        code == 125 && told.starts_with("error: remove kernel 6.1.0-1-known: no such kernel is kept\n"),
        "{told}"
    );
}

#[test]
fn lists_that_know_nothing_or_too_little_are_fetched_anew_and_leave_nothing() {
    let home = home();
    let home = home.path();
    for (name, release) in [("fresh", "6.2.0-1-fresh\n"), ("old", "old\n")] {
        let (code, said, told) = mayfly(home, &format!("kernel pull {name}"));
        assert_eq!((code, said.as_str(), told.as_str()), (0, release, ""));
        assert!(log(home).contains("apt-get own update"), "{name}");
    }
    let kept: Vec<_> =
        fs::read_dir(home.join(".cache/mayfly/kernels")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(kept.len(), 3, "two kernels and the lock: {kept:?}");
    let (code, _, told) = mayfly(home, "kernel pull nonsense");
    assert_eq!(code, 125);
    assert!(
        told.starts_with("error: pull a kernel: apt knows no package linux-image-nonsense\n  hint: "),
        "{told}"
    );
    assert_eq!(mayfly(home, "kernel pull ../x").0, 2);
}

#[test]
fn without_apt_it_says_what_else_to_do() {
    let home = home();
    fs::remove_file(home.path().join("bin/apt-cache")).unwrap();
    let (code, _, told) = mayfly(home.path(), "kernel pull");
    assert_eq!(code, 125);
    assert!(told.starts_with("error: pull a kernel: apt-cache is not installed"), "{told}");
    assert!(told.contains("\n  hint: pass --kernel FILE"), "{told}");
    assert_eq!(mayfly(home.path(), "kernel").0, 2);
}

#[test]
fn a_machine_without_a_kernel_fetches_one_with_a_message() {
    let home = home();
    let home = home.path();
    let readable = |dir: &str| {
        fs::read_dir(dir).into_iter().flatten().flatten().any(|entry| {
            let name = entry.file_name().into_string().unwrap_or_default();
            let image = if dir == "/boot" { entry.path() } else { entry.path().join("vmlinuz") };
            (dir != "/boot" || name.starts_with("vmlinuz-")) && fs::File::open(image).is_ok()
        })
    };
    if readable("/boot") || readable("/lib/modules") {
        println!("skipped: this machine has a kernel of its own");
        return;
    }
    let (code, _, told) = mayfly(home, "run --dry-run -- uname -a");
    assert_eq!(code, 0, "{told}");
    let kept = home.join(".cache/mayfly/kernels").display().to_string();
    assert_eq!(
        told,
        format!(
            "note: no kernel of this machine can be read; fetching linux-image-6.2.0-1-fresh (1 MB), which is kept in {kept}\n"
        )
    );
    log(home);
    assert!(planned(home, "").ends_with("boot/vmlinuz-6.2.0-1-fresh"));
    assert_eq!(log(home), "", "the one that was pulled is taken, and nobody asked");
    mayfly(home, "kernel rm 6.2.0-1-fresh");
    fs::remove_file(home.join("bin/apt-get")).unwrap();
    let (code, _, told) = mayfly(home, "run -- true");
    assert_eq!(code, 125);
    assert!(told.ends_with("\n  hint: fetch one: mayfly kernel pull; or pass --kernel FILE\n"), "{told}");
}

#[test]
fn a_package_is_a_kernel() {
    let home = home();
    let home = home.path();
    let image = planned(home, "--kernel pool/linux-image-6.1.0-1-known_1_amd64.deb");
    assert!(image.starts_with(home.join(".cache/mayfly/kernels")), "{}", image.display());
    let modules = image.ancestors().nth(2).unwrap().join("lib/modules/6.1.0-1-known/kernel/a.ko");
    assert!(modules.is_file(), "of the package that lies beside it");
    assert_eq!(planned(home, "--kernel ./pool/linux-image-6.1.0-1-known_1_amd64.deb"), image);
    assert_eq!(planned(home, "--kernel 6.1.0-1-known"), image);
    let refused = |words: &str| {
        let (code, _, told) = mayfly(home, &format!("run --kernel {words} -- true"));
        assert_eq!(code, 125, "{told}");
        told
    };
    let told = refused("pool/linux-modules-6.1.0-1-known_1_amd64.deb");
    assert!(told.contains("it has modules only\n  hint: pass the package with the image"), "{told}");
    fs::write(home.join("text.deb"), "text").unwrap();
    let told = refused("text.deb");
    assert!(told.starts_with("error: unpack text.deb: it is no Debian package\n  hint: "), "{told}");
    assert!(
        refused("missing.deb").starts_with("error: open kernel missing.deb: No such file or directory\n")
    );
    fs::write(home.join("k.rpm"), "").unwrap();
    assert!(refused("k.rpm").contains("\n  hint: bsdtar -xf k.rpm or rpm2cpio"));
    fs::copy(home.join("pool/linux-image-old_1_amd64.deb"), home.join("nameless")).unwrap();
    assert!(
        refused("nameless --accel emulated")
            .contains("it is a Debian package, whose name has to end with .deb")
    );
}
