//! Kernels that are found by a path, and whether they fit.

use super::*;

#[test]
fn names_a_path_that_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().display();
    let text = |path: &Path| Kernel::open(path).unwrap_err().summary();
    assert_eq!(text(dir.path()), format!("open kernel {name}: it is a directory"));
    assert_eq!(text(&dir.path().join("no")), format!("open kernel {name}/no: No such file or directory"));
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    assert_eq!(text(&fifo), format!("open kernel {name}/fifo: it is a pipe, not a regular file"));
    assert_eq!(text(Path::new("/dev/null")), "open kernel /dev/null: it is not a regular file");
}

#[test]
fn finds_the_kernel_of_a_build_tree() {
    let dir = tempfile::tempdir().unwrap();
    let fail = Kernel::find(dir.path()).unwrap_err();
    assert!(fail.summary().contains("it holds none of vmlinux, arch/x86/boot/bzImage"), "{fail}");
    let (vmlinux, vmlinuz) = (dir.path().join("vmlinux"), dir.path().join("vmlinuz"));
    let boot = dir.path().join("arch/x86/boot");
    fs::create_dir_all(&boot).unwrap();
    let found = || Kernel::find(dir.path()).map(|kernel| kernel.path().unwrap().to_owned());
    fs::write(&vmlinuz, plain_elf()).unwrap();
    assert_eq!(found().unwrap(), vmlinuz);
    fs::write(boot.join("bzImage"), bzimage(&pack(Compression::Gzip, &plain_elf()))).unwrap();
    assert_eq!(found().unwrap(), boot.join("bzImage"));
    fs::write(&vmlinux, plain_elf()).unwrap();
    assert_eq!(found().unwrap(), vmlinux);
    assert!(Kernel::find(dir.path()).unwrap().passed_over().is_none());
    // What has the name of a kernel and is none does not stand in the way of one; it is told, though.
    fs::write(&vmlinux, "a text\n").unwrap();
    assert_eq!(found().unwrap(), boot.join("bzImage"));
    let told = Kernel::find(dir.path()).unwrap().passed_over().unwrap().summary();
    assert!(told.ends_with("/vmlinux: it is a text file, not a kernel image"), "{told}");
    for place in [&vmlinuz, &boot.join("bzImage")] {
        fs::write(place, "").unwrap();
    }
    assert!(found().unwrap_err().summary().ends_with("/vmlinux: it is a text file, not a kernel image"));
}

#[test]
fn says_what_memory_would_do_for_kernel_and_initrd_together() {
    let linux = Kernel::parse("k", bzimage(&pack(Compression::Gzip, &plain_elf()))).unwrap();
    let end = linux.end().unwrap();
    let parts = [crate::initrd::Part::Bytes(vec![0; 5 << 20])];
    let fail = crate::check_memory(&linux, &parts, end + MIB).unwrap_err();
    let enough = (end + (5 << 20) * 4 + crate::WORKSPACE).next_multiple_of(32 * MIB) / MIB;
    assert_eq!(fail.remedy(), Some(format!("pass --memory {enough}M or more").as_str()), "{fail}");
    crate::check_memory(&linux, &parts, enough * MIB).unwrap();
    // A guest that is no Linux has its memory to itself.
    let bare = Kernel::parse("k", plain_elf()).unwrap();
    let fail = crate::check_memory(&bare, &[], MIB).unwrap_err();
    assert_eq!(
        fail.to_string(),
        "load kernel k: it needs 2 MiB of memory, the guest has 1 MiB\n  hint: pass --memory 2M or more"
    );
    crate::check_memory(&bare, &[], 2 * MIB).unwrap();
}
