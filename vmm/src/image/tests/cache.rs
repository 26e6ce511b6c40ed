//! The cache: filled once, whole or not at all.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::sources::{Layout, gzip, layer};
use super::*;
use crate::image::cache::Look;
use crate::image::{Cache, Kept, find, in_cache};

fn unpack(path: &Path, cache: &Cache) -> Kept {
    find(path.to_str().unwrap(), cache).unwrap().unpack().unwrap()
}

/// The number, the times and the size of a file: what a second run must not change.
fn look(path: &Path) -> (u64, i64, i64, u64) {
    let found = std::fs::metadata(path).unwrap();
    (found.ino(), found.mtime_nsec(), found.ctime_nsec(), found.blocks())
}

fn age(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
}

#[test]
fn a_second_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(&dir.path().join("cache"));
    let layout = Layout::default().named("a:1", &[layer("a")], &json!({}));
    let path = layout.write(&dir.path().join("layout"));
    let first = unpack(&path, &cache);
    let root = cache.root(first.id);
    let before = look(&root);
    assert_eq!(unpack(&path, &cache), first);
    // The same image from elsewhere.
    let again = layout.write(&dir.path().join("again"));
    assert_eq!(unpack(&again, &cache), first);
    assert_eq!(look(&root), before);
    assert_eq!(cache.all().len(), 1);
    assert!(cache.size(first.id) < 1 << 20, "{} bytes", cache.size(first.id));
    // By its name, without its source, and by its digest.
    std::fs::remove_dir_all(&path).unwrap();
    for name in ["a:1", "docker.io/library/a:1", &first.id.to_string(), &first.id.hex()[..8]] {
        assert_eq!(unpack(Path::new(name), &cache), first, "{name}");
    }
}

#[test]
fn a_file_is_read_again_when_it_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(&dir.path().join("cache"));
    let path = dir.path().join("root.tar");
    std::fs::write(&path, layer("a")).unwrap();
    let first = unpack(&path, &cache);
    // It has just been written: times alone would not tell another write.
    assert_eq!(cache.recall(&path, None), None);
    std::fs::write(&path, layer("b")).unwrap();
    let second = unpack(&path, &cache);
    assert_ne!(first.id, second.id);
    // Both were called by the name of the file; the newer one is now.
    assert_eq!(in_cache("root.tar", &cache).unwrap().map(|kept| kept.id), Some(second.id));
    assert_eq!(cache.get(first.id).unwrap().names, Vec::<String>::new());
}

#[test]
fn a_file_that_changes_while_it_is_read_is_not_kept_in_mind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.tar");
    std::fs::write(&path, layer("a")).unwrap();
    let before = Look::at(&path).unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(before.is_settled(Some(before), now + 60));
    assert!(!before.is_settled(Some(before), now), "it has just been written");
    age(&path);
    let other = Look::at(&path);
    assert!(other.is_some() && !before.is_settled(other, now + 60), "its time is another");
    assert!(!before.is_settled(None, now + 60) && Look::at(dir.path()).is_none());
}

#[test]
fn what_a_killed_run_has_left_goes_and_two_at_once_make_one() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("cache");
    std::fs::create_dir_all(place.join(".new/half")).unwrap();
    std::fs::write(place.join(".new/root.ext4"), "half").unwrap();
    let path = dir.path().join("root.tar.gz");
    std::fs::write(&path, gzip(&layer("a"))).unwrap();
    let cache = Cache::at(&place);
    let all: Vec<Kept> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| unpack(&path, &cache))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(all.iter().all(|kept| kept.id == all[0].id));
    assert_eq!(cache.all().len(), 1);
    assert!(!place.join(".new").exists());
    // An image without its note, or of another time, is none.
    let note = cache.root(all[0].id).with_file_name("image.json");
    std::fs::write(&note, r#"{"look": 0, "names": [], "execution": {}}"#).unwrap();
    assert_eq!(cache.get(all[0].id), None);
    assert_eq!(unpack(&path, &cache).id, all[0].id);
    assert!(cache.get(all[0].id).is_some());
}

#[test]
fn images_are_listed_by_use_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(&dir.path().join("cache"));
    let [old, new] = ["old", "new"].map(|name| {
        let path = dir.path().join(name);
        std::fs::write(&path, layer(name)).unwrap();
        unpack(&path, &cache)
    });
    age(&cache.root(old.id).with_file_name("image.json"));
    let order: Vec<_> = cache.all().into_iter().map(|(kept, _)| kept.id).collect();
    assert_eq!(order, [new.id, old.id]);
    let machine = std::fs::File::open(cache.root(old.id)).unwrap();
    machine.lock_shared().unwrap();
    assert!(cache.is_used(old.id) && !cache.is_used(new.id));
    assert!(cache.is_running(old.id) && !cache.is_running(new.id));
    cache.remove(new.id).unwrap();
    assert_eq!(cache.all().len(), 1);
    let gone = cache.remove(new.id).unwrap_err().to_string();
    assert!(gone.starts_with(&format!("remove image {}: No such file", new.id)), "{gone}");
}

/// The root file system of an image has what its layers say, and what a program of it needs.
#[test]
fn the_root_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(&dir.path().join("cache"));
    let layers = [
        Tar::default().add(b'0', "owned", (0o4751, 1234, 5678), b"x").file("gone", "").bytes(),
        Tar::default().file(".wh.gone", "").bytes(),
    ];
    let layout = Layout::default().named("a", &layers, &json!({"WorkingDir": "/made/for/it"}));
    let kept = unpack(&layout.write(&dir.path().join("layout")), &cache);
    let root = cache.root(kept.id);
    let ask = |command: &str| {
        let asked = std::process::Command::new("debugfs").args(["-R", command]).arg(&root).output();
        asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let Ok(owned) = ask("stat /owned") else { return eprintln!("skipped: there is no debugfs") };
    assert!(owned.contains("Mode:  04751") && owned.contains("User:  1234   Group:  5678"), "{owned}");
    assert!(ask("stat /made/for/it").unwrap().contains("Type: directory"));
    assert!(ask("cat /etc/hosts").unwrap().contains("127.0.0.1\tlocalhost"));
    assert!(!ask("ls /").unwrap().contains("gone"));
}
