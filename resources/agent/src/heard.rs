//! What a host hears of its guest while programs run in it.

use crate::wire::{Message, Stream};

/// Something that the guest has said.
#[derive(Debug)]
pub enum Said<'a> {
    /// Its kernel, a line.
    Kernel(Message),
    /// A program, some bytes of a stream, before they are written.
    Program(Stream, &'a [u8]),
}

/// Who is told of it, on the thread that carries it: it holds up what is told next.
pub type Heard = Box<dyn Fn(Said<'_>) + Send + Sync>;
