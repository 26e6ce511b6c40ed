use std::sync::mpsc::channel;

use serde_json::json;

use super::*;

fn registry() -> (tempfile::TempDir, Registry) {
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("mayfly");
    fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
    (above, Registry { path })
}

fn about() -> About {
    About { pid: 7, command: vec!["true".into()], cpus: 2, ..About::default() }
}

fn names(registry: &Registry) -> Vec<String> {
    registry.list().unwrap().into_iter().map(|record| record.name).collect()
}

#[test]
fn a_vm_is_there_as_long_as_its_entry() {
    let (_above, registry) = registry();
    let entry = registry.enter("b", &about(), false, Patience::Endless).unwrap();
    let other = registry.enter("a", &about(), false, Patience::Endless).unwrap();
    assert_eq!(names(&registry), ["a", "b"]);
    let found = find(std::slice::from_ref(&registry), "b").unwrap();
    assert_eq!((&found.about, &found.state, found.lives()), (&about(), &State::Running, true));
    let told = registry.enter("b", &about(), false, Patience::Endless).err().unwrap().to_string();
    assert!(told.starts_with("call the VM b: there is a running VM of that name\n  hint: "), "{told}");
    assert!(registry.remove(&found).unwrap_err().to_string().contains("it is running"));
    drop(entry);
    assert_eq!((names(&registry), found.lives()), (vec!["a".to_owned()], false));
    drop(other);
    assert!(!registry.path.exists(), "the last one takes the place along");
    drop(registry.enter("a", &about(), false, Patience::Endless).unwrap());
    assert!(!registry.path.exists(), "and the next makes it again");
}

#[test]
fn what_a_killed_vm_has_left_is_cleared_away() {
    let (_above, registry) = registry();
    let mut entry = registry.enter("dead", &about(), true, Patience::Endless).unwrap();
    let logs = entry.logs().unwrap();
    drop(logs);
    // As `kill -9` does: the lock goes, and nothing is tidied up.
    entry.result = File::open("/dev/null").unwrap();
    std::mem::forget(entry);
    let path = registry.path.join("dead");
    assert!(path.join("stdout").exists() && path.join("control").exists());
    let _living = registry.enter("living", &about(), false, Patience::Endless).unwrap();
    assert_eq!(names(&registry), ["living"]);
    assert!(!path.exists());
    // Half of an entry, too; and a stranger's file stays.
    fs::create_dir(&path).unwrap();
    fs::write(registry.path.join("notes"), "mine").unwrap();
    registry.enter("dead", &about(), false, Patience::Endless).unwrap();
    assert_eq!(names(&registry), ["living"]);
    assert_eq!(fs::read(registry.path.join("notes")).unwrap(), b"mine");
    assert!(registry.enter("notes", &about(), false, Patience::Endless).is_err());
}

#[test]
fn what_is_no_vms_stays() {
    let (_above, registry) = registry();
    let theirs = ["photos/a.jpg", "layer/stdout/x", "mixed/control", "mixed/notes"];
    for name in theirs {
        let path = registry.path.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "theirs").unwrap();
    }
    assert!(names(&registry).is_empty());
    for name in theirs {
        assert_eq!(fs::read(registry.path.join(name)).unwrap(), b"theirs", "{name}");
        let vm = name.split_once('/').unwrap().0;
        assert!(registry.enter(vm, &about(), false, Patience::Endless).is_err(), "{name} is in the way");
        assert!(registry.path.join(name).exists(), "{name}");
    }
    // Nor does it go with an entry that it was put into.
    let mut entry = registry.enter("vm", &about(), true, Patience::Endless).unwrap();
    entry.conclude("{}").unwrap();
    drop(entry);
    let notes = registry.path.join("vm/notes");
    fs::write(&notes, "theirs").unwrap();
    let told =
        registry.remove(&find(std::slice::from_ref(&registry), "vm").unwrap()).unwrap_err().to_string();
    assert!(
        told.starts_with("remove the VM vm: ") && told.ends_with("/vm/notes is no file of a VM's"),
        "{told}"
    );
    fs::remove_file(&notes).unwrap();
    registry.remove(&find(std::slice::from_ref(&registry), "vm").unwrap()).unwrap();
    assert!(!registry.path.join("vm").exists());
}

#[test]
fn an_end_is_kept_where_it_is_to_be_and_told_to_who_waits_anyway() {
    let (_above, registry) = registry();
    for keep in [true, false] {
        let mut entry = registry.enter("vm", &about(), keep, Patience::Endless).unwrap();
        let record = find(std::slice::from_ref(&registry), "vm").unwrap();
        let (tell, told) = channel();
        let waiter = std::thread::spawn(move || tell.send(record.wait().unwrap()).unwrap());
        entry.conclude("{\"exit_code\":7}").unwrap();
        assert!(told.try_recv().is_err(), "it has said so, and lives");
        drop(entry);
        assert_eq!(told.recv().unwrap(), Some(json!({"exit_code": 7})));
        waiter.join().unwrap();
        assert_eq!(names(&registry).len(), usize::from(keep));
        if keep {
            let record = find(std::slice::from_ref(&registry), "vm").unwrap();
            assert_eq!(record.state, State::Ended(json!({"exit_code": 7})));
            assert!(!record.control().exists());
            let told = registry.enter("vm", &about(), keep, Patience::Endless).err().unwrap().to_string();
            assert!(told.contains("mayfly rm vm"), "{told}");
            registry.remove(&record).unwrap();
        }
    }
    let gone = registry.enter("vm", &about(), false, Patience::Endless).unwrap();
    let record = find(std::slice::from_ref(&registry), "vm").unwrap();
    drop(gone);
    assert_eq!(record.wait().unwrap(), None);
}

#[test]
fn who_removes_late_removes_nothing_else() {
    let (_above, registry) = registry();
    let end = || {
        let mut entry = registry.enter("vm", &about(), true, Patience::Endless).unwrap();
        entry.conclude("{}").unwrap();
    };
    end();
    let found = find(std::slice::from_ref(&registry), "vm").unwrap();
    registry.remove(&find(std::slice::from_ref(&registry), "vm").unwrap()).unwrap();
    let next = registry.enter("vm", &about(), false, Patience::Endless).unwrap();
    let told = registry.remove(&found).unwrap_err().to_string();
    assert!(told.starts_with("find the VM vm: there is none of that name"), "{told}");
    assert_eq!(names(&registry), ["vm"], "the one that runs stays");
    drop(next);
    end();
    assert!(registry.remove(&found).is_err());
    assert_eq!(names(&registry), ["vm"], "and so does what another one has left");
}

#[test]
fn who_cannot_wait_does_without() {
    let (_above, registry) = registry();
    let entry = registry.enter("a", &about(), false, Patience::Short).unwrap();
    let held = registry.lock(Patience::Endless).unwrap();
    let told = registry.enter("b", &about(), false, Patience::Short).err().unwrap().to_string();
    assert!(told.starts_with("lock the runtime directory "), "{told}");
    drop(entry);
    assert!(registry.path.join("a").exists());
    drop(held);
    assert!(names(&registry).is_empty(), "the next one clears away what it left");
}

#[test]
fn vms_are_found_in_all_places() {
    use std::os::unix::fs::PermissionsExt;
    let made = [registry(), registry(), registry()];
    let [(_, old), (_, foreign), (_, new)] = &made;
    fs::set_permissions(&foreign.path, PermissionsExt::from_mode(0o755)).unwrap();
    let places = [old, foreign, new].map(Clone::clone);
    assert!(list(&places).is_err(), "there may be one that nobody sees");
    let mut gone = old.enter("a", &about(), true, Patience::Endless).unwrap();
    gone.conclude("{}").unwrap();
    drop(gone);
    let _first = new.enter("a", &about(), false, Patience::Endless).unwrap();
    let _second = old.enter("b", &about(), false, Patience::Endless).unwrap();
    let all = list(&places).unwrap();
    assert_eq!(all.iter().map(|record| record.name.as_str()).collect::<Vec<_>>(), ["a", "a", "b"]);
    let found = find(&places, "a").unwrap();
    assert_eq!((&found.state, found.path.parent()), (&State::Running, Some(new.path.as_path())));
    let ended = all.iter().find(|record| record.state != State::Running).unwrap();
    Registry::of(ended).remove(ended).unwrap();
    assert_eq!((names(old), names(new)), (vec!["b".to_owned()], vec!["a".to_owned()]));
}

#[test]
fn names_are_short_and_plain() {
    for name in ["a", "web-1", "A.b_c", "0", &"x".repeat(NAME_MAX)] {
        check_name(name).unwrap();
    }
    for name in ["", ".", "..", "-d", "a/b", "a b", "ä", ".hidden", &"x".repeat(NAME_MAX + 1)] {
        let told = check_name(name).unwrap_err();
        assert_eq!(told.why, Why::Usage, "{name}");
    }
}

#[test]
fn those_who_come_and_go_at_once_do_not_hurt_each_other() {
    let (_above, registry) = registry();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let registry = &registry;
            scope.spawn(move || {
                for round in 0..50 {
                    let entry = registry.enter(&format!("vm-{number}"), &about(), false, Patience::Endless);
                    let entry = entry.unwrap_or_else(|fail| panic!("round {round}: {fail}"));
                    assert!(names(registry).contains(&entry.name));
                }
            });
        }
    });
    // Who could not wait on a busy host has left something to the next.
    assert!(names(&registry).is_empty());
    assert!(!registry.path.exists());
}
