//! Model definitions: the vocabulary, the families written in it, and the list of their parameters.
//! Knows no candle and no ONNX.

pub mod bert;
pub mod config;
pub mod gpt2;
pub mod heads;
pub mod manifest;
pub mod ops;
pub mod token_ids;

pub use config::{Family, ModelConfig};
pub use ops::Ops;
