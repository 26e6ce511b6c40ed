//! Whole plans: placed, and looked at in guest memory.

use super::*;
use std::path::{Path, PathBuf};

fn machine() -> acpi::Machine<'static> {
    acpi::Machine {
        cpus: 1,
        nodes: &[],
        bridge: None,
        sleep_port: 0x600,
        reset_port: 0x602,
        reset_value: 1,
        ioapic_pins: 24,
        full_irqchip: false,
        rtc: true,
        generation: None,
    }
}

/// Where `resources/kernel` keeps kernels: what a variable names (an empty one names nothing), or its own place.
fn kernels(variable: Option<String>) -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target/kernels");
    variable.filter(|dir| !dir.is_empty()).map_or_else(own, PathBuf::from)
}

#[test]
fn an_empty_variable_names_no_place() {
    assert!(kernels(Some(String::new())).ends_with("target/kernels"));
    assert_eq!(kernels(Some("k".into())), PathBuf::from("k"));
}

/// Debian's kernels, those that are there.
fn debian() -> Vec<PathBuf> {
    let dir = kernels(std::env::var("MAYFLY_TEST_KERNELS").ok());
    let list = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    let files = list(dir.clone()).flat_map(|package| list(package.join("boot")));
    let found: Vec<_> =
        files.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("vmlinuz")).collect();
    if found.is_empty() {
        println!(
            "skipped: there is no kernel in {}: `resources/kernel cloud-amd64` brings one",
            dir.display()
        );
    }
    found
}

fn plan<'a>(kernel: &'a Kernel, initrd: &'a [Part], cmdline: &'a str) -> Plan<'a> {
    Plan {
        kernel,
        initrd,
        cmdline,
        protocol: Protocol::Auto,
        loading: Loading::Map,
        identity: smbios::Identity::default(),
        machine: machine(),
    }
}

/// A bare-metal guest of one instruction, at 1 MiB.
fn tiny() -> Kernel {
    Kernel::parse("tiny", tiny_bytes()).unwrap()
}

fn tiny_bytes() -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for field in [0x10_0000u64, 64, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(b"\0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x05\0\0\0");
    for field in [120u64, 0x10_0000, 0x10_0000, 1, 1, 8] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.push(0xf4);
    bytes
}

#[test]
fn places_a_whole_plan() {
    let memory = Memory::new(&arch::layout::ram(16 << 20)).unwrap();
    let kernel = tiny();
    let initrd = [Part::Bytes(b"0707".to_vec())];
    let start = place(&plan(&kernel, &initrd, "console=ttyS0"), &memory).unwrap();
    assert_eq!(start, Start::Linux64 { entry: 0x10_0000, zero_page: ZERO_PAGE });
    let byte = |at: u64| memory.ram().read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!(byte(0x10_0000), 0xf4);
    assert_eq!(byte((16 << 20) - 4096), b'0', "the initrd lies in the last page");
    let mut text = [0xee; 14];
    memory.ram().read_slice(&mut text, GuestAddress(CMDLINE)).unwrap();
    assert_eq!(&text, b"console=ttyS0\0");
    assert_eq!(byte(arch::layout::ACPI), b'R');
}

/// The command line and the first bytes of the MP table, of the kernel in the file, with a device.
fn discovered(kernel: &Kernel, cmdline: &str) -> (String, [u8; 4]) {
    let device = base::node::Node {
        name: "V000".into(),
        hid: acpi::VIRTIO_MMIO,
        uid: 0,
        ports: Vec::new(),
        memory: vec![(0xd000_0000, 0x1000)],
        irqs: vec![5],
    };
    let nodes = [device];
    let memory = Memory::new(&arch::layout::ram(16 << 20)).unwrap();
    let plan = plan(kernel, &[], cmdline);
    place(&Plan { machine: acpi::Machine { nodes: &nodes, ..plan.machine }, ..plan }, &memory).unwrap();
    let (mut text, mut table) = ([0; 256], [0; 4]);
    memory.ram().read_slice(&mut text, GuestAddress(CMDLINE)).unwrap();
    memory.ram().read_slice(&mut table, GuestAddress(arch::layout::MP_TABLE)).unwrap();
    let text = text.split(|byte| *byte == 0).next().unwrap();
    (String::from_utf8(text.to_vec()).unwrap(), table)
}

#[test]
fn a_kernel_without_acpi_gets_an_mp_table_and_words_and_another_does_not() {
    let without = ("virtio_mmio.device=4096@0xd0000000:5".to_owned(), *b"PCMP");
    assert_eq!(discovered(&tiny(), "quiet"), ("quiet".to_owned(), [0; 4]));
    assert_eq!(discovered(&tiny(), "acpi=off").0, format!("acpi=off {}", without.0));
    assert_eq!(discovered(&tiny(), "acpi=off").1, without.1);
    // In the tree it was built in.
    let tree = tempfile::tempdir().unwrap();
    std::fs::write(tree.path().join("vmlinux"), tiny_bytes()).unwrap();
    let configured = |text: &str| {
        std::fs::write(tree.path().join(".config"), text).unwrap();
        discovered(&Kernel::open(&tree.path().join("vmlinux")).unwrap(), "")
    };
    assert_eq!(configured("CONFIG_64BIT=y\n# CONFIG_ACPI is not set\n"), without);
    assert_eq!(configured("CONFIG_64BIT=y\nCONFIG_ACPI=y\n"), (String::new(), [0; 4]));
}

/// Loading runs on a thread of its own, beside the set-up of the hypervisor.
#[test]
fn places_from_another_thread() {
    let memory = Memory::new(&arch::layout::ram(16 << 20)).unwrap();
    let kernel = tiny();
    let plan = plan(&kernel, &[], "");
    let start = std::thread::scope(|scope| scope.spawn(|| place(&plan, &memory)).join().unwrap()).unwrap();
    assert!(matches!(start, Start::Linux64 { .. }));
}

#[test]
fn tells_what_does_not_fit_and_never_panics() {
    let kernel = tiny();
    let initrd = [Part::Bytes(vec![1; 3 << 20])];
    for kib in [4, 64, 640, 1024, 1028, 2048, 4096] {
        let memory = Memory::new(&[(0, kib << 10)]).unwrap();
        let placed = place(&plan(&kernel, &initrd, ""), &memory);
        let fail = placed.expect_err("the initrd does not fit");
        assert!(fail.remedy().is_some_and(|hint| hint.contains("--memory")), "{kib} KiB: {fail}");
    }
    let memory = Memory::new(&[(0, 8 << 20)]).unwrap();
    assert!(place(&plan(&kernel, &initrd, ""), &memory).is_ok());
    let memory = Memory::new(&[(0, 8 << 20)]).unwrap();
    let fail = place(&plan(&kernel, &[], &"x".repeat(2048)), &memory).unwrap_err();
    assert!(fail.to_string().contains("this kernel takes 2047"), "{fail}");
}

#[test]
fn places_debian_kernels() {
    for path in debian() {
        let started = std::time::Instant::now();
        let kernel = Kernel::open(&path).unwrap();
        let memory = Memory::new(&arch::layout::ram(256 << 20)).unwrap();
        let opened = started.elapsed();
        let start = place(&plan(&kernel, &[], "console=ttyS0"), &memory).unwrap();
        println!(
            "{}: {:?} {start:x?}, opened {opened:?}, all {:?}",
            kernel.name(),
            kernel.compression(),
            started.elapsed()
        );
        assert!(matches!(start, Start::Linux64 { entry: 0x100_0000, zero_page: 0x7000 }), "{start:x?}");
    }
}

/// Debian's configurations are beside its kernels, and its kernels say what they are.
#[test]
fn inspects_debian_kernels() {
    for path in debian() {
        let report = inspect::inspect(&Kernel::open(&path).unwrap()).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().strip_prefix("vmlinuz-").unwrap();
        assert!(report.version.as_ref().unwrap().starts_with(name), "{report:?}");
        assert!(report.config.as_ref().unwrap().ends_with(&format!("config-{name}")), "{report:?}");
        assert!(report.protocols.linux && report.protocols.pvh && report.unpacked_by_host, "{report:?}");
        let state = |option: &str| report.support.iter().find(|s| s.option == option).unwrap().state;
        assert_eq!(state("CONFIG_ACPI"), inspect::State::Builtin);
        assert_eq!(state("CONFIG_VIRTIO_BLK"), inspect::State::Module);
    }
}

/// The ELF file inside a bzImage gives the same memory when it is mapped from a file of its own.
#[test]
fn an_unpacked_kernel_loads_alike() {
    for path in debian() {
        let kernel = Kernel::open(&path).unwrap();
        let unpacked = tempfile::NamedTempFile::new().unwrap();
        let image = kernel.with_elf(|_, source| source.prefix(0, usize::MAX).unwrap()).unwrap().unwrap();
        std::fs::write(unpacked.path(), image).unwrap();
        let vmlinux = Kernel::open(unpacked.path()).unwrap();
        let load = |kernel: &Kernel| {
            let memory = Memory::new(&arch::layout::ram(128 << 20)).unwrap();
            let started = std::time::Instant::now();
            let start = place(&plan(kernel, &[], ""), &memory).unwrap();
            println!("{}: {:?} in {:?}", path.display(), kernel.format(), started.elapsed());
            let mut bytes = vec![0; 127 << 20];
            memory.ram().read_slice(&mut bytes, GuestAddress(1 << 20)).unwrap();
            (start, bytes)
        };
        assert!(load(&kernel) == load(&vmlinux), "{} differs when mapped", path.display());
    }
}
