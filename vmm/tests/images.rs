//! Container images on the command line: the real binary with a cache of its own.

use std::path::Path;
use std::process::{Command, Output};

/// The archive of a root file system, packed as tools pack it.
fn archive(dir: &Path, name: &str) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o755);
    tar.append_data(&mut header, "bin/tool", &b"tool"[..]).unwrap();
    // Of the same content, so that only the name tells two of them apart.
    tar.append_data(&mut header, format!("etc/{name}"), &b"tool"[..]).unwrap();
    std::fs::write(dir.join(name), tar.into_inner().unwrap()).unwrap();
}

fn mayfly(dir: &Path, words: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mayfly"));
    command
        .args(words.split_whitespace())
        .current_dir(dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .output()
        .unwrap()
}

/// What it prints, if it succeeds.
fn says(dir: &Path, words: &str) -> String {
    let output = mayfly(dir, words);
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What it complains of, and its exit code.
fn complains(dir: &Path, words: &str) -> (String, Option<i32>) {
    let output = mayfly(dir, words);
    let text = String::from_utf8_lossy(&output.stderr).replace(&dir.display().to_string(), "DIR");
    (text, output.status.code())
}

#[test]
fn a_plan_of_an_image_is_whole_and_pins_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    archive(dir, "root.tar");
    std::fs::write(dir.join("k"), "no kernel").unwrap();
    let words = "run --kernel k --image root.tar --entrypoint /bin/tool -e A=1 -u 5:6 --hostname box --dry-run -- x y";
    let text = says(dir, words);
    let plan: serde_json::Value = serde_json::from_str(&text).unwrap();
    let command = &plan["command"];
    assert_eq!(command["argv"], serde_json::json!(["/bin/tool", "x", "y"]));
    assert_eq!((&command["user"], &command["workdir"]), (&"5:6".into(), &"/".into()));
    let env: Vec<_> = command["env"].as_array().unwrap().iter().filter_map(|word| word.as_str()).collect();
    assert!(env[0].starts_with("PATH=/usr/local/sbin:") && env[1..] == ["HOSTNAME=box", "A=1"], "{env:?}");
    let container = &command["root"]["container"];
    assert_eq!(container["image"], dir.join("root.tar").display().to_string());
    assert!(!dir.join("cache/mayfly/images").exists(), "a plan unpacks nothing");
    // The plan is the same when it is read again, until the image is another.
    std::fs::write(dir.join("plan.json"), &text).unwrap();
    let again: serde_json::Value =
        serde_json::from_str(&says(dir, "run --plan plan.json --dry-run")).unwrap();
    assert_eq!((&again["command"], &again["devices"]), (command, &plan["devices"]));
    archive(dir, "other.tar");
    std::fs::rename(dir.join("other.tar"), dir.join("root.tar")).unwrap();
    let (told, code) = complains(dir, "run --plan plan.json --dry-run");
    assert!(told.starts_with("error: use image DIR/root.tar: its digest is sha256:"), "{told}");
    assert!(
        told.contains("\n  hint: take `digest` out of the plan") && code == Some(125),
        "{code:?}: {told}"
    );
    // One that leaves all out is the image's, which says nothing here.
    std::fs::write(
        dir.join("bare.json"),
        r#"{"kernel": "k", "command": {"root": {"container": {"image": "root.tar"}}}}"#,
    )
    .unwrap();
    let (told, code) = complains(dir, "run --plan bare.json --dry-run");
    assert!(told.contains("it has neither an entrypoint nor a command") && code == Some(2), "{told}");
    assert!(says(dir, "run --plan bare.json --dry-run -- ls").contains("\"ls\""));
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    archive(dir.path(), "root.tar");
    for (words, wanted) in [
        (
            "run --kernel k --root / --image root.tar -- x",
            "'--root <DIR|IMAGE>' cannot be used with '--image <PATH[#NAME]>'",
        ),
        (
            "run --kernel k --entrypoint sh -- x",
            "error: apply --entrypoint: there is no image it could be for",
        ),
        (
            "run --kernel k --image root.tar#a -- x",
            "it is the archive of a root file system, which has no name",
        ),
        (
            "run --kernel k --image none.tar -- x",
            "error: find image none.tar: there is no such file or directory",
        ),
        ("run --kernel k --image= -- x", "error: find an image: it has no name"),
        ("image rm", "error: remove images: none is named"),
        ("image rm none", "error: remove image none: there is no such image in the cache"),
        ("image load none", "error: find image none: "),
        ("image rm --all --unused 1h", "cannot be used with"),
    ] {
        let (told, code) = complains(dir.path(), words);
        assert!(told.contains(wanted) && code != Some(0), "{words}: {code:?} {told}");
    }
}

#[test]
fn the_cache_is_listed_filled_and_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ["a.tar", "b.tar", "c.tar"].iter().for_each(|name| archive(dir, name));
    assert_eq!(says(dir, "image list").lines().count(), 1, "there is nothing yet");
    let loaded = says(dir, "image load a.tar b.tar c.tar");
    assert_eq!(loaded.lines().map(|line| &line[73..]).collect::<Vec<_>>(), ["a.tar", "b.tar", "c.tar"]);
    let again: serde_json::Value = serde_json::from_str(&says(dir, "image load a.tar --json")).unwrap();
    assert_eq!(again[0]["names"], serde_json::json!(["a.tar"]));
    let list = says(dir, "image ls");
    assert!(list.contains("\nb.tar ") && list.contains("just now"), "{list}");
    let machine = std::fs::File::open(
        dir.join(format!("cache/mayfly/images/{}/root.ext4", loaded[..71].replace(':', "-"))),
    )
    .unwrap();
    machine.lock_shared().unwrap();
    let (told, code) = complains(dir, "image rm a.tar");
    assert!(told.starts_with("error: remove image a.tar: a machine runs on it") && code != Some(0), "{told}");
    assert!(says(dir, "image rm b.tar b.tar").contains("  b.tar\n"));
    assert_eq!(says(dir, "image rm --unused 1h"), "");
    assert!(says(dir, "image rm --all").contains("  c.tar\n"));
    let left: serde_json::Value = serde_json::from_str(&says(dir, "image list --json")).unwrap();
    assert_eq!((left[0]["running"].as_bool(), left.as_array().unwrap().len()), (Some(true), 1));
    drop(machine);
    assert!(says(dir, "image rm --all").contains("  a.tar\n"));
}
