//! A model in ONNX Runtime: a padded batch in, its outputs' values out.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Mutex;

use anyhow::Context;
use ndarray::{Array2, ArrayD, ArrayView2};
use ort::AsPointer;
use ort::environment::Environment;
use ort::session::Session;
use ort::session::builder::{AutoDevicePolicy, SessionBuilder};
use ort::value::{DynValue, Outlet, TensorRef};

use super::library;
use super::placement;
use super::providers::{How, Order, Provider, Providers};
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

/// A loaded model. On the processor several threads may run it at once, each its own batch: they share one copy of the
/// weights. On a GPU one batch runs at a time.
pub struct OrtSession {
    pub(super) session: Session,
    provider: Provider,
    inputs: Vec<CString>,
    outputs: Vec<CString>,
    /// Held by a run, where only one is allowed.
    alone: Option<Mutex<()>>,
}

/// What a session computes with, on the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// One run at a time, by so many threads.
    Together(usize),
    /// So many runs at once, each in the thread that calls it.
    Apart(usize),
}

impl Threads {
    /// Runs at once.
    pub(super) fn runs(self) -> usize {
        match self {
            Self::Together(_) => 1,
            Self::Apart(runs) => runs,
        }
    }

    /// Threads of all runs.
    pub(super) fn all(self) -> usize {
        match self {
            Self::Together(threads) | Self::Apart(threads) => threads,
        }
    }

    /// Threads of a run.
    fn of_run(self) -> usize {
        self.all() / self.runs().max(1)
    }
}

/// How a session's threads wait for work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Asleep where no run is under way, for other sessions have the cores then.
    SpinsInRuns,
    /// Awake between runs as well: a session alone, whose runs are many and short.
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
    /// Loads a model on the first of the providers that can be had. Says which one it took where there was a choice.
    ///
    /// # Errors
    /// Unusable: no ONNX Runtime, no such model, or none of the providers; says why for each.
    pub fn open(model: Model<'_>, providers: &Providers, threads: Threads, say: Say) -> Result<Self> {
        Self::open_waiting(model, providers, threads, Waiting::SpinsInRuns, say)
    }

    /// The same, where threads wait as asked.
    pub(super) fn open_waiting(
        model: Model<'_>,
        providers: &Providers,
        threads: Threads,
        waiting: Waiting,
        say: Say,
    ) -> Result<Self> {
        let open_on = |provider| Self::open_on(provider, &providers.how, model, threads, waiting);
        let library = library::library()?;
        match &providers.order {
            Order::Auto if !Provider::Cuda.compiled_in()? => {
                say.line(format!(
                    "provider: cpu, because {} is built without CUDA",
                    library.path.file_name().unwrap_or_default().display()
                ));
                open_on(Provider::Cpu)
            }
            Order::Auto => match open_on(Provider::Cuda) {
                Ok(session) => {
                    say.line("provider: cuda, because this machine has it");
                    Ok(session)
                }
                Err(why) => {
                    say.line(format!("provider: cpu, because {why:#}"));
                    open_on(Provider::Cpu)
                }
            },
            Order::Listed(list) => {
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

    fn open_on(
        provider: Provider,
        how: &How,
        model: Model<'_>,
        threads: Threads,
        waiting: Waiting,
    ) -> Result<Self> {
        let model = match (provider, &how.optimized, model) {
            (Provider::Cuda, Some(optimized), Model::File(_)) => Model::File(optimized),
            (_, _, model) => model,
        };
        let place = match model {
            Model::File(path) => path.display().to_string(),
            Model::Bytes(_) => "the graph".to_owned(),
        };
        let builder = options(library::environment()?, threads.of_run(), waiting)?;
        let ask = || format!("provider {}", provider.name());
        let mut builder = provider.register(builder, how, threads).with_context(ask)?;
        let session = match model {
            Model::File(path) => builder.commit_from_file(path),
            Model::Bytes(bytes) => builder.commit_from_memory(bytes),
        };
        let session = session.map_err(|e| match provider {
            Provider::Cpu => unusable!("{place}: ONNX Runtime can't load it: {}", e.message()),
            _ => unusable!("provider {}: {place}: {}", provider.name(), e.message()),
        })?;
        placement::prove(provider, &session).with_context(ask)?;
        let names = |outlets: &[Outlet]| {
            outlets.iter().map(|outlet| CString::new(outlet.name())).collect::<Result<Vec<_>, _>>()
        };
        let (inputs, outputs) = (names(session.inputs())?, names(session.outputs())?);
        let alone = (!provider.on_cpu()).then(Mutex::default);
        Ok(Self { session, provider, inputs, outputs, alone })
    }

    /// What runs the model.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// How many of the model's nodes each provider runs, by ONNX Runtime's names.
    ///
    /// # Errors
    /// ONNX Runtime does not tell.
    pub fn nodes(&self) -> Result<BTreeMap<String, usize>> {
        placement::nodes(&self.session)
    }

    /// An entry of the model's metadata.
    pub fn metadata(&self, key: &str) -> Option<String> {
        self.session.metadata().ok()?.custom(key)
    }

    /// The names of the inputs, in order.
    pub fn inputs(&self) -> Vec<String> {
        self.session.inputs().iter().map(|input| input.name().to_owned()).collect()
    }

    /// The names of the outputs, in order.
    pub fn outputs(&self) -> Vec<String> {
        self.session.outputs().iter().map(|output| output.name().to_owned()).collect()
    }

    /// Runs one batch and gives every output, in the model's order.
    ///
    /// # Errors
    /// The model asks for an input that a batch does not have, gives other than f32, or the run fails.
    pub fn run(&self, batch: &PaddedBatch) -> Result<Vec<Values>> {
        let shape = (batch.rows, batch.width);
        let positions = batch.positions();
        let mut inputs = Vec::with_capacity(self.inputs.len());
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
            inputs.push(TensorRef::from_array_view(ArrayView2::from_shape(shape, values)?)?);
        }
        let outputs = self.run_on(&inputs).with_context(|| {
            format!("running {} sequences of {} tokens on {}", batch.rows, batch.width, self.provider.name())
        })?;
        let names = self.session.outputs().iter().map(Outlet::name);
        names
            .zip(&outputs)
            .map(|(name, value)| {
                let array = value.try_extract_array::<f32>().with_context(|| name.to_owned())?;
                Ok(Values { name: name.to_owned(), array: array.to_owned() })
            })
            .collect()
    }

    /// A run with the inputs in the model's order, which gives every output.
    ///
    /// This is ONNX Runtime's own function, because ort's asks for the session alone. ONNX Runtime promises that threads
    /// may run one session at once (its documentation's "High-level design"; its benchmark `onnxruntime_perf_test -c`
    /// does); ort does not trust every execution provider to keep that promise, so this relies on it for the CPU's, where
    /// every kernel computes in the memory of its run, and OpenVINO's, which keeps a request for each of its streams.
    fn run_on(&self, inputs: &[TensorRef<'_, i64>]) -> Result<Vec<DynValue>> {
        let names = |names: &[CString]| names.iter().map(|name| name.as_ptr()).collect::<Vec<_>>();
        let (input_names, output_names) = (names(&self.inputs), names(&self.outputs));
        let values: Vec<_> = inputs.iter().map(|input| input.ptr()).collect();
        let mut results = vec![ptr::null_mut(); output_names.len()];
        let _alone =
            self.alone.as_ref().map(|alone| alone.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        // SAFETY: the session and the inputs live through the call, and there are as many names as values. On a GPU no
        // other run is under way.
        let status = unsafe {
            (ort::api().Run)(
                self.session.ptr().cast_mut(),
                ptr::null(),
                input_names.as_ptr(),
                values.as_ptr(),
                values.len(),
                output_names.as_ptr(),
                output_names.len(),
                results.as_mut_ptr(),
            )
        };
        // SAFETY: the status is ONNX Runtime's, and nothing else holds it
        unsafe { ort::Error::result_from_status(status)? };
        let results = results.into_iter().map(|result| {
            let result = NonNull::new(result).context("ONNX Runtime gave no value")?;
            // SAFETY: a value that the run has made, and that nothing else holds
            Ok(unsafe { DynValue::from_ptr(result, Some(self.session.allocator())) })
        });
        results.collect()
    }
}

/// The options that every session has.
fn options(environment: &Environment, threads: usize, waiting: Waiting) -> ort::Result<SessionBuilder> {
    Ok(Session::builder(environment)?
        // with this ort would let plug-in providers in that nobody asked for
        .with_auto_device(AutoDevicePolicy::PreferCPU)?
        .with_intra_threads(threads)?
        .with_config_entry("session.force_spinning_stop", if waiting == Waiting::Spins { "0" } else { "1" })?
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
