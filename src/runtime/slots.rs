//! A language model in ONNX Runtime whose keys and values stay where they are: slots of one cache, each with a
//! sequence of its own length.
//!
//! The cache is ours. ONNX Runtime sees it through tensors that point into it, bound as a graph's past and as its
//! present at once: a run writes the new keys and values behind the old ones, and copies nothing.
//!
//! This is written in ONNX Runtime's C functions: ort's `IoBinding` binds a tensor to both sides only where it is a whole
//! allocation of ONNX Runtime's own, and a run here is over some of the slots.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::Context;
use ort::AsPointer;
use ort::sys;

use super::session::{Model, OrtSession, Threads, Waiting};
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
    caches: Vec<LayerCache>,
    slots: usize,
    capacity: usize,
    vocabulary: usize,
    /// What the last run gave, (rows, asked, V).
    logits: Vec<f32>,
}

struct LayerCache {
    past: CString,
    present: CString,
    heads: usize,
    width: usize,
    numbers: PinnedNumbers,
}

/// f32 numbers that bindings point into. All pointers to them come from the allocation's own, so that a look at the
/// numbers in between takes no binding's right away.
struct PinnedNumbers {
    start: NonNull<f32>,
    length: usize,
}

// SAFETY: owned as a boxed slice would be; whoever holds pointers into it is kept together with it.
unsafe impl Send for PinnedNumbers {}

impl PinnedNumbers {
    fn zeros(length: usize) -> Self {
        let numbers: &mut [f32] = Box::leak(vec![0.0; length].into_boxed_slice());
        Self { start: NonNull::from(numbers).cast(), length }
    }

    fn as_slice(&self) -> &[f32] {
        // SAFETY: so many initialised numbers, and a run, which alone writes others', borrows their owner mutably.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }

    /// The place of a range of the numbers.
    fn part(&mut self, range: Range<usize>) -> NonNull<[f32]> {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: inside the allocation, by the assertion.
        NonNull::slice_from_raw_parts(unsafe { self.start.add(range.start) }, range.len())
    }
}

impl Drop for PinnedNumbers {
    fn drop(&mut self) {
        let numbers = NonNull::slice_from_raw_parts(self.start, self.length);
        // SAFETY: from `Box::leak` in `zeros`, and freed once.
        drop(unsafe { Box::from_raw(numbers.as_ptr()) });
    }
}

/// The largest size that is taken from a graph: so many of so many numbers don't overflow.
const LARGEST: i64 = 1 << 24;

/// A size that a graph has to say, if it says one.
fn size(n: i64) -> Option<usize> {
    (1..=LARGEST).contains(&n).then_some(n as usize)
}

/// Tokens for the consecutive slots of a run.
#[derive(Clone, Copy, Debug)]
pub struct SlotRead<'a> {
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
        let threads = Threads::Together(threads);
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
            let known = match shape[..] {
                [_, heads, _, width] => size(heads).zip(size(width)),
                _ => None,
            };
            let Some((heads, width)) = known else {
                bail_unusable!(
                    "{}: {} has the shape {shape:?}, expected (batch, heads, capacity, width) with heads and width of \
                     1 to {LARGEST}: export it again",
                    model.display(),
                    input.name()
                );
            };
            caches.push(LayerCache {
                past: CString::new(input.name())?,
                present: CString::new(format!("present.{layer}"))?,
                heads,
                width,
                numbers: PinnedNumbers::zeros(0),
            });
        }
        let outputs = session.session.outputs();
        let logits = outputs.iter().find(|output| output.name() == "logits");
        let shape = logits.and_then(|output| output.dtype().tensor_shape()).map(|shape| shape.to_vec());
        let vocabulary = match shape.as_deref() {
            Some(&[_, _, vocabulary]) => size(vocabulary),
            _ => None,
        };
        let Some(vocabulary) = vocabulary else {
            bail_unusable!(
                "{} gives no logits for 1 to {LARGEST} tokens: run `tk export` again",
                model.display()
            );
        };
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
        let bytes =
            |cache: &LayerCache| cache.heads.saturating_mul(cache.width).saturating_mul(size_of::<f32>());
        self.caches.iter().map(bytes).fold(0, usize::saturating_add)
    }

    /// Makes so many slots with room for so many tokens each. What the kept slots have read stays, as far as there is
    /// room for it.
    ///
    /// # Errors
    /// There is no memory for them; nothing is changed then.
    pub fn resize(&mut self, slots: usize, capacity: usize) -> Result<()> {
        if (slots, capacity) == (self.slots, self.capacity) {
            return Ok(());
        }
        let length = |cache: &LayerCache| {
            [cache.heads, capacity, cache.width].into_iter().try_fold(slots, usize::checked_mul)
        };
        // asked for before anything is changed: where it can't be had, that ends no process
        let largest = self.caches.iter().map(length).max().flatten().unwrap_or(0);
        let all = self.caches.iter().map(length).try_fold(0, |sum: usize, n| sum.checked_add(n?));
        let can_be_had = all.is_some() && Vec::<f32>::new().try_reserve_exact(largest).is_ok();
        anyhow::ensure!(can_be_had, "{slots} slots of {capacity} tokens are more than the memory holds");
        self.bindings.clear(); // they point at what is freed below
        for cache in &mut self.caches {
            let mut numbers = PinnedNumbers::zeros(length(cache).unwrap_or(0)); // it was checked above
            let values = numbers.as_mut_slice();
            pages::ask_for(values);
            let kept = self.capacity.min(capacity) * cache.width;
            if kept > 0 {
                let old = cache.numbers.as_slice().chunks_exact(self.capacity * cache.width);
                for (new, old) in values.chunks_exact_mut(capacity * cache.width).zip(old) {
                    new[..kept].copy_from_slice(&old[..kept]);
                }
            }
            cache.numbers = numbers;
        }
        (self.slots, self.capacity) = (slots, capacity);
        Ok(())
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
        self.resize(self.slots.max(1), self.capacity.max(ids.len()))?;
        for (i, part) in ids.chunks(PART).enumerate() {
            let start = i * PART;
            let ids: Vec<i64> = part.iter().map(|&id| i64::from(id)).collect();
            let asked: Vec<i64> = (0..part.len() as i64).collect();
            let reading = SlotRead { slots: &(0..1), ids: &ids, lengths: &[start], asked: &asked };
            each(start, self.read(reading)?)?;
        }
        Ok(())
    }

    /// Copies the tokens of a range from slot to slot, for all pairs (from, to) at once.
    pub fn copy(&mut self, pairs: &[(usize, usize)], tokens: Range<usize>) {
        let capacity = self.capacity;
        assert!(tokens.end <= capacity, "tokens {tokens:?} of slots with room for {capacity}");
        for cache in &mut self.caches {
            let place = |slot: usize, head: usize| {
                let row = (slot * cache.heads + head) * capacity;
                (row + tokens.start) * cache.width..(row + tokens.end) * cache.width
            };
            let values = cache.numbers.as_mut_slice();
            for head in 0..cache.heads {
                // all are read before any is written
                let read: Vec<Vec<f32>> =
                    pairs.iter().map(|&(from, _)| values[place(from, head)].to_vec()).collect();
                for (read, &(_, to)) in read.iter().zip(pairs) {
                    values[place(to, head)].copy_from_slice(read);
                }
            }
        }
    }

    /// Reads tokens and gives the scores of the next one behind those that are asked, (slots, asked, V).
    ///
    /// # Errors
    /// A slot has no room, or the run fails.
    pub fn read(&mut self, reading: SlotRead) -> Result<&mut [f32]> {
        let SlotRead { slots, ids, lengths, asked } = reading;
        let rows = slots.len();
        anyhow::ensure!(
            rows > 0 && slots.end <= self.slots && lengths.len() == rows && ids.len().is_multiple_of(rows),
            "{} ids and {} lengths for the slots {slots:?} of {}",
            ids.len(),
            lengths.len(),
            self.slots
        );
        let tokens = ids.len() / rows;
        let longest = lengths.iter().max().map_or(0, |longest| longest.saturating_add(tokens));
        anyhow::ensure!(
            tokens > 0
                && longest <= self.capacity.min(i32::MAX as usize)
                && asked.iter().all(|&column| (0..tokens as i64).contains(&column)),
            "{longest} tokens in slots of {}, asked for {asked:?} of {tokens}",
            self.capacity
        );
        let positions: Vec<i64> =
            lengths.iter().flat_map(|&length| (length..length + tokens).map(|place| place as i64)).collect();
        let last: Vec<i32> = lengths.iter().map(|&length| (length + tokens) as i32 - 1).collect();
        let total = [longest as i32];
        let scores = rows.checked_mul(asked.len()).and_then(|rows| rows.checked_mul(self.vocabulary));
        self.logits.resize(scores.context("more scores than memory holds")?, 0.0);

        let binding = match self.bindings.entry(slots.clone()) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let mut binding = Binding::new(&self.session)?;
                for cache in &mut self.caches {
                    let shape = [rows, cache.heads, self.capacity, cache.width];
                    let size = cache.heads * self.capacity * cache.width;
                    let part = cache.numbers.part(slots.start * size..slots.end * size);
                    // SAFETY: the bindings are dropped before a cache is freed, which never moves, and nobody looks at
                    // it while a run is under way, for which `self` is borrowed mutably.
                    let value = unsafe { Tensor::over(part, &shape)? };
                    binding.output(&cache.present, &value)?;
                    binding.bind_input(&cache.past, &value)?;
                }
                place.insert(binding)
            }
        };
        let shape = [rows, tokens];
        // SAFETY: what these point at lives until the run is over. The binding keeps a share of them, which then points
        // at what may be gone; nobody follows it, because each of them is bound anew before the next run.
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
            let logits = Tensor::over(
                NonNull::from(self.logits.as_mut_slice()),
                &[rows, asked.len(), self.vocabulary],
            )?;
            binding.output(c"logits", &logits)?;
            binding
                .run(&mut self.session)
                .with_context(|| format!("{rows} slots read {tokens} tokens each"))?;
        }
        Ok(&mut self.logits)
    }
}

/// What a session reads and writes in a run.
struct Binding(NonNull<sys::OrtIoBinding>);

// SAFETY: ONNX Runtime ties a binding to no thread, and one at a time uses it, through `&mut Slots`.
unsafe impl Send for Binding {}

impl Binding {
    fn new(session: &OrtSession) -> Result<Self> {
        let mut binding = std::ptr::null_mut();
        // SAFETY: the session is alive; a status is looked at before the result.
        let status = unsafe { (ort::api().CreateIoBinding)(session.session.ptr().cast_mut(), &mut binding) };
        check(status)?;
        Ok(Self(NonNull::new(binding).context("ONNX Runtime gave no binding")?))
    }

    fn bind_input(&mut self, name: &CStr, value: &Tensor) -> Result<()> {
        // SAFETY: all three are alive; the name is copied, and the binding takes a share of the value.
        check(unsafe { (ort::api().BindInput)(self.0.as_ptr(), name.as_ptr(), value.0.as_ptr()) })
    }

    fn output(&mut self, name: &CStr, value: &Tensor) -> Result<()> {
        // SAFETY: as above
        check(unsafe { (ort::api().BindOutput)(self.0.as_ptr(), name.as_ptr(), value.0.as_ptr()) })
    }

    /// # Safety
    /// What the bound values point at is alive, and nobody else uses it meanwhile.
    unsafe fn run(&mut self, session: &mut OrtSession) -> Result<()> {
        let session = session.session.ptr().cast_mut();
        // SAFETY: both are alive; the rest is promised by the caller
        check(unsafe { (ort::api().RunWithBinding)(session, std::ptr::null(), self.0.as_ptr()) })
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // SAFETY: made by CreateIoBinding, and released once
        unsafe { (ort::api().ReleaseIoBinding)(self.0.as_ptr()) }
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
    /// The values outlive every run that the tensor is bound to.
    unsafe fn over<T: Element>(values: NonNull<[T]>, shape: &[usize]) -> Result<Self> {
        // SAFETY: promised by the caller
        unsafe { Self::at(values.as_ptr().cast(), values.len() * size_of::<T>(), shape, T::KIND) }
    }

    /// The same for an input that runs only read: no graph writes over what it is given, unless that is bound as an
    /// output, too.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As a run does that reads and writes through a binding, before and after we look at the numbers ourselves.
    #[test]
    fn pointers_into_the_numbers_outlive_our_own_looks_at_them() {
        let mut numbers = PinnedNumbers::zeros(6);
        let (first, second) = (numbers.part(0..4), numbers.part(2..6));
        // SAFETY: both lie inside of the numbers, which are alive, and nobody else writes them.
        unsafe { first.cast::<f32>().add(3).write(3.0) };
        numbers.as_mut_slice()[0] = 1.0;
        // SAFETY: as above.
        unsafe { second.cast::<f32>().add(3).write(5.0) };
        assert_eq!(numbers.as_slice(), [1.0, 0.0, 0.0, 3.0, 0.0, 5.0]);
        // SAFETY: as above.
        assert_eq!(unsafe { first.cast::<f32>().read() }, 1.0);
        assert!(PinnedNumbers::zeros(0).as_slice().is_empty());
    }

    #[test]
    #[should_panic]
    fn a_part_behind_the_numbers_is_refused() {
        PinnedNumbers::zeros(6).part(4..7);
    }

    #[test]
    fn sizes_that_a_graph_does_not_say_are_none() {
        assert_eq!([1, 12, LARGEST].map(size), [Some(1), Some(12), Some(1 << 24)]);
        assert_eq!([-1, 0, LARGEST + 1, i64::MIN, i64::MAX].map(size), [None; 5]);
    }
}
