//! A column in which results stand: what was promised there, and what came.

/// What was promised in a column, and what came.
#[derive(Clone, Debug, Default)]
pub struct Level {
    planned: Option<u64>,
    /// The plan came after results, which is how some end.
    late: bool,
    /// Results with a number, and those without one that their numbers leave room for.
    seen: u64,
    /// Results without a number since the last one that has one.
    plain: u64,
    /// The last number, once there is one, and whether there was a 1.
    last: Option<u64>,
    first: bool,
    /// There was a version, or a result: a plan alone may be anything.
    sure: bool,
    /// How the first plan that was not kept was missed.
    short: Option<String>,
}

impl Level {
    /// A version.
    pub fn begin(&mut self) {
        self.end();
        self.sure = true;
    }

    /// A plan. A second one without a version before it is of a second document all the same.
    pub fn plan(&mut self, count: u64) {
        if self.is_planned() {
            self.end();
        }
        self.late = self.came() > 0;
        self.planned = Some(count);
    }

    /// Whether there is a plan.
    pub fn is_planned(&self) -> bool {
        self.planned.is_some()
    }

    /// Whether results may come without a number here: some were promised, and none has had one so far.
    pub fn is_lax(&self) -> bool {
        self.is_planned() && self.last.is_none()
    }

    /// Whether a result with this number begins another document: its count begins anew.
    pub fn is_over(&self, number: Option<u64>) -> bool {
        let complete = self.planned.is_some_and(|planned| self.late || self.seen >= planned);
        let further = self.is_planned() && self.last.is_some_and(|last| last > 1);
        self.first && number == Some(1) && (complete || further)
    }

    /// A result.
    pub fn count(&mut self, number: Option<u64>) {
        self.sure = true;
        let Some(number) = number else {
            self.plain = self.plain.saturating_add(1);
            return;
        };
        // A line that begins with `ok` and has no number may be no result where others have one.
        let room = number.saturating_sub(self.last.unwrap_or(0)).saturating_sub(1);
        self.seen = self.seen.saturating_add(1).saturating_add(self.plain.min(room));
        self.plain = 0;
        self.last = Some(number);
        self.first |= number == 1;
    }

    /// The whole was given up: nothing more is promised.
    pub fn give_up(&mut self) {
        self.planned = None;
    }

    /// The end of a document.
    pub fn end(&mut self) {
        let came = self.came();
        let planned = self.planned.filter(|planned| self.sure && *planned > came);
        let short = planned.map(|planned| format!("{came} of {planned} results came"));
        *self = Level { sure: self.sure, short: self.short.take().or(short), ..Level::default() };
    }

    /// How a plan was missed before the last end.
    pub fn take_short(&mut self) -> Option<String> {
        self.short.take()
    }

    fn came(&self) -> u64 {
        if self.last.is_some() { self.seen } else { self.plain }
    }
}
