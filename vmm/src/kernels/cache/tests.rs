use std::sync::Barrier;

use super::super::deb::tests::package;
use super::*;

fn place() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("cache/kernels"));
    (dir, cache)
}

fn put_package(dir: &Path, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, package(files)).unwrap();
    path
}

#[test]
fn a_package_is_unpacked_once_and_found_by_its_content() {
    let (dir, cache) = place();
    assert!(cache.kernels().is_empty());
    let files: [(&str, &[u8]); 2] = [("boot/vmlinuz-6.1", b"kernel"), ("lib/modules/6.1/modules.order", b"")];
    let path = put_package(dir.path(), "a.deb", &files);
    let kept = cache.take(&path).unwrap();
    assert_eq!((kept.release.as_str(), kept.pulled), ("6.1", false));
    assert_eq!(fs::read(kept.image()).unwrap(), b"kernel");
    assert!(kept.dir.join("lib/modules/6.1/modules.order").is_file());
    // A mark that a second unpacking would lose.
    fs::write(kept.dir.join("mark"), "").unwrap();
    assert_eq!(cache.take(&path).unwrap(), kept);
    let copy = put_package(dir.path(), "copy.deb", &files);
    assert_eq!(cache.take(&copy).unwrap(), kept, "the same package elsewhere");
    assert!(kept.dir.join("mark").is_file());
    let other = put_package(dir.path(), "a.deb", &[("boot/vmlinuz-6.1", b"another")]);
    let other = cache.take(&other).unwrap();
    assert_ne!(other.name, kept.name);
    assert_eq!(fs::read(other.image()).unwrap(), b"another", "the file has changed");
    assert_eq!(cache.kernels().len(), 2);

    assert_eq!(cache.remove(&other.name).unwrap(), [other]);
    assert_eq!(cache.named("6.1").unwrap(), kept);
    assert_eq!(cache.remove("6.1").unwrap().len(), 1);
    assert!(cache.kernels().is_empty() && !kept.dir.exists());
    let told = cache.remove("6.1").unwrap_err().to_string();
    assert!(
        told.starts_with("remove kernel 6.1: no such kernel is kept\n  hint: there is none in "),
        "{told}"
    );
    assert_eq!(cache.take(&copy).unwrap().release, "6.1", "and comes again");
}

#[test]
fn what_was_pulled_comes_first_and_stays_pulled() {
    let (dir, cache) = place();
    let given = put_package(dir.path(), "given.deb", &[("boot/vmlinuz-6.9", b"given")]);
    let pulled = put_package(dir.path(), "pulled.deb", &[("boot/vmlinuz-6.9", b"pulled")]);
    let given = cache.take(&given).unwrap();
    let kept = cache.keep(&Package { image: pulled.clone(), modules: Vec::new(), pulled: true }).unwrap();
    assert!(kept.pulled && !given.pulled);
    assert_eq!(cache.named("6.9").unwrap(), kept);
    assert_eq!(cache.named(&given.name).unwrap(), given);
    assert_eq!(cache.take(&pulled).unwrap(), kept, "given as a file, it is still the one that was pulled");
    let newer = put_package(dir.path(), "newer.deb", &[("boot/vmlinuz-6.10", b"n")]);
    cache.take(&newer).unwrap();
    let releases: Vec<_> = cache.kernels().into_iter().map(|kept| kept.release).collect();
    assert_eq!(releases, ["6.10", "6.9", "6.9"], "the newest first");
}

#[test]
fn several_at_once_unpack_it_once() {
    let (dir, cache) = place();
    let path = put_package(dir.path(), "a.deb", &[("boot/vmlinuz-6.1", &[7; 1 << 20])]);
    let barrier = Barrier::new(4);
    let kept: Vec<Kept> = std::thread::scope(|scope| {
        let run = || {
            barrier.wait();
            cache.take(&path).unwrap()
        };
        let all: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(kept.iter().all(|one| *one == kept[0]));
    assert_eq!(cache.kernels().len(), 1);
    assert_eq!(fs::metadata(kept[0].image()).unwrap().len(), 1 << 20);
}

#[test]
fn what_was_left_half_done_is_made_anew() {
    let (dir, cache) = place();
    let path = put_package(dir.path(), "a.deb", &[("boot/vmlinuz-6.1", b"k")]);
    fs::create_dir_all(cache.dir().join("new/boot")).unwrap();
    let kept = cache.take(&path).unwrap();
    assert!(!cache.dir().join("new").exists());
    // Its description is the last to be made and the first to go.
    fs::remove_file(kept.dir.join("about.json")).unwrap();
    assert!(cache.kernels().is_empty());
    assert_eq!(cache.take(&path).unwrap(), kept);
    fs::remove_file(kept.image()).unwrap();
    assert!(cache.take(&path).is_ok(), "told by the run that wants it");
    let left = cache.dir().join("fetch-0");
    fs::create_dir(&left).unwrap();
    // One of a process that is not seen from here, under our number.
    let others = cache.dir().join(format!("fetch-{}-0", std::process::id()));
    fs::create_dir(&others).unwrap();
    let lives = File::open(&others).unwrap();
    flock(&lives, FlockOperation::LockExclusive).unwrap();
    let seen = cache
        .with_scratch(|dir| {
            let inner = cache.with_scratch(|other| Ok(other.to_owned())).unwrap();
            assert!(inner != dir && !inner.exists());
            Ok(dir.is_dir().then(|| dir.to_owned()))
        })
        .unwrap()
        .unwrap();
    assert!(!left.exists() && !seen.exists(), "nobody has a lock on it");
    assert!(others.is_dir() && seen != others, "somebody has");
}

#[test]
fn only_absolute_paths_say_where_the_cache_is() {
    let path = |text: &str| Some(PathBuf::from(text));
    for (xdg, home, wanted) in [
        (path("/c"), path("/h"), path("/c/mayfly")),
        (path("c"), path("/h"), path("/h/.cache/mayfly")),
        (path(""), path("/h"), path("/h/.cache/mayfly")),
        (None, path("/h"), path("/h/.cache/mayfly")),
        (path("c"), path("h"), None),
        (None, path(""), None),
        (None, None, None),
    ] {
        assert_eq!(home_of(xdg.clone(), home.clone()), wanted, "{xdg:?} {home:?}");
    }
}

#[test]
fn packages_without_a_kernel_are_refused_and_leave_nothing() {
    let (dir, cache) = place();
    let modules = put_package(dir.path(), "m.deb", &[("lib/modules/6.1/kernel/a.ko", b"m")]);
    let told = cache.take(&modules).unwrap_err().to_string();
    assert!(told.contains("it has modules only\n  hint: pass the package with the image"), "{told}");
    let other = put_package(dir.path(), "o.deb", &[("usr/bin/x", b"m")]);
    assert!(cache.take(&other).unwrap_err().summary().ends_with("it holds no boot/vmlinuz-VERSION"));
    let names: Vec<_> = fs::read_dir(cache.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["lock"]);

    let image = put_package(dir.path(), "linux-image-6.1_1_amd64.deb", &[("boot/vmlinuz-6.1", b"k")]);
    put_package(dir.path(), "linux-modules-6.1_1_amd64.deb", &[("lib/modules/6.1/kernel/a.ko", b"m")]);
    let kept = cache.take(&image).unwrap();
    assert_eq!(fs::read(kept.dir.join("lib/modules/6.1/kernel/a.ko")).unwrap(), b"m");
}

#[test]
fn a_cache_that_cannot_be_written_is_told_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = put_package(dir.path(), "a.deb", &[("boot/vmlinuz-6.1", b"k")]);
    fs::write(dir.path().join("file"), "").unwrap();
    let fail = Cache::at(dir.path().join("file/kernels")).take(&path).unwrap_err();
    assert_eq!(fail.remedy(), Some(ELSEWHERE), "{fail}");
    let gone = Cache::at(dir.path().join("kernels")).take(&dir.path().join("none.deb")).unwrap_err();
    assert!(gone.summary().ends_with("none.deb: No such file or directory"), "{gone}");
}
