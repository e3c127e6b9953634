//! Predictions through ONNX Runtime: records in, batches by token budget, answers in the order of the input.

pub mod batching;
pub mod output;
pub mod pool;
pub mod served;
pub mod window;

pub use pool::Pool;
