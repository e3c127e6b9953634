//! A model in ONNX Runtime: a padded batch in, its outputs' values out.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Context;
use ndarray::{Array2, ArrayD, ArrayView2};
use ort::environment::Environment;
use ort::session::builder::{AutoDevicePolicy, SessionBuilder};
use ort::session::{Session, SessionInputValue};
use ort::value::TensorRef;

use super::library;
use super::providers::{Provider, Providers};
use crate::data::batch::PaddedBatch;
use crate::say::Say;
use crate::task::Scope;
use crate::task::output::Standing;
use crate::{Result, bail_unusable, unusable};

/// Where a model's bytes are.
#[derive(Clone, Copy, Debug)]
pub enum Model<'m> {
    /// A file, with its weights beside it if they are external.
    File(&'m Path),
    /// A whole file in memory.
    Bytes(&'m [u8]),
}

/// A loaded model. One run at a time: for more, open more.
pub struct OrtSession {
    pub(super) session: Session,
    provider: Provider,
}

/// How a session's threads wait for work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Several sessions share the cores: a waiting thread must not burn one.
    Sleeps,
    /// A session alone, whose runs are many and short.
    Spins,
}

/// One output of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    pub name: String,
    pub array: ArrayD<f32>,
}

impl Values {
    /// An output of a padded batch, cut into what each of its sequences has: (1, C) or (T, C).
    ///
    /// # Errors
    /// Its shape is not (B, C), (B, T, C) or (B, T) of the batch.
    pub fn unpack(&self, scope: Scope, batch: &PaddedBatch) -> Result<Vec<Array2<f32>>> {
        let shape = self.array.shape();
        let place = || {
            format!(
                "{} has the shape {shape:?}, for {} sequences of {} tokens",
                self.name, batch.rows, batch.width
            )
        };
        let rows = match (scope, shape) {
            (Scope::Sequence, &[rows, width]) => self.array.to_shape((rows, width)),
            (Scope::Token, &[sequences, columns]) if columns == batch.width => {
                self.array.to_shape((sequences * columns, 1))
            }
            (Scope::Token, &[sequences, columns, width]) if columns == batch.width => {
                self.array.to_shape((sequences * columns, width))
            }
            _ => anyhow::bail!("{}", place()),
        };
        let rows = rows.with_context(place)?;
        let standing = Standing::Padded { columns: batch.width };
        scope.unpack(rows.view(), &batch.lengths(), standing).with_context(place)
    }
}

impl OrtSession {
    /// Loads a model on the first of the providers that can be had, with `threads` threads of its own.
    /// Says which one it took where there was a choice.
    ///
    /// # Errors
    /// Unusable: no ONNX Runtime, no such model, or none of the providers; says why for each.
    pub fn open(model: Model<'_>, providers: &Providers, threads: usize, say: Say) -> Result<Self> {
        Self::open_waiting(model, providers, threads, Waiting::Sleeps, say)
    }

    /// The same, where threads wait as asked.
    pub(super) fn open_waiting(
        model: Model<'_>,
        providers: &Providers,
        threads: usize,
        waiting: Waiting,
        say: Say,
    ) -> Result<Self> {
        let open_on = |provider| Self::open_on(provider, model, threads, waiting);
        let library = library::library()?;
        match providers {
            Providers::Auto if !Provider::Cuda.compiled_in()? => {
                say.line(format!(
                    "provider: cpu, because {} is built without CUDA",
                    library.path.file_name().unwrap_or_default().display()
                ));
                open_on(Provider::Cpu)
            }
            Providers::Auto => match open_on(Provider::Cuda) {
                Ok(session) => {
                    say.line("provider: cuda, because this machine has it");
                    Ok(session)
                }
                Err(why) => {
                    say.line(format!("provider: cpu, because {why:#}"));
                    open_on(Provider::Cpu)
                }
            },
            Providers::Ordered(list) => {
                let mut refused = Vec::new();
                for &provider in list {
                    match open_on(provider) {
                        Ok(session) => {
                            if !refused.is_empty() {
                                say.line(format!(
                                    "provider: {}, because {}",
                                    provider.name(),
                                    refused.join("; ")
                                ));
                            }
                            return Ok(session);
                        }
                        Err(why) if list.len() == 1 => return Err(why),
                        Err(why) => refused.push(format!("{why:#}")),
                    }
                }
                bail_unusable!("none of the providers can be had:\n  {}", refused.join("\n  "))
            }
        }
    }

    fn open_on(provider: Provider, model: Model<'_>, threads: usize, waiting: Waiting) -> Result<Self> {
        let place = match model {
            Model::File(path) => path.display().to_string(),
            Model::Bytes(_) => "the graph".to_owned(),
        };
        let builder = options(library::environment()?, threads, waiting)?;
        let ask = || format!("provider {}", provider.name());
        let mut builder = provider.register(builder).with_context(ask)?;
        let session = match model {
            Model::File(path) => builder.commit_from_file(path),
            Model::Bytes(bytes) => builder.commit_from_memory(bytes),
        };
        let session = session.map_err(|e| match provider {
            Provider::Cpu => unusable!("{place}: ONNX Runtime can't load it: {}", e.message()),
            _ => unusable!("provider {}: {place}: {}", provider.name(), e.message()),
        })?;
        provider.prove(&session).with_context(ask)?;
        Ok(Self { session, provider })
    }

    /// What runs the model.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// An entry of the model's metadata.
    pub fn metadata(&self, key: &str) -> Option<String> {
        self.session.metadata().ok()?.custom(key)
    }

    /// The names of the outputs, in order.
    pub fn outputs(&self) -> Vec<String> {
        self.session.outputs().iter().map(|output| output.name().to_owned()).collect()
    }

    /// Runs one batch and gives every output, in the model's order.
    ///
    /// # Errors
    /// The model asks for an input that a batch does not have, gives other than f32, or the run fails.
    pub fn run(&mut self, batch: &PaddedBatch) -> Result<Vec<Values>> {
        let shape = (batch.rows, batch.width);
        let positions = batch.positions();
        let mut inputs: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::new();
        for input in self.session.inputs() {
            let values = match input.name() {
                "input_ids" => &batch.ids,
                "attention_mask" => &batch.mask,
                "token_type_ids" => &batch.type_ids,
                "position_ids" => &positions, // of graphs that others export
                other => bail_unusable!(
                    "the model asks for an input \"{other}\"; tk gives input_ids, attention_mask, token_type_ids and \
                     position_ids"
                ),
            };
            let tensor = TensorRef::from_array_view(ArrayView2::from_shape(shape, values)?)?;
            inputs.push((input.name().to_owned().into(), tensor.into()));
        }
        let outputs = self.session.run(inputs).with_context(|| {
            format!("running {} sequences of {} tokens on {}", batch.rows, batch.width, self.provider.name())
        })?;
        outputs
            .iter()
            .map(|(name, value)| {
                let array = value.try_extract_array::<f32>().with_context(|| name.to_owned())?;
                Ok(Values { name: name.to_owned(), array: array.to_owned() })
            })
            .collect()
    }
}

/// The options that every session has.
fn options(environment: &Environment, threads: usize, waiting: Waiting) -> ort::Result<SessionBuilder> {
    Ok(Session::builder(environment)?
        // with this ort would let plug-in providers in that nobody asked for
        .with_auto_device(AutoDevicePolicy::PreferCPU)?
        .with_intra_threads(threads)?
        .with_intra_op_spinning(waiting == Waiting::Spins)?
        // batches differ in shape, and a plan for each shape would be kept
        .with_memory_pattern(false)?
        .with_config_entry("session.record_ep_graph_assignment_info", "1")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::Encoding;

    #[test]
    fn an_output_is_cut_by_sequence_or_refused() {
        let encoding = |n: usize| Encoding { ids: vec![1; n], type_ids: vec![0; n], truncated: false };
        let batch = PaddedBatch::new(&[&encoding(1), &encoding(3)], 0);
        let shapes = |scope, shape: &[usize]| {
            let output = Values { name: "logits".to_owned(), array: ArrayD::ones(shape) };
            let found = output.unpack(scope, &batch)?;
            Ok::<_, anyhow::Error>(found.iter().map(|own| own.dim()).collect::<Vec<_>>())
        };
        assert_eq!(shapes(Scope::Sequence, &[2, 5]).unwrap(), [(1, 5), (1, 5)]);
        assert_eq!(shapes(Scope::Token, &[2, 3, 5]).unwrap(), [(1, 5), (3, 5)]);
        assert_eq!(shapes(Scope::Token, &[2, 3]).unwrap(), [(1, 1), (3, 1)]);
        for (scope, shape) in [
            (Scope::Sequence, &[3, 5][..]),
            (Scope::Sequence, &[2, 3, 5]),
            (Scope::Token, &[2, 5]), // is not 3, the batch's length
            (Scope::Token, &[2, 4, 5]),
            (Scope::Token, &[3, 3, 5]),
            (Scope::Sequence, &[]),
        ] {
            let error = shapes(scope, shape).unwrap_err();
            assert!(format!("{error:#}").contains(&format!("logits has the shape {shape:?}")), "{error:#}");
        }
    }
}
