//! Training: encoded examples and a definition → trained parameters, reproducibly.

pub mod checkpoint;
pub mod dry_run;
pub mod log;
pub mod optimizer;
pub mod output;
pub mod plan;
pub mod prepare;
mod run;
pub mod schedule;
pub mod settings;
pub mod split;
pub mod trainer;

pub use run::{Outcome, Run};
pub use settings::Settings;
pub use trainer::Trainer;
