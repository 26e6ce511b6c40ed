//! The desk: what can be asked of a machine while it runs. It is on the control lane, which owns the machine.

use std::sync::Arc;

use base::{Doing, Fail, Result, Why};
use devices::virtio::Knob;
use serde_json::{Value, json};

use super::control::Reports;
use super::host_objects;
use super::metrics::Sources;
use crate::control::presence::Presence;
use crate::control::server::{Reply, Server};
use crate::control::wire::Request;
use crate::host::switchboard::Switchboard;
use crate::outcome::End;
use crate::plan::{PORT, Plan};
use crate::session::reach::{Reach, Told};

/// Why a guest that hangs cannot be told anything more.
const DEAF: &str = "the guest does not take what it was told before";

/// What a machine has to show and to change, for whoever asks.
#[derive(Clone)]
pub struct Exhibits {
    /// The counters.
    pub sources: Sources,
    /// What can be changed, by the names of devices.
    pub knobs: Vec<(String, Knob)>,
}

/// Answers for a machine.
struct Desk {
    presence: Presence,
    plan: Arc<Plan>,
    exhibits: Exhibits,
    reports: Reports,
    reach: Option<Reach>,
    switchboard: Switchboard,
}

/// What the desk of a machine needs besides the machine.
#[derive(Clone)]
pub struct Opening {
    /// How others find it.
    pub presence: Presence,
    /// Who answers the guest's calls.
    pub switchboard: Switchboard,
}

impl Opening {
    /// Opens the desk once the lane turns: the guest runs by then, and does not wait for it.
    pub fn open(&self, plan: &Plan, exhibits: Exhibits, reports: &Reports, reach: Option<Reach>) {
        let Opening { presence, switchboard } = self.clone();
        let (standing, reported, alone) = (presence.clone(), reports.clone(), reach.is_none());
        let plan = Arc::new(plan.clone());
        let mut desk = Desk { presence, plan, exhibits, reports: reports.clone(), reach, switchboard };
        let listen = move || {
            let socket = standing.socket();
            if alone && !standing.rise() {
                reported.end(End::Quit);
            }
            socket
        };
        reports.lane.adopt(Server::new(Box::new(listen), Box::new(move |request| desk.answer(request))));
    }
}

impl Desk {
    fn answer(&mut self, request: Request) -> Reply {
        Reply::Told(match request {
            Request::Inspect => self.inspect(),
            Request::Stop => {
                // A guest that does not take it is ended by who waits for its end.
                let _ = self.signal(15, 15);
                Ok(Value::Null)
            }
            Request::Kill { signal: None } => {
                self.reports.end(End::Signalled(9));
                Ok(Value::Null)
            }
            Request::Kill { signal: Some(number) } if (1..=64).contains(&number) => {
                self.signal(number, number.into())
            }
            Request::Kill { signal: Some(number) } => {
                Err(Fail::new(Why::Usage, "send a signal").because(format!("{number} is the number of none")))
            }
            Request::Agent => return self.agent(),
            Request::Set { device, change } => self.set(&device, &change),
        })
    }

    /// A signal for the command; without one, the run ends with it.
    fn signal(&self, number: u8, end: i32) -> Result<Value> {
        match self.reach.as_ref().map_or(Told::Nobody, |reach| reach.signal(number)) {
            Told::Sent => {}
            Told::Nobody => self.reports.end(End::Signalled(end)),
            Told::Deaf => {
                let name = self.presence.name();
                return Err(Fail::new(Why::Host, format!("send a signal to the command of {name}"))
                    .because(DEAF)
                    .hint(format!("end it: mayfly kill {name}")));
            }
        }
        Ok(Value::Null)
    }

    fn agent(&self) -> Reply {
        let doing = || Fail::new(Why::Usage, format!("reach the agent of {}", self.presence.name()));
        let (Some(reach), Some(command)) = (&self.reach, &self.plan.command) else {
            return Reply::Told(Err(doing()
                .because("it has none")
                .hint("start the VM with a command, or with --root and without one")));
        };
        if !reach.is_there() {
            let why = if self.presence.is_up() { "its command has ended" } else { "it has not called yet" };
            return Reply::Told(Err(doing().because(why)));
        }
        if reach.is_deaf() {
            return Reply::Told(Err(doing().because(DEAF)));
        }
        let (reach, switchboard) = (reach.clone(), self.switchboard.clone());
        // What a program finds there unless it is told otherwise.
        let usual = json!({ "env": command.env, "workdir": command.workdir, "user": command.user });
        Reply::Given(
            usual,
            Box::new(move |socket| {
                switchboard.put(PORT, socket);
                reach.ask_for_call();
            }),
        )
    }

    fn set(&self, device: &str, change: &str) -> Result<Value> {
        let knobs = &self.exhibits.knobs;
        if let Some((_, knob)) = knobs.iter().find(|(name, _)| name == device) {
            return knob.tune(change).map(|()| Value::Null);
        }
        let names: Vec<&str> = knobs.iter().map(|(name, _)| name.as_str()).collect();
        Err(Fail::new(Why::Usage, format!("change {device}"))
            .because("the VM has no such device, or none that can change")
            .hint(format!("those it has: {}", names.join(", "))))
    }

    fn inspect(&self) -> Result<Value> {
        let plan = serde_json::to_value(self.plan.as_ref());
        let mut object = json!({
            "name": self.presence.name(),
            "state": if self.presence.is_up() { "running" } else { "starting" },
            "about": self.presence.about(),
            "agent": self.reach.as_ref().is_some_and(Reach::is_there),
            "plan": plan.doing(Why::Invalid, || "write the plan down")?,
            "host_objects": host_objects::list(),
        });
        if let Some(object) = object.as_object_mut() {
            let sources = &self.exhibits.sources;
            object.insert("counters".to_owned(), sources.machine().into());
            object.insert("device_counters".to_owned(), sources.devices().into());
        }
        Ok(object)
    }
}
