//! The page and the card, from a committed set of reports.

mod card;
mod fixture;
mod page;
