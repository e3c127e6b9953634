//! Files → records → tokens → batches.

pub mod batch;
pub mod hub;
pub mod offsets;
pub mod records;
pub mod tokens;
pub mod windows;
