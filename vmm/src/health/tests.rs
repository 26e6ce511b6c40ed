//! What is a complaint and what is none, on what kernels have printed.

use super::*;

/// What kernels print, by kernel and complaint.
const SPLATS: &str = include_str!("splats.txt");

fn health(lines: &[&str], allowed: &[&str]) -> Health {
    let mut health = Health::new(allowed.iter().map(|text| (*text).to_owned()).collect());
    for line in lines {
        health.hear(&Message { level: 4, time: 1_500_000, text: line.as_bytes().to_vec() });
    }
    health
}

fn kinds(health: &Health) -> Vec<String> {
    let kind = |finding: &Finding| serde_json::to_value(finding.kind).unwrap().as_str().unwrap().to_owned();
    health.findings.iter().map(kind).collect()
}

/// Each is told once, for what it is, whatever it goes on to say.
#[test]
fn each_kind_of_complaint_is_recognised() {
    let splats: Vec<_> = SPLATS.split("\n== ").skip(1).collect();
    assert!(splats.len() > 50, "{}", splats.len());
    for splat in splats {
        let mut lines = splat.lines();
        let (name, wanted) = lines.next().unwrap().rsplit_once(": ").unwrap_or(("nothing", ""));
        let lines: Vec<_> = lines.collect();
        let heard = health(&lines, &[]);
        assert_eq!(
            kinds(&heard),
            wanted.split_whitespace().collect::<Vec<_>>(),
            "{name}: {:?}",
            heard.findings
        );
        let dated: Vec<_> = lines.iter().map(|line| format!("somebody says: {line}")).collect();
        let dated: Vec<_> = dated.iter().map(String::as_str).filter(|line| !line.contains(" [#")).collect();
        assert!(health(&dated, &[]).is_good(), "{name}: in what somebody else says");
    }
}

#[test]
fn each_kind_is_among_what_is_tried() {
    let tried: std::collections::BTreeSet<_> = SPLATS
        .split("\n== ")
        .skip(1)
        .filter_map(|splat| splat.lines().next()?.rsplit_once(": "))
        .flat_map(|(_, kinds)| kinds.split_whitespace())
        .collect();
    assert_eq!(
        tried.into_iter().collect::<Vec<_>>(),
        [
            "bug",
            "data-race",
            "hung-task",
            "leak",
            "locking",
            "lockup",
            "memory-error",
            "oops",
            "out-of-memory",
            "panic",
            "rcu-stall",
            "undefined-behaviour",
            "warning"
        ]
    );
}

#[test]
fn a_warning_is_told_with_its_own_words() {
    let at = "WARNING: CPU: 0 PID: 6 at lib/refcount.c:28 refcount_warn_saturate+0xd8/0xe0";
    let lines = ["------------[ cut here ]------------", "refcount_t: underflow; use-after-free.", at];
    let told = health(&lines, &[]);
    assert_eq!(told.findings[0].text, format!("{at} (refcount_t: underflow; use-after-free.)"));
    assert!(health(&lines, &["underflow"]).is_good(), "by which it can be expected, too");
    assert_eq!(health(&lines[1..], &[]).findings[0].text, at);
}

#[test]
fn expected_complaints_are_left_out_and_many_are_counted() {
    let line = "WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:878 x";
    assert!(health(&[line, line], &["fpu/xstate.c"]).is_good());
    let many = health(&vec![line; 100], &["other"]);
    assert_eq!((many.findings.len(), many.more), (KEPT, 100 - KEPT as u64));
    let text = health(&["fine", line, "Call Trace:", " a+1/2\u{1b}[0m"], &[]).summary().unwrap();
    assert_eq!(text, format!("{line}\n  | Call Trace:\n  |  a+1/2[0m"));
    assert!(health(&[line, line], &[]).summary().unwrap().starts_with(&format!("{line} (and 1 more)\n")));
    // What goes on after an expected complaint is expected as well.
    assert!(
        health(&["BUG: unable to handle page fault for address: 1", "Oops: 0000 [#1]"], &["page fault"])
            .is_good()
    );
}
