//! Files → records → tokens → batches.

pub mod batch;
pub mod hub;
pub mod records;
pub mod tokens;
pub mod windows;
