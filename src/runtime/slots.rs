//! A language model in ONNX Runtime whose keys and values stay where they are: slots of one cache, each with a
//! sequence of its own length.
//!
//! The cache is ours. ONNX Runtime sees it through tensors that point into it, bound as a graph's past and as its
//! present at once: a run writes the new keys and values behind the old ones, and copies nothing.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::Context;
use ort::AsPointer;
use ort::sys;

use super::session::{Model, OrtSession, Waiting};
use super::{Providers, pages};
use crate::say::Say;
use crate::{Result, bail_unusable, unusable};

/// What a graph is given at every run.
const INPUTS: [&CStr; 5] =
    [c"input_ids", c"position_ids", c"seqlens_k", c"total_sequence_length", c"logits_at"];

/// A graph of the form [`crate::task::Form::InPlace`], and its cache.
pub struct Slots {
    // before the buffers that it points into
    bindings: HashMap<Range<usize>, Binding>,
    session: OrtSession,
    /// Those of [`INPUTS`] that the graph asks for.
    inputs: Vec<&'static CStr>,
    /// Keys and values of each layer, (slots, H, capacity, D).
    caches: Vec<Cache>,
    slots: usize,
    capacity: usize,
    vocabulary: usize,
    /// What the last run gave, (rows, asked, V).
    logits: Vec<f32>,
}

struct Cache {
    past: CString,
    present: CString,
    heads: usize,
    width: usize,
    values: Vec<f32>,
}

/// Tokens for the consecutive slots of a run.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// The slots that read, as many tokens each. Several tokens behind others that were read before are for a slot
    /// alone.
    pub slots: &'a Range<usize>,
    /// (slots, T)
    pub ids: &'a [i64],
    /// (slots): how many tokens each has read before.
    pub lengths: &'a [usize],
    /// Of which of the T tokens the next one's scores are asked for.
    pub asked: &'a [i64],
}

impl Slots {
    /// Loads a graph, with no slot.
    ///
    /// # Errors
    /// As [`OrtSession::open`]; the graph is not of the form, or the provider is not the CPU, where alone its attention
    /// runs in fp32.
    pub fn open(model: &Path, threads: usize, say: Say) -> Result<Self> {
        let providers = Providers::only(super::Provider::Cpu);
        let session = OrtSession::open_waiting(Model::File(model), &providers, threads, Waiting::Spins, say)?;
        let (mut inputs, mut caches) = (Vec::new(), Vec::new());
        for input in session.session.inputs() {
            let Some(layer) = input.name().strip_prefix("past_key_values.") else {
                let known = INPUTS.into_iter().find(|known| known.to_bytes() == input.name().as_bytes());
                inputs.push(known.ok_or_else(|| {
                    unusable!(
                        "{}: it asks for {}, so it is no graph that tk generates with: run `tk export` again",
                        model.display(),
                        input.name()
                    )
                })?);
                continue;
            };
            let shape = input.dtype().tensor_shape().map(|shape| shape.to_vec()).unwrap_or_default();
            let [_, heads, _, width] = shape[..] else {
                bail_unusable!(
                    "{}: {} has the shape {shape:?}, expected (batch, heads, capacity, width): export it again",
                    model.display(),
                    input.name()
                );
            };
            caches.push(Cache {
                past: CString::new(input.name())?,
                present: CString::new(format!("present.{layer}"))?,
                heads: heads as usize,
                width: width as usize,
                values: Vec::new(),
            });
        }
        let outputs = session.session.outputs();
        let logits = outputs.iter().find(|output| output.name() == "logits");
        let shape = logits.and_then(|output| output.dtype().tensor_shape()).map(|shape| shape.to_vec());
        let Some([_, _, vocabulary]) = shape.as_deref() else {
            bail_unusable!("{} gives no logits for tokens: run `tk export` again", model.display());
        };
        let vocabulary = *vocabulary as usize;
        pages::gather();
        let (bindings, logits) = (HashMap::new(), Vec::new());
        Ok(Self { bindings, session, inputs, caches, slots: 0, capacity: 0, vocabulary, logits })
    }

    /// Tokens that a slot has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// V, the scores of a token.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// What a token of a slot takes, in bytes.
    pub fn token_bytes(&self) -> usize {
        self.caches.iter().map(|cache| cache.heads * cache.width * size_of::<f32>()).sum()
    }

    /// Makes so many slots with room for so many tokens each. What the kept slots have read stays, as far as there is
    /// room for it.
    pub fn resize(&mut self, slots: usize, capacity: usize) {
        if (slots, capacity) == (self.slots, self.capacity) {
            return;
        }
        self.bindings.clear(); // they point at what is freed below
        for cache in &mut self.caches {
            let mut values = vec![0.0; slots * cache.heads * capacity * cache.width];
            pages::ask_for(&values);
            let kept = self.capacity.min(capacity) * cache.width;
            if kept > 0 {
                let old = cache.values.chunks_exact(self.capacity * cache.width);
                for (new, old) in values.chunks_exact_mut(capacity * cache.width).zip(old) {
                    new[..kept].copy_from_slice(&old[..kept]);
                }
            }
            cache.values = values;
        }
        (self.slots, self.capacity) = (slots, capacity);
    }

    /// Reads a sequence alone, in parts, from its start in the first slot, and hands on the scores behind each of its
    /// tokens: where a part begins, and its rows.
    ///
    /// # Errors
    /// As [`Slots::read`], and those of `each`.
    pub fn read_whole(
        &mut self,
        ids: &[u32],
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        /// Rows of scores that are held at once.
        const PART: usize = 128;
        self.resize(self.slots.max(1), self.capacity.max(ids.len()));
        for (i, part) in ids.chunks(PART).enumerate() {
            let start = i * PART;
            let ids: Vec<i64> = part.iter().map(|&id| i64::from(id)).collect();
            let asked: Vec<i64> = (0..part.len() as i64).collect();
            let reading = Reading { slots: &(0..1), ids: &ids, lengths: &[start], asked: &asked };
            each(start, self.read(reading)?)?;
        }
        Ok(())
    }

    /// Copies the tokens of a range from slot to slot, for all pairs (from, to) at once.
    pub fn copy(&mut self, pairs: &[(usize, usize)], tokens: Range<usize>) {
        let capacity = self.capacity;
        for cache in &mut self.caches {
            let place = |slot: usize, head: usize| {
                let row = (slot * cache.heads + head) * capacity;
                (row + tokens.start) * cache.width..(row + tokens.end) * cache.width
            };
            for head in 0..cache.heads {
                // all are read before any is written
                let read: Vec<Vec<f32>> =
                    pairs.iter().map(|&(from, _)| cache.values[place(from, head)].to_vec()).collect();
                for (values, &(_, to)) in read.iter().zip(pairs) {
                    cache.values[place(to, head)].copy_from_slice(values);
                }
            }
        }
    }

    /// Reads tokens and gives the scores of the next one behind those that are asked, (slots, asked, V).
    ///
    /// # Errors
    /// A slot has no room, or the run fails.
    pub fn read(&mut self, reading: Reading) -> Result<&mut [f32]> {
        let Reading { slots, ids, lengths, asked } = reading;
        let rows = slots.len();
        anyhow::ensure!(
            rows > 0 && slots.end <= self.slots && lengths.len() == rows && ids.len().is_multiple_of(rows),
            "{} ids and {} lengths for the slots {slots:?} of {}",
            ids.len(),
            lengths.len(),
            self.slots
        );
        let tokens = ids.len() / rows;
        let longest = lengths.iter().max().map_or(0, |longest| longest + tokens);
        anyhow::ensure!(
            longest <= self.capacity && asked.iter().all(|&column| (0..tokens as i64).contains(&column)),
            "{longest} tokens in slots of {}, asked for {asked:?} of {tokens}",
            self.capacity
        );
        let positions: Vec<i64> =
            lengths.iter().flat_map(|&length| (length..length + tokens).map(|place| place as i64)).collect();
        let last: Vec<i32> = lengths.iter().map(|&length| (length + tokens) as i32 - 1).collect();
        let total = [longest as i32];
        self.logits.resize(rows * asked.len() * self.vocabulary, 0.0);

        let binding = match self.bindings.entry(slots.clone()) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let mut binding = Binding::new(&self.session)?;
                for cache in &mut self.caches {
                    let shape = [rows, cache.heads, self.capacity, cache.width];
                    let size = cache.heads * self.capacity * cache.width;
                    let part = &mut cache.values[slots.start * size..slots.end * size];
                    // SAFETY: the bindings are dropped before a cache is freed or moved elsewhere, and nobody looks at
                    // it while a run is under way, for which `self` is borrowed mutably.
                    let value = unsafe { Tensor::over(part, &shape)? };
                    binding.output(&cache.present, &value)?;
                    binding.input(&cache.past, value)?;
                }
                place.insert(binding)
            }
        };
        let shape = [rows, tokens];
        // SAFETY: what these point at lives until the run is over, and they are dropped behind it.
        unsafe {
            let small = [
                (c"input_ids", Tensor::of(ids, &shape)?),
                (c"position_ids", Tensor::of(&positions, &shape)?),
                (c"seqlens_k", Tensor::of(&last, &[rows])?),
                (c"total_sequence_length", Tensor::of(&total, &[1])?),
                (c"logits_at", Tensor::of(asked, &[asked.len()])?),
            ];
            for (name, value) in small.iter().filter(|(name, _)| self.inputs.contains(name)) {
                binding.bind_input(name, value)?;
            }
            let logits = Tensor::over(&mut self.logits, &[rows, asked.len(), self.vocabulary])?;
            binding.output(c"logits", &logits)?;
            binding
                .run(&mut self.session)
                .with_context(|| format!("{rows} slots read {tokens} tokens each"))?;
        }
        Ok(&mut self.logits)
    }
}

/// What a session reads and writes in a run.
struct Binding {
    binding: NonNull<sys::OrtIoBinding>,
    /// The session takes no share in what it is bound to.
    values: Vec<Tensor>,
}

// SAFETY: a binding is used by one thread at a time, through `&mut Slots`.
unsafe impl Send for Binding {}

impl Binding {
    fn new(session: &OrtSession) -> Result<Self> {
        let mut binding = std::ptr::null_mut();
        // SAFETY: the session is alive; a status is looked at before the result.
        let status = unsafe { (ort::api().CreateIoBinding)(session.session.ptr().cast_mut(), &mut binding) };
        check(status)?;
        let binding = NonNull::new(binding).context("ONNX Runtime gave no binding")?;
        Ok(Self { binding, values: Vec::new() })
    }

    fn bind_input(&mut self, name: &CStr, value: &Tensor) -> Result<()> {
        // SAFETY: all three are alive; the name is copied, and ONNX Runtime takes a share of the value.
        check(unsafe { (ort::api().BindInput)(self.binding.as_ptr(), name.as_ptr(), value.0.as_ptr()) })
    }

    /// An input that stays bound.
    fn input(&mut self, name: &CStr, value: Tensor) -> Result<()> {
        self.bind_input(name, &value)?;
        self.values.push(value);
        Ok(())
    }

    fn output(&mut self, name: &CStr, value: &Tensor) -> Result<()> {
        // SAFETY: as above
        check(unsafe { (ort::api().BindOutput)(self.binding.as_ptr(), name.as_ptr(), value.0.as_ptr()) })
    }

    /// # Safety
    /// What the bound values point at must be alive, and nobody else may use it meanwhile.
    unsafe fn run(&mut self, session: &mut OrtSession) -> Result<()> {
        let session = session.session.ptr().cast_mut();
        // SAFETY: both are alive; the rest is promised by the caller
        check(unsafe { (ort::api().RunWithBinding)(session, std::ptr::null(), self.binding.as_ptr()) })
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // SAFETY: made by CreateIoBinding, and released once
        unsafe { (ort::api().ReleaseIoBinding)(self.binding.as_ptr()) }
    }
}

/// A tensor of ONNX Runtime's over memory of ours.
struct Tensor(NonNull<sys::OrtValue>);

/// The types of numbers that tensors hold here.
trait Element {
    const KIND: sys::ONNXTensorElementDataType;
}

impl Element for f32 {
    const KIND: sys::ONNXTensorElementDataType =
        sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

impl Element for i32 {
    const KIND: sys::ONNXTensorElementDataType =
        sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

impl Element for i64 {
    const KIND: sys::ONNXTensorElementDataType =
        sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

impl Tensor {
    /// # Safety
    /// The values must outlive every run that the tensor is bound to.
    unsafe fn over<T: Element>(values: &mut [T], shape: &[usize]) -> Result<Self> {
        // SAFETY: promised by the caller
        unsafe { Self::at(values.as_mut_ptr().cast(), size_of_val(values), shape, T::KIND) }
    }

    /// The same for an input, which runs only read.
    ///
    /// # Safety
    /// As [`Tensor::over`].
    unsafe fn of<T: Element>(values: &[T], shape: &[usize]) -> Result<Self> {
        // SAFETY: promised by the caller
        unsafe { Self::at(values.as_ptr().cast_mut().cast(), size_of_val(values), shape, T::KIND) }
    }

    unsafe fn at(
        start: *mut c_void,
        bytes: usize,
        shape: &[usize],
        kind: sys::ONNXTensorElementDataType,
    ) -> Result<Self> {
        let (api, shape) = (ort::api(), shape.iter().map(|&n| n as i64).collect::<Vec<_>>());
        let (mut memory, mut value) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: statuses are looked at before results; the shape is copied, and the place of the memory too
        unsafe {
            let allocator = sys::OrtAllocatorType::OrtDeviceAllocator;
            check((api.CreateCpuMemoryInfo)(allocator, sys::OrtMemType::OrtMemTypeDefault, &mut memory))?;
            let made = (api.CreateTensorWithDataAsOrtValue)(
                memory,
                start,
                bytes,
                shape.as_ptr(),
                shape.len(),
                kind,
                &mut value,
            );
            (api.ReleaseMemoryInfo)(memory);
            check(made)?;
        }
        Ok(Self(NonNull::new(value).context("ONNX Runtime gave no tensor")?))
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: made by CreateTensorWithDataAsOrtValue, and released once; a binding has a share of its own
        unsafe { (ort::api().ReleaseValue)(self.0.as_ptr()) }
    }
}

fn check(status: sys::OrtStatusPtr) -> Result<()> {
    // SAFETY: the status comes from ONNX Runtime and is handed on once
    Ok(unsafe { ort::Error::result_from_status(status) }?)
}
