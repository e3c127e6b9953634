//! tk: text → tokens → batch → model → loss → checkpoint → graph → session → prediction.

pub mod checkpoint;
pub mod data;
pub mod error;
pub mod files;
pub mod model;

pub use error::{Result, Unusable};
