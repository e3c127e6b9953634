//! Training: encoded examples and a definition → trained parameters, reproducibly.

pub mod audit;
pub mod checkpoint;
pub mod dry_run;
pub mod ema;
pub mod events;
mod exchange;
pub mod gradients;
pub mod log;
pub mod lora;
pub mod not_finite;
pub mod optimizer;
pub mod output;
pub mod plan;
pub mod prepare;
pub mod rates;
mod run;
pub mod schedule;
pub mod settings;
pub mod split;
pub mod stream;
pub mod supply;
pub mod teacher;
pub mod trainer;
pub mod verify;

pub use run::{End, Outcome, Run};
pub use settings::Settings;
pub use trainer::Trainer;
