//! Writes the kernel image of a bare-metal guest, for benchmarks and for trying things by hand.
//!
//!     guest NAME FILE [MIB]       filled up to so many MiB, all of it loaded
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let guests = tests::guests::all();
    let [name, file, size @ ..] = arguments.as_slice() else {
        eprintln!("guest NAME FILE [MIB], with NAME one of {:?}", guests.keys());
        return ExitCode::from(2);
    };
    let Some(code) = guests.get(name.as_str()) else {
        eprintln!("there is no guest {name} among {:?}", guests.keys());
        return ExitCode::from(2);
    };
    let mut code = code.to_vec();
    let mib = size.first().and_then(|mib| mib.parse::<usize>().ok()).unwrap_or(0);
    // Bytes that differ: zeroes would let the host cheat.
    let filler = (code.len()..mib << 20).map(|at| u8::try_from(at % 251).unwrap_or(0));
    code.extend(filler);
    match std::fs::write(file, tests::image::elf(&code, name == "pvh")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("write {file}: {cause}");
            ExitCode::FAILURE
        }
    }
}
