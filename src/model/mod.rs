//! Model definitions: the vocabulary, the families written in it, and the list of their parameters.
//! Knows no candle and no ONNX. A family is one file and its name in [`family`].

pub mod bert;
pub mod config;
pub mod deberta_v2;
pub mod distilbert;
pub mod electra;
pub mod family;
pub mod gpt2;
pub mod lora;
pub mod manifest;
pub mod modernbert;
pub mod mpnet;
pub mod ops;
pub mod roberta;
pub mod token_ids;

pub use config::ModelConfig;
pub use family::{Architecture, Family, Head};
pub use ops::Ops;
