//! Documents as test runners write them.

use super::*;

fn hear(text: &str) -> Tests {
    let whole = listen(text.as_bytes(), usize::MAX);
    for chunk in [1, 7, 64] {
        assert_eq!(listen(text.as_bytes(), chunk), whole, "in chunks of {chunk}");
    }
    whole
}

fn listen(bytes: &[u8], chunk: usize) -> Tests {
    let mut listener = Listener::default();
    bytes.chunks(chunk.min(bytes.len().max(1))).for_each(|bytes| listener.feed(bytes));
    listener.tests()
}

/// `suite|name|verdict|reason` for each case.
fn told(tests: &Tests) -> Vec<String> {
    let told = tests.cases.iter().map(|case| {
        let verdict = match case.verdict {
            Verdict::Passed => "+",
            Verdict::Failed => "-",
            Verdict::Skipped => "o",
        };
        format!("{verdict} {}|{}|{}", case.suite, case.name, case.reason)
    });
    told.collect()
}

/// kselftest's runner: what tests write has `# ` before it, their own results with it.
const KSELFTEST: &str = "\
make: Entering directory '/linux/tools/testing/selftests'
make[1]: Nothing to be done for 'all'.
TAP version 13
1..5
# timeout set to 45
# selftests: timers: posix_timers
# TAP version 13
# 1..4
# # Testing posix timers. False negative may happen on CPU execution
# # based timers if other threads run on the CPU...
# ok 1 check_itimer0
# # check_timer_create(\"Per process\"): got 3 of 11
# not ok 2 check_timer_create
# ok 3 check_rearm # SKIP clock not supported
# ok 4 check_overrun # XFAIL known to be late
# # Totals: pass:1 fail:1 xfail:1 xpass:0 skip:1 error:0
not ok 1 selftests: timers: posix_timers # exit=1
# timeout set to 45
# selftests: timers: nanosleep
# Nanosleep CLOCK_REALTIME                  [OK]
ok 2 selftests: timers: nanosleep
# selftests: timers: raw_skew
# 
not ok 3 selftests: timers: raw_skew # TIMEOUT 45 seconds
# selftests: timers: rtcpie
# /dev/rtc0: No such file or directory
ok 4 selftests: timers: rtcpie # SKIP
not ok 5 selftests: timers: old # TODO
make: Leaving directory '/linux/tools/testing/selftests'
";

#[test]
fn kselftest() {
    let tests = hear(KSELFTEST);
    assert_eq!(
        told(&tests),
        [
            "+ selftests: timers: posix_timers|check_itimer0|",
            "- selftests: timers: posix_timers|check_timer_create|",
            "o selftests: timers: posix_timers|check_rearm|SKIP clock not supported",
            "o selftests: timers: posix_timers|check_overrun|XFAIL known to be late",
            "+ |selftests: timers: nanosleep|",
            "- |selftests: timers: raw_skew|TIMEOUT 45 seconds",
            "o |selftests: timers: rtcpie|SKIP",
            "o |selftests: timers: old|TODO",
        ]
    );
    assert_eq!((tests.passed, tests.failed, tests.skipped, tests.count()), (2, 2, 4, 8));
    let failed = &tests.cases[1];
    assert_eq!(failed.diagnostics, ["# check_timer_create(\"Per process\"): got 3 of 11"]);
    let failures: Vec<_> = tests.failures().collect();
    assert_eq!(
        failures,
        ["selftests: timers: posix_timers.check_timer_create", "selftests: timers: raw_skew"]
    );
}

/// KUnit, as it stands in the kernel's log, with a line of somebody else's between.
const KUNIT: &str = "\
KTAP version 1
1..2
    KTAP version 1
    # Subtest: example
    # module: kunit_example_test
    1..3
    # example_simple_test: initializing
    ok 1 example_simple_test
    # example_skip_test: initializing
    ok 2 example_skip_test # SKIP this test should be skipped
        KTAP version 1
        # Subtest: example_params_test
        ok 1 example value 3
clocksource: Switched to clocksource tsc
    # example_params_test: EXPECTATION FAILED at lib/kunit/kunit-example-test.c:48
    Expected 1 + 1 == 3, but
        not ok 2 example value 2
    # example_params_test: pass:1 fail:1 skip:0 total:2
    not ok 3 example_params_test
# example: pass:1 fail:1 skip:1 total:3
not ok 1 example
    KTAP version 1
    # Subtest: empty
    1..0
ok 2 empty
";

#[test]
fn kunit() {
    let tests = hear(KUNIT);
    assert_eq!(
        told(&tests),
        [
            "+ example|example_simple_test|",
            "o example|example_skip_test|SKIP this test should be skipped",
            "+ example.example_params_test|example value 3|",
            "- example.example_params_test|example value 2|",
            "+ |empty|",
        ]
    );
    assert_eq!(
        tests.cases[3].diagnostics,
        [
            "clocksource: Switched to clocksource tsc",
            "example_params_test: EXPECTATION FAILED at lib/kunit/kunit-example-test.c:48",
            "Expected 1 + 1 == 3, but",
        ]
    );
}

#[test]
fn what_is_not_announced_is_no_test() {
    for text in [
        "ok 1 all is well\nnot ok 2 it is not\n",
        "# TAP is fun\nnot ok\n",
        " 1..3\nnot ok 1 x\n",
        "1..3 of them\nnot ok 1 x\n",
        "see TAP version 13\n",
        "TAP version x\nnot ok 1 x\n",
        "",
    ] {
        assert_eq!(hear(text), Tests::default(), "{text:?}");
    }
    let junk = "y\n".repeat(100_000);
    assert_eq!(hear(&format!("{junk}TAP version 13\n1..1\n{junk}not ok 1 x\n")).failed, 1);
    assert_eq!(hear(&format!("{junk}1..1\nok 1 x\n{junk}")).passed, 1);
    assert_eq!(hear(&format!("x{junk}\r\nTAP version 13\r\n1..1\r\nok 1 x\r\n")).passed, 1);
}

#[test]
fn a_plan_that_is_not_kept_is_a_failure() {
    let tests = hear("TAP version 13\n1..3\nok 1 a\nok 2 b\n");
    assert_eq!(told(&tests), ["+ |a|", "+ |b|", "- |plan|2 of 3 results came"]);
    let two = hear("TAP version 13\n1..2\nok 1 a\nTAP version 13\n1..1\nok 1 b\n");
    assert_eq!(told(&two), ["+ |a|", "- |plan|1 of 2 results came", "+ |b|"]);
    assert_eq!(hear("1..1\nok 1 a\n1..1\nok 1 b\n").failed, 0, "two documents");
    assert_eq!(hear("TAP version 13\nok 1 a\n1..1\n").failed, 0, "a plan at the end");
    assert_eq!(hear("1..0 # SKIP nothing here\n"), Tests::default());
    let bailed = hear("TAP version 13\n1..2\nok 1 a\nBail out! no disk\n");
    assert_eq!(told(&bailed), ["+ |a|", "- |Bail out!|no disk"]);
}

#[test]
fn a_nested_plan_that_is_not_kept_is_a_failure() {
    let of = |text: &str| told(&hear(&format!("TAP version 13\n1..1\n{text}")));
    assert_eq!(
        of("# TAP version 13\n# 1..3\n# ok 1 a\n# ok 2 b\nok 1 t\n"),
        ["+ t|a|", "+ t|b|", "- t|plan|2 of 3 results came"]
    );
    assert_eq!(of("# TAP version 13\n# 1..3\nok 1 t\n"), ["- t|plan|0 of 3 results came"]);
    assert_eq!(
        of("    1..1\n        1..2\n        ok 1 a\n    ok 1 s\nok 1 t\n"),
        ["+ t.s|a|", "- t.s|plan|1 of 2 results came"]
    );
    let two = "# TAP version 13\n# 1..2\n# ok 1 a\n# TAP version 13\n# 1..1\n# ok 1 b\nok 1 t\n";
    assert_eq!(of(two), ["+ t|a|", "+ t|b|", "- t|plan|1 of 2 results came"]);
    // What says itself that not all came has not to be told.
    assert_eq!(
        of("# 1..3\n# ok 1 a\n# ok 2 # SKIP no root\nok 1 t # SKIP\n"),
        ["+ t|a|", "o t||SKIP no root"]
    );
    assert_eq!(of("# 1..3\n# ok 1 a\nnot ok 1 t # exit=139\n"), ["+ t|a|", "- |t|exit=139"]);
    assert_eq!(of("# 1..2\n# ok a\n# not ok b\nok 1 t\n"), ["+ t|a|", "- t|b|"], "without numbers");
    assert_eq!(of("# 1..10\nok 1 t\n"), ["+ |t|"], "just some text");
    // The test is gone in the middle of it.
    assert_eq!(hear("KTAP version 1\n    KTAP version 1\n    1..2\n    ok 1 a\n").failed, 1);
}

#[test]
fn a_plan_may_come_at_the_end_of_what_has_no_version() {
    let perl = "# Subtest: s\n    ok 1 - a\n    1..1\nok 1 - s\nnot ok 2 - b\n#   Failed test 'b'\n1..2\n";
    assert_eq!(told(&hear(perl)), ["+ |s|", "- |b|"]);
    assert_eq!(told(&hear("ok 1 - a\n1..1\nok 1 - b\n1..1\n")), ["+ |a|", "+ |b|"], "one after the other");
    assert_eq!(hear("1..1\nok 1 - a\nok 1 - b\n1..1\n").failed, 0, "each in its way");
    assert_eq!(told(&hear("ok 1 - a\n1..2\n")), ["+ |a|", "- |plan|1 of 2 results came"]);
    let short = hear("1..3\nok 1 a\nok 2 b\nok 1 c\n1..1\n");
    assert_eq!(told(&short), ["+ |a|", "+ |b|", "- |plan|2 of 3 results came", "+ |c|"]);
    assert_eq!(told(&hear("not ok 1 stray\nTAP version 13\n1..1\nok 1 a\n")), ["+ |a|"]);
    for text in ["1..10\n", "x\n1..10\ny\n"] {
        assert_eq!(hear(text), Tests::default(), "{text:?}: just a line");
    }
    assert_eq!(hear("TAP version 13\n1..10\n").failed, 1);
    assert_eq!(hear("1..1\nok 1 a\n1..10\n").failed, 1, "a second document");
}

#[test]
fn among_results_with_numbers_others_do_not_keep_a_plan() {
    let tests = hear("TAP version 13\n1..3\nok to go\nok 1 a\nok 2 b\nok then\n");
    assert_eq!((tests.failed, tests.cases.last().unwrap().reason.as_str()), (1, "2 of 3 results came"));
    assert_eq!(hear("1..4\nok\nok 2\nok\nok 4\n").failed, 0, "numbers leave room for them");
    assert_eq!(hear("1..3\nok a\nok b\nok c\n").failed, 0);
    assert_eq!(hear("1..3\nok 2 b\nok 1 a\nok 3 c\n").failed, 0, "not in order");
}

#[test]
fn many_documents_take_no_longer_than_their_lines() {
    let mut listener = Listener::default();
    listener.feed(b"TAP version 13\n");
    listener.feed(b"ok 1 x\n".repeat(KEPT).as_slice());
    listener.feed(b"    ok 1 y\n");
    listener.feed(b"TAP version 13\n".repeat(3).as_slice());
    assert_eq!(listener.settled, listener.open.len());
    let tests = listener.tests();
    assert_eq!((tests.passed, tests.failed), (10_001, 0));
}

#[test]
fn forms_of_old() {
    let tests = hear(
        "TAP version 13\nok - no number\nnot ok\nok 3\nok 1..4 selftests: x: y [PASS]\n\
         not ok 1..5 selftests: x: z [SKIP]\nnot ok 6 a # b # c\nokay\nnot okay\nok, well\n",
    );
    assert_eq!(
        told(&tests),
        ["+ |no number|", "- ||", "+ ||", "+ |selftests: x: y|", "o |selftests: x: z|", "- |a|b # c"]
    );
}

#[test]
fn whatever_a_guest_says_is_bounded() {
    let mut listener = Listener::default();
    listener.feed(b"TAP version 13\n");
    let long = "x".repeat(2 * LINE);
    listener.feed(long.as_bytes());
    assert!(listener.line.len() <= LINE);
    listener.feed(b"\n");
    for n in 0..30_000 {
        let text = format!("# {long}\n{} {n} {long}\n", if n % 2 == 0 { "ok" } else { "not ok" });
        // Each deeper than the one before, and then all of them under one.
        listener.feed(format!("{}{text}", " ".repeat(n % 80)).as_bytes());
    }
    listener.feed(format!("ok 1 {long}\n").as_bytes());
    assert!(listener.room <= ROOM);
    let tests = listener.tests();
    assert!(tests.cases.len() <= KEPT + FAILURES, "{}", tests.cases.len());
    assert!(tests.cases.iter().all(|case| case.suite.len() <= SUITE + LINE && case.name.len() <= LINE));
    assert!(tests.count() > 25_000, "{}", tests.count());
    assert!(hear(&"TAP version 13\n1..18446744073709551615\n".repeat(3)).failed > 0);
    assert_eq!(hear("TAP version 13\n1..18446744073709551616\nok 1\n").failed, 0);
}
