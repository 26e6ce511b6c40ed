//! Cases with guests of a few instructions: they run on any KVM, within milliseconds.

use std::time::Duration;

use crate::harness::{Case, Room, Stop, Verdict};
use crate::image;

mod bisect;
mod console;
mod control;
mod ends;
mod matrix;
mod metrics;
mod terminal;
mod wrong;

/// A guest of a few instructions that is still there after this time hangs, even on an emulated host.
const LIMIT: Duration = Duration::from_secs(40);

/// All of them.
pub fn cases() -> Vec<Case> {
    let all = [
        ends::cases(),
        console::cases(),
        terminal::cases(),
        wrong::cases(),
        metrics::cases(),
        matrix::cases(),
        bisect::cases(),
        control::cases(),
    ]
    .into_iter()
    .flatten();
    all.map(|Case { name, run }| Case {
        name,
        run: Box::new(move |room| {
            room.limit = LIMIT;
            run(room)
        }),
    })
    .collect()
}

/// A case that runs the guest `name` and looks at what came of it.
fn guest(
    case: &str,
    name: &'static str,
    arguments: &'static str,
    check: impl Fn(&crate::ground::Output) -> Verdict + 'static,
) -> Case {
    Case::new(format!("bare::{case}"), move |room| {
        let kernel = kernel(room, name)?;
        let output = room.guest(&format!("--kernel {kernel} {arguments}"))?;
        check(&output)
    })
}

/// The image of a guest, as shell text.
fn kernel(room: &Room<'_>, name: &str) -> Result<String, Stop> {
    let code = *crate::guests::all().get(name).ok_or_else(|| format!("find the guest {name}"))?;
    Ok(room.file(&format!("{name}.elf"), image::elf(code, name == "pvh"))?.display().to_string())
}
