//! Machines that run, from the outside: those without an agent, which anybody can list, look at and end.

use super::kernel;
use crate::ground::quote;
use crate::harness::Case;

pub fn cases() -> Vec<Case> {
    vec![in_the_background()]
}

/// A machine in the background is found by its name, ends as it is told to, and leaves nothing when it is killed.
fn in_the_background() -> Case {
    Case::new("bare::control_from_the_outside", |room| {
        let (kernel, options) = (kernel(room, "sleep")?, room.ground.options());
        let mayfly = quote(&room.mayfly.display().to_string());
        let script = format!(
            "export XDG_RUNTIME_DIR=$PWD; M={mayfly}; V=\"$M run {options} --kernel {kernel} --serial none\"
            echo name=$($V -d --name quiet); $V -d --name quiet 2>twice; echo twice=$?
            echo listed=$($M ps -q); $M inspect quiet --json >state; grep -o '\"state\":\"running\"' state
            $M exec quiet -- true 2>exec; echo exec=$?
            $M set quiet rng rate=1 2>set; echo set=$?; $M set quiet disk0 size=1 2>none; echo none=$?
            echo stop=$($M stop quiet); echo wait=$($M wait quiet); echo all=$($M ps -aq); echo rm=$($M rm quiet)
            $V -d --rm --name brief >/dev/null; $M kill brief >/dev/null; echo brief=$($M ps -aq)
            $V -d --name hard >/dev/null; kill -9 $($M ps --json | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')
            $M wait hard 2>/dev/null; echo lost=$?; echo left=$($M ps -aq); ls -d mayfly 2>/dev/null || echo gone=yes
            cat twice exec set none"
        );
        let output = room.shell(&script)?;
        for wanted in [
            "name=quiet\ntwice=2\nlisted=quiet\n\"state\":\"running\"\nexec=2\nset=125\nnone=2\n",
            "stop=quiet\nwait=143\nall=quiet\nrm=quiet\nbrief=\nlost=125\nleft=\ngone=yes\n",
            "call the VM quiet: there is a running VM of that name\n  hint: ",
            "reach the agent of quiet: it has none\n  hint: ",
            "change rng: it has no settings that can change while it runs\n",
            "change disk0: the VM has no such device, or none that can change\n  hint: those it has: rng\n",
        ] {
            output.mentions(wanted)?;
        }
        Ok(())
    })
}
