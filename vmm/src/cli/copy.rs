//! `mayfly cp`: files and directories into a running VM, and out of one.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread::{Builder, JoinHandle};

use agent::client::{Process, Streams};
use agent::wire::{Exec, Outcome};
use agent::{parcel, programs};
use base::{Doing, Fail, Result, Why};
use clap::ArgMatches;
use rustix::pipe::{PipeFlags, pipe_with};

use super::exec::reach;
use super::vm::told;
use crate::outcome::code;
use crate::{log, quote};

/// Bytes of a guest's complaint that are read.
const COMPLAINT: u64 = 4096;

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Here(PathBuf),
    There { vm: String, path: PathBuf },
}

impl End {
    /// Reads `[NAME:]PATH`. With a slash before the colon it is a path.
    fn read(text: &OsStr) -> End {
        let bytes = text.as_bytes();
        let colon = bytes.iter().position(|byte| *byte == b':');
        let parts = colon.and_then(|at| Some((bytes.get(..at)?, bytes.get(at.checked_add(1)?..)?)));
        match parts {
            Some((vm, path)) if !vm.is_empty() && !vm.contains(&b'/') => End::There {
                vm: String::from_utf8_lossy(vm).into_owned(),
                path: OsStr::from_bytes(path).into(),
            },
            _ => End::Here(text.into()),
        }
    }
}

/// Carries out `mayfly cp`; its exit code.
pub fn copy(matches: &ArgMatches) -> u8 {
    let end = |key: &str| End::read(matches.get_one::<OsString>(key).map_or(OsStr::new(""), |text| text));
    told(match (end("from"), end("to")) {
        (End::Here(from), End::There { vm, path }) => put(&from, &vm, &path),
        (End::There { vm, path }, End::Here(to)) => get(&vm, &path, &to),
        _ => Err(Fail::new(Why::Usage, "find out what to copy")
            .because("one of the two has to be in a VM, and the other here")
            .hint("an example: mayfly cp report.txt web:/tmp")),
    })
}

/// What a path is called where it arrives.
fn name_of(path: &Path) -> Result<OsString> {
    path.file_name().map(OsStr::to_owned).ok_or_else(|| {
        Fail::new(Why::Usage, format!("copy {}", path.display()))
            .because("it has no name of its own")
            .hint("name the file or the directory itself")
    })
}

fn put(from: &Path, vm: &str, to: &Path) -> Result<u8> {
    let doing = || format!("copy {} to {vm}:{}", from.display(), to.display());
    // As it is called, wherever it leads: `cp .` copies the directory by its name.
    let name = name_of(&std::fs::canonicalize(from).doing(Why::Missing, doing)?)?;
    let name = from.file_name().map_or(name, OsStr::to_owned);
    let task = Task::start(vm, &[programs::UNPACK.as_ref(), place(to).as_os_str(), &name], true)?;
    let packed = parcel::pack(from, &mut BufWriter::with_capacity(64 << 10, task.stream));
    let ended = end(task.process, task.complaint);
    match (packed, ended) {
        // It has told why it took no more.
        (Err(cause), Err(why)) if cause.kind() == std::io::ErrorKind::BrokenPipe => {
            Err(Fail::new(Why::Host, doing()).because(why))
        }
        (Err(cause), _) => Err(Fail::new(Why::Host, doing()).because(cause)),
        (Ok(_), Err(why)) => Err(Fail::new(Why::Host, doing()).because(why)),
        (Ok(left_out), Ok(_)) => {
            if left_out > 0 {
                log::note(&format!("{left_out} special files were left out"));
            }
            Ok(code::DONE)
        }
    }
}

fn get(vm: &str, from: &Path, to: &Path) -> Result<u8> {
    let doing = || format!("copy {vm}:{} to {}", from.display(), to.display());
    let name = name_of(from)?;
    let task = Task::start(vm, &[programs::PACK.as_ref(), place(from).as_os_str()], false)?;
    let mut input = BufReader::with_capacity(64 << 10, task.stream);
    let unpacked = parcel::unpack(&mut input, to, &name);
    // What is not wanted any more is not waited for.
    drop(input);
    let ended = end(task.process, task.complaint);
    match (unpacked, ended) {
        (Err(cause), Err(why)) if cause.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(Fail::new(Why::Missing, doing()).because(why))
        }
        (Err(cause), _) => Err(Fail::new(Why::Host, doing()).because(cause)),
        (Ok(()), Err(why)) => Err(Fail::new(Why::Host, doing()).because(why)),
        (Ok(()), Ok(complaint)) => {
            if !complaint.is_empty() {
                log::note(&complaint);
            }
            Ok(code::DONE)
        }
    }
}

/// A path in the guest: relative ones begin at its root.
fn place(path: &Path) -> PathBuf {
    Path::new("/").join(path)
}

/// A program of the agent's that packs or unpacks.
struct Task {
    process: Process,
    /// What it reads or writes.
    stream: File,
    complaint: JoinHandle<String>,
    _client: agent::client::Client,
}

impl Task {
    fn start(vm: &str, words: &[&OsStr], writes: bool) -> Result<Task> {
        let doing = || format!("copy from or to {vm}");
        let pipe = || pipe_with(PipeFlags::CLOEXEC).doing(Why::Host, doing);
        let (client, _) = reach(vm)?;
        let ((out, inside), (said, complaint)) = (pipe()?, pipe()?);
        let (mine, theirs): (OwnedFd, OwnedFd) = if writes { (inside, out) } else { (out, inside) };
        let (stdin, stdout) = if writes { (Some(theirs), None) } else { (None, Some(theirs)) };
        let argv = [OsStr::new(programs::PATH)].into_iter().chain(words.iter().copied());
        let exec = Exec {
            argv: argv.map(|word| word.as_bytes().to_vec()).collect(),
            directory: b"/".to_vec(),
            user: b"0".to_vec(),
            ..Exec::default()
        };
        let streams = Streams { stdin, stdout, stderr: Some(complaint) };
        let process = client.start(exec, streams).doing(Why::Host, doing)?;
        let complaint = Builder::new()
            .name("complaint".into())
            .spawn(move || {
                let mut text = Vec::new();
                let mut said = File::from(said);
                // The rest is read, too: whoever says more must not wait for us.
                let _ = (&mut said).take(COMPLAINT).read_to_end(&mut text);
                let _ = std::io::copy(&mut said, &mut std::io::sink());
                quote::line(&text)
            })
            .doing(Why::Host, doing)?;
        Ok(Task { process, stream: mine.into(), complaint, _client: client })
    }
}

/// Waits for the end of a task; what it has said besides, or why it failed.
fn end(process: Process, complaint: JoinHandle<String>) -> std::result::Result<String, String> {
    let outcome = process.wait();
    let said = complaint.join().unwrap_or_default();
    match outcome {
        Ok(Outcome::Code(0)) => Ok(said),
        Ok(_) if !said.is_empty() => Err(said),
        Ok(outcome) => Err(format!("its agent ended with {}", outcome.code())),
        Err(cause) => Err(quote::line(cause.to_string().as_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_vm_has_a_name_before_its_colon() {
        let there = |vm: &str, path: &str| End::There { vm: vm.into(), path: path.into() };
        for (text, end) in [
            ("web:/tmp/a", there("web", "/tmp/a")),
            ("web:a:b", there("web", "a:b")),
            ("web:", there("web", "")),
            ("./web:a", End::Here("./web:a".into())),
            ("/a:b", End::Here("/a:b".into())),
            (":a", End::Here(":a".into())),
            ("a", End::Here("a".into())),
        ] {
            assert_eq!(End::read(text.as_ref()), end, "{text}");
        }
        assert_eq!(place(Path::new("tmp/x")), Path::new("/tmp/x"));
        assert_eq!(place(Path::new("/tmp/x/")), Path::new("/tmp/x/"));
    }
}
