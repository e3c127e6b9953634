//! ONNX Runtime: finding its library, choosing an execution provider, running a model. The only place that
//! says `ort::`.

mod binding;
pub mod decoder;
pub mod library;
mod memory;
mod missing;
mod pages;
mod placement;
pub mod probe;
pub mod providers;
mod rows;
pub mod session;
pub mod slots;
pub mod tensorrt;

pub use decoder::Decoder;
pub use library::{Library, log_to};
pub use pages::gather_pages;
pub use providers::{EpFlags, How, Order, Provider, Providers};
pub use session::{Model, OrtSession, Threads};
pub use slots::Slots;
