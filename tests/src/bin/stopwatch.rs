//! Runs commands in turn, many times, and says what each took: from exec to a mark on its standard output, from there
//! to its end, processor time and page faults.
//!
//!     stopwatch RUNS [--mark TEXT] [--json] NAME: COMMAND... , NAME: COMMAND...
//!
//! The mark is the first byte unless a text is given. Ratios are to the first command. Medians: commands take turns, so
//! that a busy moment hits all of them.
#![forbid(unsafe_code)]

use std::io::Read;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// How long nobody runs before a run begins: the kernel clears away after the last one, as long as a grace period.
const SETTLE: Duration = Duration::from_millis(20);

/// What one run took.
#[derive(Clone, Copy, Default)]
struct Lap {
    /// Milliseconds from before exec to the mark.
    mark: f64,
    /// Milliseconds from the mark to the end of the process.
    end: f64,
    /// Milliseconds of processor time, user and system, in steps of the kernel's clock.
    cpu: f64,
    /// Page faults without input or output.
    faults: f64,
}

struct Contender {
    name: String,
    command: Vec<String>,
    laps: Vec<Lap>,
}

fn main() -> ExitCode {
    match race(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("stopwatch: {why}");
            ExitCode::FAILURE
        }
    }
}

fn race(mut words: Vec<String>) -> Result<(), String> {
    let usage = "stopwatch RUNS [--mark TEXT] [--json] NAME: COMMAND... , NAME: COMMAND...";
    if words.is_empty() {
        return Err(usage.into());
    }
    let runs: usize = words.remove(0).parse().map_err(|_| usage)?;
    let (mut mark, mut json) = (None, false);
    while words.first().is_some_and(|word| word.starts_with("--")) {
        match words.remove(0).as_str() {
            "--mark" if !words.is_empty() => mark = Some(words.remove(0)),
            "--json" => json = true,
            _ => return Err(usage.into()),
        }
    }
    let mut contenders: Vec<Contender> = words.split(|word| word == ",").filter_map(contender).collect();
    if contenders.is_empty() {
        return Err(usage.into());
    }
    // The first turn warms caches and is not counted.
    for turn in 0..=runs {
        for contender in &mut contenders {
            let lap = run(&contender.command, mark.as_deref())
                .map_err(|why| format!("{}: {why}", contender.command.join(" ")))?;
            if turn > 0 {
                contender.laps.push(lap);
            }
        }
    }
    report(&contenders, json);
    Ok(())
}

fn contender(words: &[String]) -> Option<Contender> {
    let (name, command) = words.split_first()?;
    let name = name.strip_suffix(':')?.to_owned();
    (!command.is_empty()).then(|| Contender { name, command: command.to_vec(), laps: Vec::new() })
}

fn run(command: &[String], mark: Option<&str>) -> Result<Lap, String> {
    std::thread::sleep(SETTLE);
    let begun = Instant::now();
    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|cause| cause.to_string())?;
    let at_mark = wait_for_mark(&mut child, mark)?;
    // Without reaping it, so that what it took can still be read.
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or("an odd process number")?;
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
        .map_err(|e| format!("wait: {e}"))?;
    let ended = Instant::now();
    let (cpu, faults) = taken(child.id())?;
    child.wait().map_err(|cause| cause.to_string())?;
    let millis = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    Ok(Lap { mark: millis(begun, at_mark), end: millis(at_mark, ended), cpu, faults })
}

fn wait_for_mark(child: &mut Child, mark: Option<&str>) -> Result<Instant, String> {
    let mut output = child.stdout.take().ok_or("no pipe")?;
    let (mut seen, mut at) = (Vec::new(), None);
    let mut buffer = [0; 65536];
    loop {
        let len = output.read(&mut buffer).map_err(|cause| cause.to_string())?;
        let now = Instant::now();
        if len == 0 {
            break;
        }
        if at.is_none() {
            seen.extend(&buffer[..len]);
            let found =
                mark.is_none_or(|mark| seen.windows(mark.len()).any(|window| window == mark.as_bytes()));
            at = found.then_some(now);
        }
    }
    at.ok_or_else(|| format!("it ended without the mark, having said {:?}", String::from_utf8_lossy(&seen)))
}

/// Processor time in milliseconds and minor faults of a process that has ended (proc(5), /proc/PID/stat).
fn taken(pid: u32) -> Result<(f64, f64), String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|cause| cause.to_string())?;
    let rest = stat.rsplit_once(')').ok_or("an odd /proc/PID/stat")?.1;
    let fields: Vec<f64> = rest.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    let field = |number: usize| fields.get(number - 4).copied().unwrap_or(0.0);
    Ok(((field(14) + field(15)) * 10.0, field(10)))
}

fn median(laps: &[Lap], of: impl Fn(&Lap) -> f64) -> f64 {
    let mut values: Vec<f64> = laps.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn report(contenders: &[Contender], json: bool) {
    let first = contenders.first().map_or(1.0, |contender| median(&contender.laps, |lap| lap.mark));
    if !json {
        println!(
            "{:<24} {:>9} {:>9} {:>7} {:>9} {:>7}",
            "", "mark ms", "min ms", "ratio", "end ms", "faults"
        );
    }
    for Contender { name, laps, .. } in contenders {
        let (mark, end) = (median(laps, |lap| lap.mark), median(laps, |lap| lap.end));
        let least = laps.iter().map(|lap| lap.mark).fold(f64::INFINITY, f64::min);
        let (faults, cpu) = (median(laps, |lap| lap.faults), laps.iter().map(|lap| lap.cpu).sum::<f64>());
        if json {
            println!(
                "{}",
                serde_json::json!({"name": name, "runs": laps.len(), "mark_ms": mark, "mark_min_ms": least,
                    "ratio": mark / first, "end_ms": end, "faults": faults, "cpu_ms_of_all": cpu})
            );
        } else {
            println!("{name:<24} {mark:>9.3} {least:>9.3} {:>7.2} {end:>9.3} {faults:>7.0}", mark / first);
        }
    }
}
