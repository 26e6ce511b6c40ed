//! A matrix: one command line in many variants, kernels and roots and options combined, and one report of it.
//!
//! [`file`] reads what was asked for, [`cells`] makes a list of runs of it, [`crew`] carries them out as processes within a
//! [`budget`], and [`report`] tells what came of them.

pub mod budget;
pub mod cells;
pub mod crew;
pub mod file;
pub mod junit;
pub mod outcome;
pub mod report;
mod stream;
