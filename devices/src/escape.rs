//! The escape key: `Ctrl-a` and a letter speak to mayfly, everything else to the guest.

/// `Ctrl-a`, the escape key.
pub const CTRL_A: u8 = 0x01;

/// What `Ctrl-a ?` prints.
pub const HELP: &str = "\r\n\
    Ctrl-a x  end the run\r\n\
    Ctrl-a b  send a break (Linux: the SysRq key follows)\r\n\
    Ctrl-a a  send Ctrl-a itself\r\n\
    Ctrl-a ?  this help\r\n";

/// What a key stroke means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Nothing yet: the escape key waits for its letter.
    Wait,
    /// This byte for the guest.
    Type(u8),
    /// `Ctrl-a` and this byte for the guest: it was no command.
    TypeEscaped(u8),
    /// The end of the run.
    Quit,
    /// Help for the operator.
    Help,
    /// A break condition for the guest.
    Break,
}

/// Remembers whether the escape key was the last one.
#[derive(Debug, Default)]
pub struct Escape {
    waits: bool,
}

impl Escape {
    /// The meaning of the next byte from the terminal.
    pub fn feed(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.waits) {
            self.waits = byte == CTRL_A;
            return if self.waits { Key::Wait } else { Key::Type(byte) };
        }
        match byte {
            b'x' | b'X' => Key::Quit,
            b'?' => Key::Help,
            b'b' => Key::Break,
            b'a' | CTRL_A => Key::Type(CTRL_A),
            other => Key::TypeEscaped(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(keys: &[u8]) -> Vec<Key> {
        let mut escape = Escape::default();
        keys.iter().map(|key| escape.feed(*key)).collect()
    }

    #[test]
    fn keys_after_the_escape_key_are_commands() {
        assert_eq!(feed(b"ax\x01x"), [Key::Type(b'a'), Key::Type(b'x'), Key::Wait, Key::Quit]);
        assert_eq!(feed(b"\x01?\x01b?"), [Key::Wait, Key::Help, Key::Wait, Key::Break, Key::Type(b'?')]);
    }

    #[test]
    fn the_escape_key_itself_can_be_typed() {
        for literal in [b'a', CTRL_A] {
            assert_eq!(feed(&[CTRL_A, literal, b'x']), [Key::Wait, Key::Type(CTRL_A), Key::Type(b'x')]);
        }
    }

    #[test]
    fn what_is_no_command_reaches_the_guest_whole() {
        assert_eq!(feed(b"\x01k"), [Key::Wait, Key::TypeEscaped(b'k')]);
    }
}
