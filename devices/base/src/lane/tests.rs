use super::*;
use rustix::pipe::pipe;

struct Reader {
    from: OwnedFd,
    seen: Vec<u8>,
    alarms: u32,
}

impl Work for Reader {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        ctx.watch(&self.from, 7, Interest::Readable).unwrap();
        Effect::None
    }
    fn ready(&mut self, token: u32, _: &mut Context<'_>) -> Effect {
        if token != 7 {
            self.alarms += 1;
            return Effect::Quit;
        }
        let mut byte = [0; 16];
        let n = rustix::io::read(&self.from, &mut byte).unwrap();
        self.seen.extend(&byte[..n]);
        Effect::None
    }
}

#[test]
fn a_visitor_finds_earlier_events_served() {
    let handle = Lane::spawn("test", |_| ()).unwrap();
    let (from, to) = pipe().unwrap();
    let reader = handle.adopt(Reader { from, seen: Vec::new(), alarms: 0 });
    for round in 0..100u8 {
        rustix::io::write(&to, &[round]).unwrap();
        let last = reader.visit(|reader, _| reader.seen.last().copied()).unwrap();
        assert_eq!(last, Some(round));
    }
    reader.retire();
    assert_eq!(reader.visit(|_, _| ()), None, "work that is gone answers nobody");
    handle.stop();
    let gone = handle.adopt(Reader { from: pipe().unwrap().0, seen: Vec::new(), alarms: 0 });
    assert_eq!(gone.visit(|_, _| ()), None, "a lane that has ended answers nobody");
}

#[test]
fn a_storm_of_letters_delays_no_deadline_and_no_turn() {
    let (mut lane, handle) = Lane::new(|_| ()).unwrap();
    let reader = handle.adopt(Reader { from: pipe().unwrap().0, seen: Vec::new(), alarms: 0 });
    reader.post(|_, ctx| {
        ctx.arm(1, Duration::ZERO);
        Effect::None
    });
    // Each letter sends the next one, as a guest does that never stops.
    fn again(reader: &mut Reader, next: &Handle<Reader>) -> Effect {
        reader.seen.push(0);
        let after = next.clone();
        next.post(move |reader, _| again(reader, &after));
        Effect::None
    }
    let next = reader.clone();
    reader.post(move |reader, _| again(reader, &next));
    let (tell, told) = channel();
    for _ in 0..3 {
        lane.turn(None);
        let tell = tell.clone();
        lane.call(reader.id, |work, _| {
            let reader = (work as &mut dyn Any).downcast_mut::<Reader>().unwrap();
            tell.send((reader.seen.len(), reader.alarms)).unwrap();
            Effect::None
        });
    }
    let told: Vec<_> = told.try_iter().collect();
    assert!(told[0].0 < told[1].0 && told[1].0 < told[2].0, "mail goes on in the next turn: {told:?}");
    assert_eq!(told[2].1, 1, "the deadline was met meanwhile");
}

#[test]
fn deadlines_ring_once_and_can_be_replaced_and_disarmed() {
    let (mut lane, handle) = Lane::new(|_| ()).unwrap();
    let (from, _to) = pipe().unwrap();
    let reader = handle.adopt(Reader { from, seen: Vec::new(), alarms: 0 });
    reader.post(|_, ctx| {
        ctx.arm(1, Duration::from_secs(3600));
        ctx.arm(1, Duration::ZERO);
        ctx.arm(2, Duration::ZERO);
        ctx.disarm(2);
        Effect::None
    });
    lane.turn(Some(Duration::ZERO));
    lane.turn(Some(Duration::ZERO));
    lane.turn(Some(Duration::ZERO));
    let (sender, receiver) = channel();
    reader.post(move |reader, _| {
        sender.send(reader.alarms).unwrap();
        Effect::None
    });
    lane.turn(Some(Duration::ZERO));
    assert_eq!(receiver.recv().unwrap(), 1);
}
