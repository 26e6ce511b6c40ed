//! Disks of each make under fio, which verifies what it has written, and then under random work for longer.

use super::{LIMIT, WAYS};
use crate::harness::Case;
use crate::real::images::Make;
use crate::real::random::{Load, work};

/// Five engines at the same time: deep and direct, in sizes of all kinds, mapped, synced, and through io_uring. Each reads
/// all of its file again, and compares every block with its sum.
const FIO: &str = "[global]
directory=/mnt
verify=crc32c
verify_fatal=1
do_verify=1
verify_state_save=0
[deep]
ioengine=libaio
direct=1
iodepth=32
rw=randwrite
bs=4k
size=24m
[sizes]
ioengine=libaio
direct=1
iodepth=8
rw=randwrite
bssplit=4k/40:12k/20:64k/30:256k/10
size=32m
[mapped]
ioengine=mmap
rw=randwrite
bs=4k
size=8m
[synced]
ioengine=psync
rw=randrw
bs=4k
fsync=16
size=6m
[uring]
ioengine=io_uring
direct=1
iodepth=4
rw=write
bs=1m
size=48m
";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (make, seed) in [(Make::Raw, 11), (Make::Qcow2, 22), (Make::Kept, 33), (Make::Throwaway, 44)] {
        for (transport, flavour) in WAYS {
            let load = Load { count: 1500, mib: 256, seed, fio: Some(FIO) };
            let name = format!("soak::disks::fio_and_random_work_{}_{transport}", make.name());
            cases.push(Case::new(name, move |room| {
                room.limit = LIMIT;
                work(room, make, flavour, transport, load)
            }));
        }
    }
    cases
}
