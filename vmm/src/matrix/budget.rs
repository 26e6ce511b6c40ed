//! What cells may take of this machine together.

/// What a cell takes, or all that run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Cells.
    pub cells: usize,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
}

impl Load {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Load) -> Load {
        Load {
            cells: self.cells.saturating_add(other.cells),
            cpus: self.cpus.saturating_add(other.cpus),
            memory: self.memory.saturating_add(other.memory),
        }
    }

    /// Whether `next` may begin while `running` runs. One that is too large for the budget runs alone.
    pub fn admits(self, running: Load, next: Load) -> bool {
        let both = running.and(next);
        running.cells == 0 || both.cells <= self.cells && both.cpus <= self.cpus && both.memory <= self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_run_together_as_far_as_they_fit() {
        let load = |cells, cpus, memory| Load { cells, cpus, memory };
        let budget = load(3, 4, 100);
        let one = load(1, 2, 40);
        assert!(budget.admits(Load::default(), one));
        assert!(budget.admits(one, one));
        assert!(!budget.admits(one.and(one), one), "it is out of CPUs");
        assert!(!budget.admits(load(1, 1, 70), one), "it is out of memory");
        assert!(!budget.admits(load(3, 1, 1), load(1, 1, 1)), "it is out of jobs");
        assert!(budget.admits(Load::default(), load(1, 64, 1000)), "a large one alone");
        assert!(!budget.admits(load(1, 64, 1000), load(1, 1, 1)), "and nothing beside it");
    }
}
