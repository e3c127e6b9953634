//! What a training run is asked to do: the same on the command line, in a `--config` file and in what a run saves.

use clap::builder::ArgPredicate;
use serde::{Deserialize, Serialize};

use super::lora::LoraFlags;
use super::plan::Budget;
use super::schedule::Schedule;
use crate::device::TrainingPrecision;
use crate::task::Task;
use crate::{Result, bail_unusable};

/// The smallest `adam_epsilon`: AdamW computes in f32, where less is no normal number.
const SMALLEST_EPSILON: f64 = 1e-37;

/// The order of every epoch is planned before the first step.
const MOST_EPOCHS: usize = 100_000;

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
    /// Hold this many training records at a time instead of all: for data that is larger than memory. What is held is
    /// shuffled; then come the next ones, and behind the last the first again. Evaluations and checkpoints come after each
    /// of these buffers where --eval-every and --save-every say nothing else. Needs --max-steps.
    #[arg(long, value_name = "RECORDS", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shuffle_buffer: Option<usize>,
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
    /// The peak of the learning rate of the head, which is drawn anew, instead of --learning-rate.
    #[arg(long, value_name = "X", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_learning_rate: Option<f64>,
    /// Every layer learns at this share of the rate of the layer above it, the embeddings slowest of all.
    #[arg(long, value_name = "X", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_decay: Option<f64>,
    /// Leave the parameters as they are in whose names this regular expression is found: `embeddings`,
    /// `layer\.[0-5]\.`, `^bert`. They cost no gradient and no optimizer state. Can be given several times.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraFlags,
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
    /// Average the weights over the steps, with this share of the average kept at each: 0.99, or 0.999 in long runs. The
    /// averages are what is evaluated and saved; training goes on with the weights themselves.
    #[arg(long, value_name = "X", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// Every dropout probability of the model, instead of the configuration's.
    #[arg(long, value_name = "P", help_heading = "Regime")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f32>,
    /// Keep less of the forward pass and compute it again in the backward pass: less memory, some more time, the
    /// same numbers. On the CPU.
    #[arg(long, alias = "gradient-checkpointing", help_heading = "Regime")]
    #[serde(default)]
    pub checkpoint_activations: bool,
    /// The seed of the new weights, the order of the examples, dropout, and what --validation-split and --train-fraction draw.
    #[arg(long, default_value_t = 42, value_name = "N", help_heading = "Regime")]
    pub seed: u64,
    /// What products are computed in: fp32, or bf16 that are added up in fp32, by a GPU or by a processor with AMX-BF16 or
    /// AVX512-BF16; auto takes bf16 where there is one. Weights, the optimizer's state, evaluations and what is saved are fp32
    /// in all.
    #[arg(long, value_enum, default_value_t = TrainingPrecision::Fp32, help_heading = "Regime")]
    #[serde(default)]
    pub precision: TrainingPrecision,
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
    /// Look at every parameter at the first, every N-th and the last step: its gradient's norm, the size of its update
    /// beside its own, and the share of its gradient that is zero. Rows go to training/audit.jsonl. [N: 100]
    #[arg(
        long,
        value_name = "N",
        num_args = 0..=1,
        default_missing_value = "100",
        help_heading = "Evaluation and checkpoints"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<usize>,
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
            ("audit", self.audit.unwrap_or(1)),
            ("early-stopping-patience", self.early_stopping_patience.unwrap_or(1)),
        ] {
            if value == 0 {
                wrong.push(format!("--{name} is 0, expected at least 1"));
            }
        }
        if let Some(records) = self.shuffle_buffer {
            let step = self.batch_size.unwrap_or(1).saturating_mul(self.gradient_accumulation);
            if records < step {
                wrong.push(format!(
                    "--shuffle-buffer is {records}, expected at least the {step} examples of a step"
                ));
            }
            if self.max_steps.is_none() {
                wrong.push("--shuffle-buffer needs --max-steps: where data comes in parts, nobody knows how many steps an epoch has".to_owned());
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
            ("learning-rate", self.learning_rate, 0.0..=10.0),
            ("head-learning-rate", self.head_learning_rate.unwrap_or(0.0), 0.0..=10.0),
            ("layer-decay", self.layer_decay.unwrap_or(1.0), 0.0..=1.0),
            ("weight-decay", self.weight_decay, 0.0..=10.0),
            ("adam-beta1", self.adam_beta1, 0.0..=0.9999),
            ("adam-beta2", self.adam_beta2, 0.0..=0.99999),
            ("max-grad-norm", self.max_grad_norm, 0.0..=f64::MAX),
        ] {
            if !range.contains(&value) {
                wrong.push(format!("--{name} is {value}, expected {} to {}", range.start(), range.end()));
            }
        }
        wrong.extend(self.lora.wrong());
        if let Some(p) = self.dropout.filter(|p| !(0.0..1.0).contains(p)) {
            wrong.push(format!("--dropout is {p}, expected at least 0 and less than 1"));
        }
        if let Some(decay) = self.ema.filter(|decay| !(*decay > 0.0 && *decay < 1.0)) {
            wrong.push(format!("--ema is {decay}, expected more than 0 and less than 1"));
        }
        // with 0, in f32, the weights of a row that never had a gradient would become 0 / 0
        if !(SMALLEST_EPSILON..=1.0).contains(&self.adam_epsilon) {
            wrong.push(format!(
                "--adam-epsilon is {:e}, expected {SMALLEST_EPSILON:e} to 1",
                self.adam_epsilon
            ));
        }
        if self.epochs > MOST_EPOCHS {
            wrong.push(format!("--epochs is {}, expected at most {MOST_EPOCHS}", self.epochs));
        }
        if !wrong.is_empty() {
            bail_unusable!("{}", wrong.join("; "));
        }
        Ok(())
    }

    /// Refuses what would say nothing to the task.
    ///
    /// # Errors
    /// Unusable: names the flag.
    pub fn check_task(&self, task: &Task) -> Result<()> {
        task.deciding_metric(self.best_metric.as_deref())?;
        if self.label_smoothing > 0.0 && !task.smooths_labels() {
            bail_unusable!(
                "--label-smoothing {} spreads one label's share over the others; where an example has several labels \
                 or a number, leave it out",
                self.label_smoothing
            );
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::TextClassification;
    use crate::task::text_classification::ProblemType;

    #[test]
    fn numbers_that_no_run_can_take_are_refused_by_name() {
        type Change = fn(&mut Settings);
        let wrong: &[(&str, Change)] = &[
            ("--learning-rate is NaN", |s| s.learning_rate = f64::NAN),
            ("--learning-rate is inf", |s| s.learning_rate = f64::INFINITY),
            ("--learning-rate is -0.1", |s| s.learning_rate = -0.1),
            ("--warmup-ratio is 1.5", |s| s.warmup_ratio = 1.5),
            ("--warmup-ratio is NaN", |s| s.warmup_ratio = f64::NAN),
            ("--weight-decay is -1", |s| s.weight_decay = -1.0),
            ("--adam-beta1 is 1", |s| s.adam_beta1 = 1.0),
            ("--adam-beta2 is NaN", |s| s.adam_beta2 = f64::NAN),
            ("--adam-epsilon is 0", |s| s.adam_epsilon = 0.0),
            ("--adam-epsilon is 1e-50", |s| s.adam_epsilon = 1e-50),
            ("--adam-epsilon is NaN", |s| s.adam_epsilon = f64::NAN),
            ("--max-grad-norm is inf", |s| s.max_grad_norm = f64::INFINITY),
            ("--max-grad-norm is -1", |s| s.max_grad_norm = -1.0),
            ("--label-smoothing is 1.1", |s| s.label_smoothing = 1.1),
            ("--head-learning-rate is inf", |s| s.head_learning_rate = Some(f64::INFINITY)),
            ("--layer-decay is 1.5", |s| s.layer_decay = Some(1.5)),
            ("--layer-decay is NaN", |s| s.layer_decay = Some(f64::NAN)),
            ("--ema is 0", |s| s.ema = Some(0.0)),
            ("--ema is 1", |s| s.ema = Some(1.0)),
            ("--ema is NaN", |s| s.ema = Some(f64::NAN)),
            ("--dropout is 1", |s| s.dropout = Some(1.0)),
            ("--dropout is -0.1", |s| s.dropout = Some(-0.1)),
            ("--dropout is NaN", |s| s.dropout = Some(f32::NAN)),
            ("--epochs is 0", |s| s.epochs = 0),
            ("--epochs is 18446744073709551615", |s| s.epochs = usize::MAX),
            ("--max-steps is 0", |s| s.max_steps = Some(0)),
            ("--batch-size is 0", |s| s.batch_size = Some(0)),
            ("--gradient-accumulation is 0", |s| s.gradient_accumulation = 0),
            ("--keep-checkpoints is 0", |s| s.keep_checkpoints = 0),
            ("--eval-every is 0", |s| s.eval_every = Some(0)),
            ("--lora-rank is 0", |s| s.lora.lora_rank = Some(0)),
            ("--lora-alpha is NaN", |s| s.lora.lora_alpha = Some(f64::NAN)),
            ("--lora-dropout is 1", |s| s.lora.lora_dropout = Some(1.0)),
            ("--audit is 0", |s| s.audit = Some(0)),
            ("--save-every is 0", |s| s.save_every = Some(0)),
            ("--early-stopping-patience is 0", |s| s.early_stopping_patience = Some(0)),
        ];
        for (name, change) in wrong {
            let mut settings = Settings::default();
            change(&mut settings);
            let error = settings.check().unwrap_err();
            assert!(error.to_string().contains(name), "{name}: {error}");
            assert_eq!(crate::error::exit_code(&error), 2, "{name}");
        }
    }

    #[test]
    fn numbers_at_the_ends_of_what_is_allowed_are_taken() {
        let ends = Settings {
            learning_rate: 0.0,
            warmup_ratio: 1.0,
            adam_beta1: 0.0,
            adam_epsilon: 1.0,
            max_grad_norm: 0.0,
            label_smoothing: 1.0,
            dropout: Some(0.99),
            gradient_accumulation: usize::MAX,
            max_steps: Some(usize::MAX),
            ..Settings::default()
        };
        ends.check().unwrap();
        Settings { batch_size: Some(usize::MAX), dropout: Some(0.0), ..ends }.check().unwrap();
    }

    #[test]
    fn label_smoothing_is_refused_where_it_means_nothing() {
        let labels = |n: usize| (0..n).map(|i| i.to_string()).collect::<Vec<_>>();
        let settings = Settings { label_smoothing: 0.1, ..Settings::default() };
        for (problem, n) in [(ProblemType::MultiLabelClassification, 3), (ProblemType::Regression, 1)] {
            let task = Task::from(TextClassification::new(problem, labels(n)));
            let error = settings.check_task(&task).unwrap_err();
            assert!(error.to_string().contains("--label-smoothing 0.1"), "{error}");
            Settings::default().check_task(&task).unwrap();
        }
        let single = TextClassification::new(ProblemType::SingleLabelClassification, labels(3));
        settings.check_task(&single.into()).unwrap();
    }
}
