//! The network card.

mod guest;
mod links;
mod rules;
mod user;
