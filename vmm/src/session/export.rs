//! What the guest has changed of its root, as a file of this host: it is there whole, or not at all.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use agent::client::{Client, Streams};
use agent::programs;
use agent::wire::{Exec, Outcome};
use base::{Doing, Fail, Result, Why};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use rustix::io::Errno;

/// A file that has no name, or another one, until it is whole.
#[derive(Debug)]
pub struct Export {
    file: File,
    path: PathBuf,
    /// The name it has meanwhile, where the file system knows no file without one; and the one it passes through.
    other: PathBuf,
    named: bool,
}

impl Export {
    /// Makes it, in the directory of what it will be, so that what is wrong with that is found before the run.
    ///
    /// # Errors
    /// There is something else in its place, or no file can be made there.
    pub fn open(path: &Path) -> Result<Export> {
        let doing = || format!("export changes to {}", path.display());
        // The file that a link stands for is replaced, not the link.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if path.metadata().is_ok_and(|found| !found.is_file()) {
            let fail = Fail::new(Why::Usage, doing()).because("what is there is no regular file");
            return Err(fail.hint("name a file: it is written whole, or not at all"));
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}", std::process::id()));
        let other = parent.join(name);
        let mode = Mode::from_raw_mode(0o666);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let (made, named) = match rustix::fs::open(parent, flags | OFlags::TMPFILE, mode) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                (rustix::fs::open(&other, flags | OFlags::CREATE | OFlags::EXCL, mode), true)
            }
            made => (made, false),
        };
        let file = made.map_err(|errno| base::fail::unreadable(doing(), parent, errno.into()))?;
        Ok(Export { file: file.into(), path, other, named })
    }

    /// Takes the changes from the guest, and puts the file in its place.
    ///
    /// # Errors
    /// The guest did not tell all, or it cannot be written.
    pub fn take(mut self, client: &Client) -> Result<()> {
        let doing = || format!("export changes to {}", self.path.display());
        let word = |text: &str| text.as_bytes().to_vec();
        let argv = vec![word(programs::PATH), word(programs::LAYER)];
        let exec = Exec { argv, directory: word("/"), ..Exec::default() };
        let out = self.file.as_fd().try_clone_to_owned().doing(Why::Host, doing)?;
        let streams = Streams { stdout: Some(out), ..Streams::default() };
        let process = client.start(exec, streams).doing(Why::Host, doing)?;
        let outputs = process.outputs();
        let outcome = process.wait().doing(Why::Host, doing)?;
        if let Some(cause) = outputs.error() {
            return Err(Fail::new(Why::Host, doing()).because(cause.to_string()));
        }
        let refused = match outcome {
            Outcome::Code(0) => None,
            Outcome::Code(errno) if errno < u8::MAX => {
                Some(io::Error::from_raw_os_error(errno.into()).to_string())
            }
            _ => Some("the guest's agent did not come to its end".to_owned()),
        };
        if let Some(cause) = refused {
            return Err(Fail::new(Why::Host, format!("read what the guest has changed: {cause}")));
        }
        let told = doing();
        self.keep().doing(Why::Host, || told)
    }

    /// Puts it in its place, over what may be there.
    fn keep(&mut self) -> io::Result<()> {
        if !self.named {
            let nameless = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            linkat(CWD, nameless, CWD, &self.other, AtFlags::SYMLINK_FOLLOW)?;
            self.named = true;
        }
        std::fs::rename(&self.other, &self.path)?;
        self.named = false;
        Ok(())
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if self.named {
            // Half a file is none.
            let _ = std::fs::remove_file(&self.other);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use agent::wire::{Decoder, FROM_HOST, Frame, Stream, VERSION};

    use super::*;

    fn names(place: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(place).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_file_is_there_whole_or_not_at_all() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a.tar");
        std::fs::write(&path, "old").unwrap();
        std::os::unix::fs::symlink("a.tar", place.path().join("link")).unwrap();
        for named in [false, true] {
            let open = || {
                let mut export = Export::open(&place.path().join("link")).unwrap();
                if named {
                    // As where there are no files without a name.
                    export.file = File::create_new(&export.other).unwrap();
                    export.named = true;
                }
                export
            };
            let mut export = open();
            export.file.write_all(b"half").unwrap();
            drop(export);
            assert_eq!(names(place.path()), ["a.tar", "link"]);
            let before = std::fs::read(&path).unwrap();
            assert_ne!(before, b"half");
            let mut export = open();
            export.file.write_all(b"whole").unwrap();
            export.keep().unwrap();
            drop(export);
            assert_eq!(std::fs::read(&path).unwrap(), b"whole");
            assert_eq!(names(place.path()), ["a.tar", "link"], "the link still leads there");
            std::fs::write(&path, "old").unwrap();
        }
    }

    /// A guest that answers the first program it is asked for with these frames, and says no more.
    fn guest(answers: &'static [Frame]) -> Client {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let say = |to: &mut UnixStream, frame: &Frame| {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            to.write_all(&bytes).unwrap();
        };
        say(&mut theirs, &Frame::Hello { version: VERSION });
        std::thread::spawn(move || {
            let mut decoder = Decoder::new(FROM_HOST);
            let mut bytes = [0; 4096];
            loop {
                match decoder.next_frame().unwrap() {
                    Some(Frame::Exec { .. }) => break,
                    Some(_) => {}
                    None => {
                        let n = theirs.read(&mut bytes).unwrap();
                        decoder.feed(&bytes[..n]);
                    }
                }
            }
            answers.iter().for_each(|frame| say(&mut theirs, frame));
            // A guest whose program has ended stays as long as its host does.
            if !matches!(answers.last(), Some(Frame::Exit { .. })) {
                theirs.shutdown(std::net::Shutdown::Write).unwrap();
            }
            // What the host still has to say finds somebody.
            while theirs.read(&mut bytes).is_ok_and(|n| n > 0) {}
        });
        Client::connect(ours.into(), Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn half_of_what_a_guest_has_to_tell_is_nothing() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a.tar");
        let data = || Frame::Data { id: 1, stream: Stream::Stdout, bytes: b"half".to_vec() };
        let exit = |code| Frame::Exit { id: 1, outcome: Outcome::Code(code) };
        for (answers, told) in [
            (
                vec![data(), exit(28)],
                "read what the guest has changed: No space left on device (os error 28)",
            ),
            (
                vec![data(), exit(255)],
                "read what the guest has changed: the guest's agent did not come to its end",
            ),
            // It may be gone before all is asked.
            (vec![data()], ""),
        ] {
            let text = Export::open(&path).unwrap().take(&guest(answers.leak())).unwrap_err().to_string();
            assert!(text.ends_with(told), "{text}");
            assert!(names(place.path()).is_empty(), "{told}");
        }
        Export::open(&path).unwrap().take(&guest(vec![data(), exit(0)].leak())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"half");
    }

    #[test]
    fn what_is_no_place_for_a_file_is_refused_before_the_run() {
        let place = tempfile::tempdir().unwrap();
        let told = |path: &Path| Export::open(path).unwrap_err().to_string();
        let missing = told(&place.path().join("no/a.tar"));
        assert!(missing.contains("/no/a.tar: ") && missing.contains("hint: "), "{missing}");
        assert!(told(place.path()).contains("what is there is no regular file"));
        assert!(told(Path::new("/dev/null")).contains("what is there is no regular file"));
        assert!(names(place.path()).is_empty());
    }
}
