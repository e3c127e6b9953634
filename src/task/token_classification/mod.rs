//! How tags mark entities, and how entities are found and counted.

pub mod decode;
pub mod entities;
pub mod metrics;
pub mod offsets;
pub mod scheme;
