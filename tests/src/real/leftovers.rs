//! What a run leaves behind, however it ends: no process, socket, file, mount or interface, and no half of a file.

use std::time::Duration;

use super::expect;
use super::inside::line;
use crate::ground::quote;
use crate::harness::{Case, Room, Verdict};

pub fn cases() -> Vec<Case> {
    vec![Case::new("real::leftovers::of_no_end", of_no_end)]
}

/// Only a socket with a name outlives `kill -9`, and what the next command clears away. Everything that could be left is looked at in namespaces of its own, where nobody else makes or leaves anything.
fn of_no_end(room: &mut Room<'_>) -> Verdict {
    room.limit = Duration::from_secs(240);
    let all = "--net user,publish=8080:80 --rw $d --export-changes $d/out.tar --metrics $d/counters --vsock $d/v.sock";
    let wait = line(room, all, "sh -c 'echo ready; sleep 1000'")?;
    let talk = line(room, all, "yes")?;
    let late = line(room, &format!("--timeout 10s {all}"), "sleep 1000")?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let script = format!(
        "d=/dev/shm/left.$$; mkdir $d; >$d/counters; >out; >after; >before
         ip link set lo up
         snap() {{ ls -A . /dev/shm $d /sys/class/net; ls -A /run | grep -vx mayfly; ls -A /run/mayfly 2>/dev/null; cat /proc/mounts; wc -l </proc/net/unix
           for p in /proc/[0-9]*; do readlink $p/exe; done | grep mayfly; true; }}
         look() {{ snap >after; cmp -s before after && echo $1=clean || diff before after | sed \"s/^/$1: /\"; }}
         go() {{ >out; env --default-signal=INT {wait} >out & p=$!; until grep -q ready out; do sleep 0.1; done; }}
         snap >before
         go; kill -9 $p; wait $p; echo killed_code=$?; rm $d/v.sock; {mayfly} ps >/dev/null; look killed
         go; kill -TERM $p; wait $p; echo asked_code=$?; rm $d/out.tar; look asked
         go; kill -INT $p; wait $p; echo interrupted_code=$?; rm $d/out.tar; look interrupted
         {{ {talk}; echo $? >code; }} | head -n 1; echo unheard_code=$(cat code); rm -f $d/out.tar code; look unheard
         {late}; echo late_code=$?; look late
         rm -r $d"
    );
    let output = room.shell(&format!(
        "unshare -n -p -f --mount-proc sh -c {} 2>err; grep -v '^  |' err",
        quote(&script)
    ))?;
    for (end, code) in
        [("killed", "137"), ("asked", "143"), ("interrupted", "130"), ("unheard", "141"), ("late", "124")]
    {
        expect(&output, &format!("{end}_code"), code)?;
        expect(&output, end, "clean")?;
    }
    Ok(())
}
