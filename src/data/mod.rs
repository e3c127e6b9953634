//! Files → records → tokens → batches.

pub mod batch;
pub mod cache;
pub mod hub;
mod in_order;
pub mod offsets;
pub mod records;
pub mod tokens;
pub mod windows;

pub use in_order::in_order;

/// A few pages of English, out of books whose authors are long dead: what a model is measured on where nothing else is
/// given.
pub fn english() -> impl Iterator<Item = &'static str> {
    include_str!("english.txt").split("\n\n").map(str::trim)
}
