//! The page and the card, from a committed set of reports.

mod card;
mod damaged;
mod earlier;
mod fixture;
mod page;
