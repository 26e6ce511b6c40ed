//! A vCPU's life: exit in, entry out, until the run is over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

use base::{Doing, Result, Why};

use super::board::Board;
use super::control::{Reports, end_of_vcpu};
use super::scout::{Job, Scout};
use crate::hv::{Kick, Stand, Vcpu};
use crate::outcome::End;

/// A vCPU on its thread.
pub struct Running {
    kick: Arc<dyn Kick>,
    /// Where it stood, if the board wants to know. Closed when the vCPU is gone.
    gone: Receiver<Stand>,
}

impl Running {
    /// Starts the vCPU: the first on the thread of `scout` if there is one, others on threads of their own.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub fn start(
        id: u32,
        mut vcpu: Box<dyn Vcpu>,
        board: Arc<Board>,
        reports: Reports,
        scout: Option<&Scout>,
    ) -> Result<Running> {
        let kick = vcpu.kick();
        let (present, gone) = channel();
        let job: Job = Box::new(move || {
            if let Some(end) = live(vcpu.as_mut(), &board) {
                reports.end(end);
            } else if board.examine.load(Ordering::SeqCst)
                && let Ok(stand) = vcpu.stand()
            {
                let _ = present.send(stand);
            }
            drop((vcpu, board, present));
        });
        match scout {
            Some(scout) if id == 0 => scout.run(job)?,
            _ => drop(
                std::thread::Builder::new()
                    .name(format!("vcpu{id}"))
                    .spawn(job)
                    .doing(Why::Host, || format!("start the thread of vCPU {id}"))?,
            ),
        }
        Ok(Running { kick, gone })
    }

    /// Gets the vCPU out of the guest and waits until it is gone. The board says that the run is over. Where it stood, if
    /// the board wants to know.
    pub fn stop(self) -> Option<Stand> {
        self.kick.kick();
        // The vCPU's end closes the channel, a panic of its thread too.
        self.gone.iter().last()
    }
}

/// Runs the vCPU until its loop ends; what that means for the run.
fn live(vcpu: &mut dyn Vcpu, board: &Board) -> Option<End> {
    loop {
        match vcpu.run() {
            Ok(exit) => {
                if let Some(leave) = board.handle(exit) {
                    return end_of_vcpu(leave, || vcpu.whereabouts());
                }
            }
            Err(fail) => return Some(End::HostError(fail)),
        }
    }
}
