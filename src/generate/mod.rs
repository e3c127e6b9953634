//! Generation: prompts in, texts out, through ONNX Runtime.

pub mod beams;
pub mod config;
pub mod engine;
mod measure;
pub mod prompt;
pub mod sampler;
pub mod text;

pub use config::GenerationConfig;
pub use engine::{Engine, Finish, Generated, Limits, News, Request};
pub use measure::{english, measure};
pub use prompt::{Ends, Prompt, Prompts};
