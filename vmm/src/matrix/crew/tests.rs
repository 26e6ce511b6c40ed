use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::matrix::outcome::Verdict;

/// A program in place of mayfly: the first word is what it does. Its last word but those after `--` says where its result goes.
const PROGRAM: &str = r#"#!/bin/sh
name=$1
for word; do case $word in --json=*) result=${word#--json=} ;; esac; done
case $name in
  good) echo said; echo '{"end":"powered-off","exit_code":0}' > "$result" ;;
  bad) echo out; echo first >&2; printf 'second \033[2J' >&2; echo '{"end":"panicked","error":"it panicked"}' > "$result"; exit 120 ;;
  echo) shift; echo "$@"; exit 3 ;;
  flaky) [ -e mark ] && exit 0; : > mark; exit 9 ;;
  crash) kill -SEGV $$ ;;
  meet) : > "met.$2"; while [ ! -e "met.$3" ]; do :; done ;;
  alone) [ ! -e busy ] || exit 8; : > busy; ls busy; rm busy ;;
  wait) trap 'echo ending; exit 143' TERM; : > "ready.$2"; while :; do read x < fifo; done ;;
esac
"#;

struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    fn new() -> Stage {
        let dir = tempfile::tempdir().unwrap();
        // A script is read by a shell that was there before: nothing that a test writes is run while it is open.
        fs::write(dir.path().join("program"), PROGRAM).unwrap();
        fs::set_permissions(dir.path().join("program"), fs::Permissions::from_mode(0o755)).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("fifo"),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        Stage { dir }
    }

    /// Cells, each one line of words, in the directory of the stage. The first word is the name of the shell as well.
    fn order(&self, lines: &[&str]) -> Order {
        let script = format!("cd {} && . ./program", self.dir.path().display());
        let task = |line: &&str| Task {
            name: (*line).to_owned(),
            flags: ["-c", &script]
                .into_iter()
                .chain(line.split(' ').take(1))
                .chain(line.split(' '))
                .map(OsString::from)
                .collect(),
            command: Vec::new(),
            load: Load { cells: 1, cpus: 1, memory: 1 },
        };
        Order {
            program: "/bin/sh".into(),
            tasks: lines.iter().map(task).collect(),
            budget: Load { cells: 8, cpus: 8, memory: 8 },
            retries: 0,
            fail_fast: false,
            logs: None,
        }
    }
}

/// Carries out an order: the outcomes, and what was told of failures.
fn carry_out(order: &Order) -> (Vec<Outcome>, Vec<String>) {
    let (mut outcomes, mut told) = (Vec::new(), Vec::new());
    let mut tell = |news: News<'_>| match news {
        News::Failed(name, one, again) => {
            told.push(format!("{name}: {}{}", one.cause(), if again { " again" } else { "" }))
        }
        News::Trouble(fail) => told.push(fail.to_string()),
        News::Progress(..) => {}
    };
    let order = order.clone();
    // In a thread of its own, for the signals that it diverts.
    std::thread::scope(|scope| {
        scope.spawn(|| outcomes = run(&order, &mut tell).unwrap().0);
    });
    (outcomes, told)
}

fn verdicts(outcomes: &[Outcome]) -> Vec<Verdict> {
    outcomes.iter().map(Outcome::verdict).collect()
}

#[test]
fn each_cell_tells_how_it_ended_and_what_it_said() {
    let stage = Stage::new();
    let (outcomes, told) = carry_out(&stage.order(&["good", "bad", "crash", "echo a b"]));
    use Verdict::{Failed, Passed};
    assert_eq!(verdicts(&outcomes), [Passed, Failed, Failed, Failed]);
    let last = |at: usize| outcomes[at].tries.last().unwrap();
    assert_eq!(last(0).result.as_ref().unwrap()["end"], "powered-off");
    assert_eq!(last(1).said, ["first", "second [2J"], "its errors, harmless");
    assert_eq!((last(2).signal, last(2).code), (Some(libc::SIGSEGV), None));
    assert!(last(3).said[0].starts_with("a b --json=/proc/"), "what it said otherwise: {:?}", last(3).said);
    let mut told = told;
    told.sort();
    assert_eq!(told, ["bad: it panicked", "crash: signal 11 ended mayfly", "echo a b: exit code 3"]);
}

#[test]
fn one_that_cannot_be_started_is_a_failure_of_its_own() {
    let stage = Stage::new();
    let mut order = stage.order(&["good"]);
    order.program = stage.dir.path().join("nothing");
    let (outcomes, told) = carry_out(&order);
    assert_eq!(verdicts(&outcomes), [Verdict::Failed]);
    assert!(told[0].starts_with("start good: No such file"), "{told:?}");
}

#[test]
fn one_that_passes_at_last_is_flaky_and_others_are_tried_as_often() {
    let stage = Stage::new();
    let mut order = stage.order(&["flaky", "bad"]);
    order.retries = 2;
    let (outcomes, told) = carry_out(&order);
    assert_eq!(verdicts(&outcomes), [Verdict::Flaky, Verdict::Failed]);
    assert_eq!((outcomes[0].tries.len(), outcomes[1].tries.len()), (2, 3));
    assert_eq!(told.iter().filter(|line| *line == "bad: it panicked again").count(), 2);
}

#[test]
fn cells_run_at_once_and_no_more_than_may() {
    let stage = Stage::new();
    let (outcomes, _) = carry_out(&stage.order(&["meet a b", "meet b a"]));
    assert_eq!(verdicts(&outcomes), [Verdict::Passed; 2], "each waits for the other");
    let mut order = stage.order(&["alone"; 6]);
    order.budget.cpus = 1;
    assert_eq!(verdicts(&carry_out(&order).0), [Verdict::Passed; 6]);
}

#[test]
fn logs_are_kept_of_tries_that_failed() {
    let stage = Stage::new();
    let mut order = stage.order(&["good", "bad", "flaky"]);
    (order.retries, order.logs) = (1, Some(stage.dir.path().join("logs/of")));
    let (outcomes, told) = carry_out(&order);
    assert_eq!(verdicts(&outcomes), [Verdict::Passed, Verdict::Failed, Verdict::Flaky], "{told:?}");
    let top = stage.dir.path().join("logs/of");
    let mut names: Vec<_> =
        fs::read_dir(&top).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["bad", "bad.try2", "flaky"]);
    assert_eq!(outcomes[1].logs, [top.join("bad"), top.join("bad.try2")]);
    let read = |path: &str| fs::read_to_string(top.join(path)).unwrap();
    assert_eq!(
        (read("bad/stdout").as_str(), read("bad/stderr").as_str()),
        ("out\n", "first\nsecond \x1b[2J")
    );
    assert!(read("bad/result.json").contains("it panicked"));
}

#[test]
fn the_first_failure_ends_all_where_that_is_asked_for() {
    let stage = Stage::new();
    let mut order = stage.order(&["wait a", "bad", "good"]);
    (order.fail_fast, order.budget.cells) = (true, 2);
    // It is ended once it listens: a failure that comes before that would find nobody to hear it.
    order.tasks[1].flags[1] =
        format!("cd {} && while [ ! -e ready.a ]; do :; done; . ./program", stage.dir.path().display())
            .into();
    let (outcomes, _) = carry_out(&order);
    assert_eq!(verdicts(&outcomes), [Verdict::Skipped, Verdict::Failed, Verdict::Skipped]);
    assert_eq!(outcomes[0].tries[0].code, Some(143), "it was asked to");
    assert!(outcomes[2].tries.is_empty());
}

#[test]
fn names_of_logs_are_names_of_files() {
    let top = Path::new("/l");
    assert_eq!(place(top, "kernel=6.1,cpus=2", 3, 0), Path::new("/l/kernel=6.1,cpus=2"));
    assert_eq!(place(top, "kernel=../../x", 3, 1), Path::new("/l/kernel=.._.._x.cell3.try2"));
}
