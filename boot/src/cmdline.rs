//! The kernel command line: joined, checked and limited before a guest gets it.

use base::{Fail, Result, Why};

/// Joins parts with single spaces, leaving out empty ones.
pub fn join<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Sees to it that a kernel takes the command line as it stands; `limit` counts its bytes with the terminating zero.
///
/// # Errors
/// It is too long, or has a byte that would end it early or mean something else to the kernel.
pub fn check(cmdline: &str, limit: usize) -> Result<()> {
    let fail = || Fail::new(Why::Invalid, "pass the kernel command line");
    if let Some((at, odd)) = cmdline.char_indices().find(|(_, c)| !matches!(c, ' '..='~' | '\t')) {
        return Err(fail().because(format!(
            "it has the character {odd:?} at byte {at}, and printable ASCII only is safe"
        )));
    }
    let len = cmdline.len().saturating_add(1);
    if len > limit {
        return Err(fail()
            .because(format!(
                "it has {} bytes, and this kernel takes {}",
                cmdline.len(),
                limit.saturating_sub(1)
            ))
            .hint("shorten it, or put settings into the initrd or the root file system"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_what_is_there() {
        assert_eq!(join(["console=ttyS0 ", "", " quiet  x", "  "]), "console=ttyS0 quiet  x");
        assert_eq!(join([]), "");
    }

    #[test]
    fn refuses_what_a_kernel_would_misread() {
        assert!(check("a\tb c=\"d e\"", 2048).is_ok());
        assert!(check("1234567", 8).is_ok());
        assert_eq!(
            check("12345678", 8).unwrap_err().summary(),
            "pass the kernel command line: it has 8 bytes, and this kernel takes 7"
        );
        for bad in ["a\0b", "a\nb", "ä", "a\u{7f}"] {
            assert!(check(bad, 2048).is_err(), "{bad:?}");
        }
    }
}
