//! One file a command: checked settings → work → a result. Each reads top to bottom.

pub mod bench;
pub mod completions;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod models;
pub mod parity;
pub mod serve;
pub mod serve_batch;
pub mod train;
