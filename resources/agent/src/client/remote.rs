//! What can be said to a program that another thread waits for.

use std::io;

use super::Remote;
use crate::wire::{Frame, Size};

impl Remote {
    /// Sends a signal to the program's process group.
    ///
    /// # Errors
    /// The wire is dead.
    pub fn signal(&self, number: u8) -> io::Result<()> {
        self.link.send(&Frame::Signal { id: self.id, number })
    }

    /// Asks the guest for another call, and another wire.
    ///
    /// # Errors
    /// The wire is dead.
    pub fn ask_for_call(&self) -> io::Result<()> {
        self.link.send(&Frame::Call)
    }

    /// Tells the program's terminal its size.
    ///
    /// # Errors
    /// The wire is dead.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        self.link.send(&Frame::Resize { id: self.id, size })
    }
}
