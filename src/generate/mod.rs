//! Generation: prompts in, texts out, through ONNX Runtime.

pub mod batch;
pub mod beams;
pub mod config;
pub mod engine;
mod flags;
pub mod logprobs;
pub mod prompt;
pub mod sampler;
mod search;
pub mod text;

pub use config::GenerationConfig;
pub use engine::{Engine, Finish, Generated, Limits, News, Request, RequestId};
pub use flags::{Flags, fields, providers};
pub use logprobs::TokenLogprobs;
pub use prompt::{Ends, Prompt, Prompts};
