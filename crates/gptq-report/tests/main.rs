//! The page and the card, from a committed set of reports.

mod card;
mod contrast;
mod damaged;
mod earlier;
mod fixture;
mod page;
