//! `mayfly matrix` with stock kernels: two of them, each with one and two processors, and a cell that fails once.

use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};

pub fn cases() -> Vec<Case> {
    vec![Case::new("real::matrix::two_kernels_with_one_and_two_processors", two_by_two)]
}

fn two_by_two(room: &mut Room<'_>) -> Verdict {
    let [cloud, rt] =
        [Kernel::fetch(Flavour::Cloud), Kernel::fetch(Flavour::Rt)].map(|found| found.map_err(Stop::Skipped));
    let (cloud, rt) = (cloud?, rt?);
    let initrd = room.dir.join("root.cpio");
    crate::initramfs::write_root(&initrd, "sh uname nproc touch")?;
    let text = format!(
        r#"
        command = "uname -r; nproc; [ {{kind}} != flaky ] || [ -e {state}/seen ] || {{ touch {state}/seen; echo not yet >&2; exit 7; }}"
        initrd = "{initrd}"
        rw = "{state}"
        timeout = "90s"
        retries = 1
        [matrix]
        kernel = [{{ name = "cloud", kernel = "{cloud}" }}, {{ name = "rt", kernel = "{rt}" }}]
        cpus = [1, 2]
        kind = ["steady"]
        [[exclude]]
        kernel = "rt"
        cpus = 2
        [[include]]
        kernel = "rt"
        cpus = 2
        kind = "flaky"
        "#,
        state = room.dir.join("state").display(),
        initrd = initrd.display(),
        cloud = cloud.bzimage().display(),
        rt = rt.bzimage().display(),
    );
    room.file("m.toml", text)?;
    std::fs::create_dir(room.dir.join("state")).map_err(|cause| cause.to_string())?;
    let options = room.ground.options();
    let output = room.mayfly(&format!("matrix {options} m.toml --json=r.json --junit r.xml --logs logs"))?;
    output.code(0)?.mentions("4 cells in ")?.mentions(": 3 ok, 1 flaky\n")?;
    output.complains("kernel=rt,cpus=2,kind=flaky failed, and is tried again: exit code 7\n  | not yet\n")?;
    room.shell("cat r.xml")?
        .mentions("tests=\"4\" failures=\"0\"")?
        .mentions("<flakyFailure type=\"command-failed\"")?;
    let said = format!("{}\n2\n", rt.release);
    room.shell("cat 'logs/kernel=rt,cpus=2,kind=flaky/stdout'; ls logs/*")?
        .mentions(&said)?
        .mentions("result.json")?;
    Ok(())
}
