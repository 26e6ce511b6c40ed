//! The program itself: how it finds its streams and signals, its one heap, and what only its start needed.

use std::ffi::{c_int, c_void};
use std::slice;

use rustix::mm::{Advice, madvise};

/// Gives freed heap back to the host, and lets go of the pages of code and constants: those that go on being used come
/// back from the host's page cache one by one, those that read the command line and the kernel do not.
///
/// Costs some ten microseconds, and a minor fault for each 64 KiB that is used again. Under a debugger the pages stay:
/// its breakpoints are in them.
pub fn give_back() {
    if !is_traced(&std::fs::read_to_string("/proc/self/status").unwrap_or_default()) {
        // SAFETY: the callback keeps to the contract of dl_iterate_phdr(3) and uses no data.
        unsafe { libc::dl_iterate_phdr(Some(let_go), std::ptr::null_mut()) };
    }
    // Last: what was needed here goes too.
    // SAFETY: it may be called at any time; it touches what the allocator holds free.
    unsafe { libc::malloc_trim(0) };
}

/// The first thing a program does. All threads share one heap: another for each would cost four system calls and some
/// pages, and who allocates here does so seldom. A reader that has gone away is an error of the write, and no signal. And
/// standard streams that are closed lead to `/dev/null`: the next file to be opened would take their number.
pub fn prepare() {
    // SAFETY: it sets a number of the allocator; a refusal changes nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: no handler is set.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let mut streams = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: the pointer is to as many entries as it says.
    unsafe { libc::poll(streams.as_mut_ptr(), 3, 0) };
    for stream in streams.iter().filter(|stream| stream.revents & libc::POLLNVAL != 0) {
        // The lowest number that is free is this one. Where there is no such file, the stream stays closed.
        // SAFETY: the path is a C string.
        let fd = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
        debug_assert!(fd < 0 || fd == stream.fd);
    }
}

/// Whether `status` is that of a process with a debugger (`proc_pid_status(5)`).
fn is_traced(status: &str) -> bool {
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    tracer.is_some_and(|tracer| tracer.trim() != "0")
}

/// Called for the first object of the process, which is the program.
unsafe extern "C" fn let_go(about: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    const STOP: c_int = 1;
    // SAFETY: dl_iterate_phdr(3) hands over a valid description for the time of the call.
    let about = unsafe { &*about };
    if about.dlpi_phdr.is_null() {
        return STOP;
    }
    // SAFETY: `dlpi_phnum` program headers stand at `dlpi_phdr`.
    let headers = unsafe { slice::from_raw_parts(about.dlpi_phdr, about.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = about.dlpi_addr.wrapping_add(header.p_vaddr);
        let (first, end) = (start & !0xfff, start.wrapping_add(header.p_filesz) & !0xfff);
        let (Ok(at), Ok(len)) = (usize::try_from(first), usize::try_from(end.saturating_sub(first))) else {
            continue;
        };
        // SAFETY: these are whole pages of a mapping of the program's file that nobody but a debugger can have written
        // to (it is not writable), and there is none, so that they read the same when they are faulted in again.
        let _ = unsafe { madvise(std::ptr::with_exposed_provenance_mut(at), len, Advice::LinuxDontNeed) };
    }
    STOP
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Constants that the test can find again.
    static CONSTANTS: [u8; 1 << 20] = [7; 1 << 20];

    #[test]
    fn constants_survive_and_their_pages_are_let_go() {
        let sum = || CONSTANTS.iter().map(|byte| u64::from(std::hint::black_box(*byte))).sum::<u64>();
        assert_eq!(sum(), 7 << 20);
        let before = resident(&CONSTANTS);
        give_back();
        let after = resident(&CONSTANTS);
        assert!(before > 1000 && after < before / 2, "{before} KiB before, {after} after");
        assert_eq!(sum(), 7 << 20);
    }

    #[test]
    fn a_debugger_is_told_by_its_number() {
        assert!(is_traced("Name:\tmayfly\nTracerPid:\t77\nUid:\t0\n"));
        assert!(!is_traced("Name:\tmayfly\nTracerPid:\t0\nUid:\t0\n"));
        assert!(!is_traced(""), "a host that does not tell has none");
    }

    /// KiB of the mapping around `bytes` that this process has in its page tables.
    fn resident(bytes: &[u8]) -> u64 {
        let at = bytes.as_ptr().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| {
            let ends = line.split(' ').next().and_then(|range| range.split_once('-'));
            let ends = ends.and_then(|(a, b)| {
                Some(usize::from_str_radix(a, 16).ok()?..usize::from_str_radix(b, 16).ok()?)
            });
            !ends.is_some_and(|range| range.contains(&at))
        });
        let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}
