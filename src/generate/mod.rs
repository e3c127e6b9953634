//! Generation: prompts in, texts out, through ONNX Runtime.

pub mod beams;
pub mod engine;
mod flags;
pub mod prompt;
pub mod sampler;
pub mod settings;
pub mod text;

pub use engine::{Engine, Finish, Generated, Limits, News, Request};
pub use flags::{Flags, fields, on_cpu};
pub use prompt::{Ends, Prompt, Prompts};
pub use settings::Settings;
