//! tk: text → tokens → batch → model → loss → checkpoint → graph → session → prediction.

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod cmd;
pub mod data;
pub mod device;
pub mod eager;
pub mod error;
pub mod export;
pub mod files;
pub mod generate;
pub mod html;
pub mod model;
pub mod onnx;
pub mod parity;
pub mod predict;
pub mod process;
pub mod report;
pub mod runtime;
pub mod saved;
pub mod say;
pub mod server;
pub mod sweep;
pub mod task;
pub mod train;
pub mod world;

pub use error::{Result, Unusable};
