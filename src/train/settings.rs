//! What a training run is asked to do: the same on the command line, in a `--config` file and in what a run saves.

use clap::builder::ArgPredicate;
use serde::{Deserialize, Serialize};

use super::plan::Budget;
use super::schedule::Schedule;
use crate::device::Precision;
use crate::{Result, bail_unusable};

/// The regime. Defaults are those that BERT's fine-tuning is known to need.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Passes over the training data.
    #[arg(long, default_value_t = 3, value_name = "N", alias = "num-train-epochs", help_heading = "Regime")]
    pub epochs: usize,
    /// Stop after this many optimizer steps, and plan the schedule for them.
    #[arg(long, value_name = "N", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// Examples of one forward pass.
    #[arg(
        long,
        default_value = "16",
        default_value_if("batch_tokens", ArgPredicate::IsPresent, None),
        value_name = "N",
        alias = "per-device-train-batch-size",
        conflicts_with = "batch_tokens",
        help_heading = "Regime"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,
    /// Tokens of one forward pass, instead of --batch-size: as many whole examples as fit, of about one length.
    /// No example is cut for it: one that has more tokens (--max-length allows it) is a pass of its own.
    #[arg(long, value_name = "N", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_tokens: Option<usize>,
    /// Forward passes of one optimizer step; the loss is a mean over all their examples.
    #[arg(
        long,
        default_value_t = 1,
        value_name = "N",
        alias = "gradient-accumulation-steps",
        help_heading = "Regime"
    )]
    pub gradient_accumulation: usize,
    /// Tokens of the longest example, special tokens included; what is longer is cut.
    #[arg(long, default_value_t = 128, value_name = "N", alias = "max-seq-length", help_heading = "Regime")]
    pub max_length: usize,
    /// The learning rate at its peak.
    #[arg(long, default_value_t = 5e-5, value_name = "X", help_heading = "Regime")]
    pub learning_rate: f64,
    /// What the learning rate does after the warm-up.
    #[arg(long, value_enum, default_value_t = Schedule::Linear, alias = "lr-scheduler-type", help_heading = "Regime")]
    pub schedule: Schedule,
    /// The share of all steps in which the learning rate rises from 0.
    #[arg(long, default_value_t = 0.1, value_name = "X", help_heading = "Regime")]
    pub warmup_ratio: f64,
    /// AdamW's decoupled weight decay, on everything but biases and layer norms.
    #[arg(long, default_value_t = 0.01, value_name = "X", help_heading = "Regime")]
    pub weight_decay: f64,
    /// AdamW's decay of the gradient's mean.
    #[arg(long, default_value_t = 0.9, value_name = "X", help_heading = "Regime")]
    pub adam_beta1: f64,
    /// AdamW's decay of the squared gradient's mean.
    #[arg(long, default_value_t = 0.999, value_name = "X", help_heading = "Regime")]
    pub adam_beta2: f64,
    /// What AdamW adds to the denominator.
    #[arg(long, default_value_t = 1e-8, value_name = "X", help_heading = "Regime")]
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm; 0 leaves them as they are.
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Regime")]
    pub max_grad_norm: f64,
    /// The share of the target that is spread over all labels.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "X",
        alias = "label-smoothing-factor",
        help_heading = "Regime"
    )]
    pub label_smoothing: f64,
    /// Every dropout probability of the model, instead of the configuration's.
    #[arg(long, value_name = "P", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f32>,
    /// Keep less of the forward pass and compute it again in the backward pass: less memory, some more time, the
    /// same numbers. On the CPU.
    #[arg(long, alias = "gradient-checkpointing", help_heading = "Regime")]
    #[serde(default)]
    pub checkpoint_activations: bool,
    /// The seed of the new weights, the order of the examples and dropout.
    #[arg(long, default_value_t = 42, value_name = "N", help_heading = "Regime")]
    pub seed: u64,
    /// What a GPU computes in: fp32, or bf16 with weights and the optimizer's state in fp32. Evaluations and what is
    /// saved are fp32 in both.
    #[arg(long, value_enum, default_value_t = Precision::Fp32, help_heading = "Regime")]
    #[serde(default)]
    pub precision: Precision,
    /// Take the examples in the order of the file.
    #[arg(long, help_heading = "Regime")]
    #[serde(default)]
    pub no_shuffle: bool,
    /// Evaluate every N steps, instead of after every epoch.
    #[arg(long, value_name = "N", alias = "eval-steps", help_heading = "Evaluation and checkpoints")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<usize>,
    /// Write a checkpoint every N steps, instead of after every epoch.
    #[arg(long, value_name = "N", alias = "save-steps", help_heading = "Evaluation and checkpoints")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_every: Option<usize>,
    /// How many checkpoints are kept, the newest.
    #[arg(
        long,
        default_value_t = 1,
        value_name = "N",
        alias = "save-total-limit",
        help_heading = "Evaluation and checkpoints"
    )]
    pub keep_checkpoints: usize,
    /// Stop after this many evaluations without a better one.
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<usize>,
    /// The metric that decides which evaluation is the best [default: accuracy, f1_micro or mse].
    #[arg(
        long,
        value_name = "NAME",
        alias = "metric-for-best-model",
        help_heading = "Evaluation and checkpoints"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_metric: Option<String>,
}

impl Default for Settings {
    /// The command line's defaults.
    fn default() -> Self {
        #[derive(clap::Parser)]
        struct Defaults {
            #[command(flatten)]
            settings: Settings,
        }
        <Defaults as clap::Parser>::parse_from(["tk"]).settings
    }
}

impl Settings {
    /// Checks every number, and says all that is wrong at once.
    pub fn check(&self) -> Result<()> {
        let mut wrong = Vec::new();
        for (name, value) in [
            ("epochs", self.epochs),
            ("batch-size", self.batch_size.unwrap_or(1)),
            ("batch-tokens", self.batch_tokens.unwrap_or(1)),
            ("gradient-accumulation", self.gradient_accumulation),
            ("keep-checkpoints", self.keep_checkpoints),
            ("max-steps", self.max_steps.unwrap_or(1)),
            ("eval-every", self.eval_every.unwrap_or(1)),
            ("save-every", self.save_every.unwrap_or(1)),
            ("early-stopping-patience", self.early_stopping_patience.unwrap_or(1)),
        ] {
            if value == 0 {
                wrong.push(format!("--{name} is 0, expected at least 1"));
            }
        }
        if self.batch_size.is_some() == self.batch_tokens.is_some() {
            let found = if self.batch_size.is_some() { "both" } else { "neither" };
            wrong.push(format!("of --batch-size and --batch-tokens {found} is set, expected one"));
        }
        if self.max_length < 3 {
            wrong.push(format!(
                "--max-length is {}, expected at least 3 (a token between two special ones)",
                self.max_length
            ));
        }
        for (name, value, range) in [
            ("warmup-ratio", self.warmup_ratio, 0.0..=1.0),
            ("label-smoothing", self.label_smoothing, 0.0..=1.0),
            ("dropout", f64::from(self.dropout.unwrap_or(0.0)), 0.0..=0.99),
            ("learning-rate", self.learning_rate, 0.0..=10.0),
            ("weight-decay", self.weight_decay, 0.0..=10.0),
            ("adam-beta1", self.adam_beta1, 0.0..=0.9999),
            ("adam-beta2", self.adam_beta2, 0.0..=0.99999),
            ("adam-epsilon", self.adam_epsilon, 0.0..=1.0),
            ("max-grad-norm", self.max_grad_norm, 0.0..=f64::MAX),
        ] {
            if !range.contains(&value) {
                wrong.push(format!("--{name} is {value}, expected {} to {}", range.start(), range.end()));
            }
        }
        if !wrong.is_empty() {
            bail_unusable!("{}", wrong.join("; "));
        }
        Ok(())
    }

    /// What a forward pass may hold.
    pub fn budget(&self) -> Budget {
        match (self.batch_tokens, self.batch_size) {
            (Some(tokens), _) => Budget::Tokens(tokens),
            (None, examples) => Budget::Examples(examples.unwrap_or(1)), // `check` refuses none of both
        }
    }
}
