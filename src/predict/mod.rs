//! A loaded model that answers records: records in, batches by token budget through ONNX Runtime, answers in the order
//! of the input.

pub mod batching;
pub mod chunks;
pub mod graphs;
pub mod matrix;
pub mod pool;
pub mod shard;
pub mod sink;
pub mod vouched;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
pub use pool::Pool;

use crate::data::batch::Encoding;
use crate::data::records::{BadRow, Row};
use crate::onnx::Precision;
use crate::runtime::{How, Order, Provider, Providers};
use crate::saved::Saved;
use crate::say::Say;
use crate::task::{Answer, AnswerFlags, Asking, Example, Measured, Outputs, Question, Task};
use crate::{Result, process};

/// Numbers of outputs that are held at once (256 MiB), where one record's are fewer.
const HELD: usize = 64 * 1024 * 1024;

/// How a model is loaded.
pub struct Options<'a> {
    pub providers: &'a Providers,
    /// Threads on a CPU, each of which runs batches of its own.
    pub threads: usize,
    /// Padded tokens of a batch; what suits the provider where there is none.
    pub batch_tokens: Option<usize>,
    /// Tokens of the longest window; the model's own where there is none.
    pub max_length: Option<usize>,
    /// How records are read and answered.
    pub flags: &'a AnswerFlags,
}

/// An exported model whose answers come of one pass.
pub struct Predictor {
    task: Task,
    /// A tokenizer is large: reading threads share it.
    asking: Arc<Asking>,
    graph: PathBuf,
    pool: Pool,
}

/// A record as the model is asked with it.
pub struct Asked {
    windows: Vec<Encoding>,
    question: Question,
}

impl Asked {
    /// One window of so many tokens, for tests.
    #[cfg(test)]
    pub fn of_length(tokens: usize) -> Self {
        let window = Encoding { ids: vec![1; tokens], type_ids: vec![0; tokens], truncated: false };
        Self { windows: vec![window], question: Question::TextClassification(()) }
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> usize {
        self.windows.iter().map(Encoding::len).sum()
    }

    /// The windows that it is read in.
    pub fn encodings(&self) -> &[Encoding] {
        &self.windows
    }

    /// How many windows it is read in.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    /// Tokens of its longest window.
    pub fn longest(&self) -> usize {
        self.windows.iter().map(Encoding::len).max().unwrap_or_default()
    }

    /// Whether something was cut off.
    pub fn truncated(&self) -> bool {
        self.windows.iter().any(|window| window.truncated)
    }
}

impl Predictor {
    /// Loads what `tk export` wrote in this precision.
    ///
    /// # Errors
    /// Unusable: there is no such graph of these weights, or no room for a record. As [`Pool::open`].
    pub fn open(saved: &Saved, precision: Precision, options: &Options, say: Say) -> Result<Self> {
        let graph = graphs::checked(saved, precision)?;
        if precision == Precision::Bf16 && graphs::tolerance(saved, precision).is_err() {
            say.warn(format!(
                "what bf16 loses was not measured: `{}` does, and keeps it in the manifest",
                graphs::export(saved, precision)
            ));
        }
        let mut providers = options.providers.clone();
        let may_be_cuda = match &providers.order {
            Order::Auto => Provider::Cuda.compiled_in()?,
            listed => listed.names(Provider::Cuda),
        };
        if precision == Precision::Fp32 && may_be_cuda {
            providers.how.optimized = graphs::checked_optimized(saved)?;
        }
        Self::of_graph(saved, graph, &Options { providers: &providers, ..*options }, say)
    }

    /// The same of a graph that stands anywhere.
    pub fn of_graph(saved: &Saved, graph: PathBuf, options: &Options, say: Say) -> Result<Self> {
        let max_length = saved.checked_max_length(options.max_length)?;
        let columns = saved.task.columns(options.flags);
        let (tokenizer, flags) = (saved.tokenizer.clone(), options.flags.clone());
        let asking = Arc::new(Asking { columns, tokenizer, max_length, flags });
        saved.task.check_room(&asking)?;
        let pool = Pool::open(saved, &graph, options.providers, options.threads, options.batch_tokens, say)?;
        Ok(Self { task: saved.task.clone(), asking, graph, pool })
    }

    /// A graph on a provider with all cores, as it is served where nobody asks for anything else.
    ///
    /// # Errors
    /// As [`Predictor::of_graph`].
    pub fn by_default(saved: &Saved, graph: &Path, providers: &Providers) -> Result<Self> {
        let flags = &AnswerFlags::default();
        let threads = process::cores();
        let options = Options { providers, threads, batch_tokens: None, max_length: None, flags };
        Self::of_graph(saved, graph.to_owned(), &options, Say::default())
    }

    /// One for each of its threads, to be asked side by side: they share the model.
    pub fn split(&self) -> Vec<Self> {
        let Self { task, asking, graph, .. } = self;
        let of_pool = |pool| Self { task: task.clone(), asking: asking.clone(), graph: graph.clone(), pool };
        self.pool.split().into_iter().map(of_pool).collect()
    }

    /// One that answers with all threads together, for a record that nobody else computes beside, where there is room for
    /// it: see [`Pool::together`].
    ///
    /// # Errors
    /// As [`Pool::open`].
    pub fn together(&self, how: &How) -> Result<Option<Self>> {
        let Self { task, asking, graph, .. } = self;
        let of_pool = |pool| Self { task: task.clone(), asking: asking.clone(), graph: graph.clone(), pool };
        Ok(self.pool.together(graph, how)?.map(of_pool))
    }

    /// The threads that share the model.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What runs the model.
    pub fn provider(&self) -> Provider {
        self.pool.provider()
    }

    /// The graph that it runs.
    pub fn graph(&self) -> &Path {
        &self.graph
    }

    /// The most padded tokens of a batch with more than one window.
    pub fn batch_tokens(&self) -> usize {
        self.pool.batch_tokens()
    }

    /// Tokens of the longest window.
    pub fn max_length(&self) -> usize {
        self.asking.max_length
    }

    /// What makes of a record what this model is asked with, in any thread.
    pub fn reader(&self) -> impl Fn(&Row) -> Result<Asked, BadRow> + Send + Sync + 'static {
        let (task, asking) = (self.task.clone(), self.asking.clone());
        move |row| {
            let (windows, question) = task.ask(row, &asking)?;
            Ok(Asked { windows, question })
        }
    }

    /// An answer for each, in order. A record of which something was cut off says so.
    ///
    /// # Errors
    /// The model fails, or gives other outputs than its task has.
    pub fn answers(&self, asked: &[&Asked]) -> Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(asked.len());
        for part in self.parts(asked.iter().map(|asked| asked.tokens())) {
            let asked = &asked[part];
            let windows: Vec<&Encoding> = asked.iter().flat_map(|asked| &asked.windows).collect();
            let outputs = self.pool.outputs(&windows)?;
            let mut rest = &outputs[..];
            for asked in asked {
                let (own, others) = rest.split_at(asked.windows.len());
                rest = others;
                let mut answer = self.task.answer(&asked.question, own, &self.asking)?;
                if let (Ok(fields), true) = (&mut answer, asked.truncated()) {
                    fields.insert("truncated".to_owned(), true.into());
                }
                answers.push(answer);
            }
        }
        Ok(answers)
    }

    /// The outputs of each sequence that answers are made of, in order; all are held.
    ///
    /// # Errors
    /// As [`Predictor::answers`].
    pub fn outputs(&self, encodings: &[&Encoding]) -> Result<Vec<Outputs>> {
        self.pool.outputs(encodings)
    }

    /// Of each sequence those of the graph's outputs that are wanted, also of those for other programs alone, in order.
    ///
    /// # Errors
    /// As [`Predictor::answers`].
    pub fn graph_outputs(&self, asked: &[(&Encoding, &[usize])]) -> Result<Vec<Outputs>> {
        let mut all = Vec::with_capacity(asked.len());
        for part in self.parts(asked.iter().map(|(encoding, _)| encoding.len())) {
            let asked = &asked[part];
            let encodings: Vec<&Encoding> = asked.iter().map(|(encoding, _)| *encoding).collect();
            for (mut outputs, (_, wanted)) in self.pool.graph_outputs(&encodings)?.into_iter().zip(asked) {
                let take = |&at: &usize| outputs.get_mut(at).map(std::mem::take).context("no such output");
                all.push(wanted.iter().map(take).collect::<Result<_>>()?);
            }
        }
        Ok(all)
    }

    /// Cuts records of these numbers of tokens into parts whose outputs are held at once; one at least stands in each.
    fn parts(&self, tokens: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
        let most = HELD / self.task.numbers_of_token().max(1);
        let mut parts: Vec<Range<usize>> = Vec::new();
        let mut held = 0;
        for (i, tokens) in tokens.enumerate() {
            match parts.last_mut() {
                Some(part) if held + tokens <= most => {
                    part.end += 1;
                    held += tokens;
                }
                _ => {
                    parts.push(i..i + 1);
                    held = tokens;
                }
            }
        }
        parts
    }

    /// The task's metrics and mean loss over examples.
    ///
    /// # Errors
    /// As [`Predictor::answers`].
    pub fn measure(&self, examples: &[Example]) -> Result<Measured> {
        let mut kept = Vec::with_capacity(examples.len());
        for part in self.parts(examples.iter().map(Example::tokens)) {
            let examples = &examples[part];
            let encodings: Vec<&Encoding> = examples.iter().flat_map(Example::encodings).collect();
            kept.extend(self.task.kept(self.pool.outputs(&encodings)?, examples)?);
        }
        self.task.measure_outputs(&kept, examples)
    }
}
