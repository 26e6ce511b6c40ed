//! Counters in a file: read while the guest runs, whole at its end, and never the reason why a run fails.

use super::{guest, kernel};
use crate::harness::{Case, Stop};

pub fn cases() -> Vec<Case> {
    vec![
        watched(),
        guest("metrics_on_a_full_disk", "leave", "--metrics /dev/full,every=10ms", |output| {
            let told = "warning: write metrics to /dev/full: No space left on device; no more are written";
            output.code(42)?.complains(told)?;
            let count = String::from_utf8_lossy(&output.stderr).matches("metrics").count();
            if count == 1 { Ok(()) } else { Err(output.differs("one complaint")) }
        }),
        guest("metrics_nowhere", "leave", "--metrics no/such/place", |output| {
            output.code(125)?.complains("error: open metrics file no/such/place for writing: ").map(drop)
        }),
    ]
}

/// Somebody looks into the file while the guest sleeps, and ends the run.
fn watched() -> Case {
    Case::new("bare::metrics_while_it_runs", |room| {
        let (kernel, options) = (kernel(room, "sleep")?, room.ground.options());
        let mayfly = room.mayfly.display();
        let script = format!(
            "{mayfly} run {options} --kernel {kernel} --metrics counters,every=20ms & \
             until [ $(grep -c period counters 2>/dev/null) -ge 3 ] 2>/dev/null; do sleep 0.02; done; \
             kill -TERM $!; wait $!"
        );
        room.shell(&script)?.code(143)?;
        let written = room.shell("cat counters")?;
        let lines = written
            .text()
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<Vec<serde_json::Value>, _>>()
            .map_err(|cause| Stop::Failed(format!("read the counters: {cause}: {}", written.text())))?;
        let (Some(first), Some(last)) = (lines.first(), lines.last()) else {
            return Err(written.differs("lines of JSON"));
        };
        let middle = lines.get(1..lines.len().saturating_sub(1)).unwrap_or_default();
        let times: Option<Vec<_>> = lines.iter().map(|line| line["time_ms"].as_f64()).collect();
        let good = first["event"] == "start"
            && last["event"] == "end"
            && middle.iter().all(|line| line["event"] == "period")
            && times.is_some_and(|times| times.is_sorted())
            && last["machine"]["memory_bytes"].as_u64() == Some(512 << 20)
            && last["machine"]["interrupted_exits"].as_u64() >= Some(1)
            && last["devices"]["rng"]["kicks"].as_u64() == Some(0);
        if good { Ok(()) } else { Err(written.differs("a start, periods and an end with their counters")) }
    })
}
