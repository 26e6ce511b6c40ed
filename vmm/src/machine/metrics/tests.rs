use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

use base::host::fake::FakeHost;
use base::lane::Lane;
use base::meter::Counter;
use devices::catalog::CATALOG;
use rustix::pipe::{PipeFlags, pipe_with};

use super::*;
use crate::hv::fake::{Fake, FakeVm, Step};
use crate::machine::tests::{build_on, off, run_on};
use crate::plan::Plan;

const FILE: &str = "counters";

fn metrics(text: &str) -> Metrics {
    Metrics::parse(text).unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What is in the file of a host; it was one of zeros before.
fn written(host: &FakeHost) -> Vec<Value> {
    let mut text = String::new();
    host.file(Path::new(FILE)).unwrap().read_to_string(&mut text).unwrap();
    lines(&text)
}

fn plan(text: &str) -> Plan {
    Plan { metrics: Some(metrics(text)), ..Plan::default() }
}

/// A recorder into `to` of a machine with one device that counts `reads`.
fn recorder(to: File, every: &str, reads: &Arc<Counter>) -> Recorder {
    let host = FakeHost::default();
    host.put(Path::new(FILE), File::from(rustix::io::dup(&to).unwrap()));
    let recorder = Recorder::open(&metrics(&format!("{FILE},every={every}")), &host).unwrap();
    // The fake opens it anew, and a pipe opened anew waits.
    let recorder = Recorder { outlet: Outlet::new(to.into()).unwrap(), ..recorder };
    recorder.of(Sources {
        board: Arc::new(Board::new(Arc::new(Fake(FakeVm::new([]))))),
        memory: Memory::new(&[(0, 1 << 20)]).unwrap(),
        devices: vec![("disk0".to_owned(), vec![("reads", reads.clone())])],
    })
}

#[test]
fn a_run_has_a_first_and_a_last_line_that_agrees_with_its_report() {
    let host = FakeHost::default();
    let script = vec![Step::In(0x3fd, 1), Step::Out(0x3f8, vec![b'x']), Step::Load(0xdead_0000, 4), off()];
    let (_, report) = run_on(&host, Instant::now(), plan(FILE), vec![script]);
    let lines = written(&host);
    let events: Vec<_> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(events, ["start", "end"]);
    let [first, last] = [0, 1].map(|n| &lines[n]["machine"]);
    assert_eq!(first["port_write_exits"], 0, "the guest has not begun: {first}");
    for (kind, count) in &report.exits {
        assert_eq!(last[format!("{kind}_exits")], *count, "{kind} in {last}");
    }
    assert_eq!(last["port_write_exits"], 2);
    assert_eq!(last["memory_bytes"], 512 << 20);
    assert!(last["memory_resident_bytes"].as_u64().unwrap() > 4096, "the kernel is there: {last}");
    assert_eq!(lines[1]["devices"]["rng"]["kicks"], 0, "{}", lines[1]);
    let times = [0, 1].map(|n| lines[n]["time_ms"].as_f64().unwrap());
    assert!(times.is_sorted(), "{times:?}");
}

#[test]
fn counters_are_written_after_each_period() {
    let (mut lane, handle) = Lane::new(|_| ()).unwrap();
    let (file, reads) = (tempfile::NamedTempFile::new().unwrap(), Arc::new(Counter::default()));
    let recording = recorder(file.reopen().unwrap(), "10ms", &reads).start(&handle, Instant::now());
    let said = || lines(&std::fs::read_to_string(file.path()).unwrap());
    while said().len() < 3 {
        lane.turn(None);
        reads.add(7);
    }
    recording.end(Duration::ZERO);
    let seen: Vec<_> =
        said().iter().map(|line| line["devices"]["disk0"]["reads"].as_u64().unwrap()).collect();
    assert_eq!(seen.first(), Some(&0));
    assert!(seen.is_sorted() && seen.last() == Some(&reads.get()), "{seen:?}");
    let events: Vec<_> = said().iter().map(|line| line["event"].clone()).collect();
    assert_eq!(events, ["start", "period", "period", "end"]);
}

#[test]
fn a_slow_reader_holds_nobody_up_and_misses_whole_lines() {
    let (mut lane, handle) = Lane::new(|_| ()).unwrap();
    let (from, to) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    rustix::pipe::fcntl_setpipe_size(&to, 4096).unwrap();
    let recording = recorder(to.into(), "10ms", &Arc::default()).start(&handle, Instant::now());
    // Nobody reads, and the lane goes on.
    while recording.book().skipped < 3 {
        lane.turn(None);
    }
    let mut text = Vec::new();
    let mut take = || {
        let mut buffer = [0; 8192];
        let n = rustix::io::read(&from, &mut buffer).unwrap_or(0);
        text.extend(&buffer[..n]);
    };
    take();
    while recording.book().skipped > 0 && !recording.book().recorder.outlet.is_empty() {
        lane.turn(None);
        take();
    }
    recording.end(Duration::ZERO);
    take();
    let lines = lines(std::str::from_utf8(&text).unwrap());
    assert!(lines.len() > 2, "{lines:?}");
    let last = lines.last().unwrap();
    assert_eq!(
        (last["event"].as_str(), last["skipped_lines"].as_u64() >= Some(3)),
        (Some("end"), true),
        "{last}"
    );
}

#[test]
fn a_host_that_takes_nothing_costs_the_counters_and_not_the_run() {
    let host = FakeHost::default();
    host.put(Path::new(FILE), File::options().write(true).open("/dev/full").unwrap());
    let (_, report) = run_on(&host, Instant::now(), plan(FILE), vec![vec![off()]]);
    assert_eq!(report.end.exit_code(), 0, "{report:?}");

    let (mut lane, handle) = Lane::new(|_| ()).unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let recording = recorder(full, "10ms", &Arc::default()).start(&handle, Instant::now());
    assert!(recording.book().over, "told with the first line");
    lane.turn(None);
    lane.turn(None);
    assert_eq!(recording.book().skipped, 0, "nothing is tried again");
}

#[test]
fn a_machine_without_the_flag_gathers_no_counters() {
    let host = FakeHost::default();
    let fake = FakeVm::new([]);
    let (_, built) = build_on(&host, Instant::now(), &Plan::default(), &fake);
    let ControlFlow::Continue(machine) = built else { panic!("it was not built") };
    assert!(machine.recorder.is_none());
}

/// The names of all counters with whom they are of: the machine, every device, or those of one flag.
fn names() -> BTreeSet<(String, String)> {
    let mut names = BTreeSet::new();
    let mut of_all: Option<BTreeSet<String>> = None;
    for entry in CATALOG {
        let host = FakeHost::default();
        let mut plan = plan(FILE);
        plan.add_device(*entry, entry.example()).unwrap();
        let fake = FakeVm::new([]);
        let (plan, built) = build_on(&host, Instant::now(), &plan, &fake);
        let ControlFlow::Continue(machine) = built else { panic!("{} was not built", entry.name()) };
        let sources = machine.recorder.unwrap().sources;
        names.extend(sources.machine().into_iter().map(|(name, _)| ("machine".to_owned(), name)));
        for device in plan.devices.iter().filter(|device| device.kind == entry.name()) {
            let found = sources.devices.iter().find(|(name, _)| *name == device.name);
            let Some((_, meters)) = found else { continue };
            let own: BTreeSet<String> = meters.iter().map(|(name, _)| (*name).to_owned()).collect();
            assert_eq!(own.len(), meters.len(), "{}: a name counts one thing", entry.name());
            of_all = Some(match of_all {
                Some(all) => &all & &own,
                None => own.clone(),
            });
            names.extend(own.into_iter().map(|name| (format!("--{}", entry.flag()), name)));
        }
    }
    for name in of_all.unwrap() {
        names.retain(|(of, other)| *other != name || of == "machine");
        names.insert(("every virtio device".to_owned(), name));
    }
    names
}

/// docs/metrics.md has a row for each counter there is, and for no other. A new counter fails here until its meaning is
/// written down.
#[test]
fn the_page_explains_every_counter() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let page = std::fs::read_to_string(page).unwrap();
    let mut explained = BTreeSet::new();
    let rows = page.lines().skip_while(|line| *line != "## The counters");
    for row in rows.filter(|line| line.starts_with("| ") && line.contains('`')) {
        let cells: Vec<_> =
            row.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect();
        let [of, name, unit, meaning] = cells.as_slice() else { panic!("a row has four cells: {row}") };
        assert_eq!(*unit == "bytes", name.ends_with("bytes"), "the name says the unit: {row}");
        assert!(meaning.len() > 10, "a meaning: {row}");
        assert!(explained.insert((of.clone(), name.clone())), "twice: {row}");
    }
    let there = names();
    assert_eq!(
        explained.difference(&there).collect::<Vec<_>>(),
        [] as [&(String, String); 0],
        "no such counter"
    );
    assert_eq!(
        there.difference(&explained).collect::<Vec<_>>(),
        [] as [&(String, String); 0],
        "not in docs/metrics.md"
    );
}
