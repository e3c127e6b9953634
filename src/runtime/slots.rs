//! A language model in ONNX Runtime whose keys and values stay where they are: slots of one cache, each with a
//! sequence of its own length.
//!
//! The cache is ours, in the memory of the provider that runs the graph. ONNX Runtime sees it through tensors that point
//! into it, bound as a graph's past and as its present at once: a run writes the new keys and values behind the old ones,
//! and copies nothing.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::Context;
use ort::value::TensorElementType;

use super::binding::{Binding, Kind, Place, Tensor};
use super::memory::Bytes;
use super::rows::{Memory, Mover, RowMove, Rows};
use super::session::{Model, OrtSession, Threads, Waiting};
use super::{Provider, Providers, pages};
use crate::say::Say;
use crate::{Result, bail_unusable, unusable};

/// What a graph is given at every run.
const INPUTS: [&CStr; 5] =
    [c"input_ids", c"position_ids", c"seqlens_k", c"total_sequence_length", c"logits_at"];

/// A graph of the form [`crate::task::Form::InPlace`], and its cache.
pub struct Slots {
    // in the order in which they are let go: what points into the next ones first, and the session last
    bindings: HashMap<Range<usize>, Binding>,
    /// Keys and values of each layer, (slots, H, capacity, D).
    caches: Vec<LayerCache>,
    memory: Memory,
    session: OrtSession,
    /// Where the caches lie, and where all else does.
    cache_place: Place,
    host: Place,
    /// Those of [`INPUTS`] that the graph asks for.
    inputs: Vec<&'static CStr>,
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
    /// A row a token of a head.
    rows: Rows,
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
    /// As [`OrtSession::open`]; the graph is not of the form.
    pub fn open(model: &Path, providers: &Providers, threads: usize, say: Say) -> Result<Self> {
        Self::open_where(model, providers, threads, say, |provider| match provider {
            Provider::Cpu => Ok(None),
            Provider::Cuda => Ok(Some(Place::CUDA)),
            other => bail_unusable!("texts are generated on cpu and cuda, not on {}", other.name()),
        })
    }

    /// The same, where the cache lies in ONNX Runtime's memory of that name, or in this process's own.
    fn open_where(
        model: &Path,
        providers: &Providers,
        threads: usize,
        say: Say,
        place: impl FnOnce(Provider) -> Result<Option<&'static CStr>>,
    ) -> Result<Self> {
        let threads = Threads::Together(threads);
        let session = OrtSession::open_waiting(Model::File(model), providers, threads, Waiting::Spins, say)?;
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
            let numbers = input.dtype().tensor_type();
            let kind = match numbers {
                Some(TensorElementType::Float32) => Some(Kind::F32),
                Some(TensorElementType::Float16) => Some(Kind::F16),
                _ => None,
            };
            let known = match shape[..] {
                [_, heads, _, width] => size(heads).zip(size(width)).zip(kind),
                _ => None,
            };
            let Some(((heads, width), kind)) = known else {
                bail_unusable!(
                    "{}: {} is {numbers:?} of the shape {shape:?}, expected (batch, heads, capacity, width) in fp32 or \
                     fp16 with heads and width of 1 to {LARGEST}: export it again",
                    model.display(),
                    input.name()
                );
            };
            caches.push(LayerCache {
                past: CString::new(input.name())?,
                present: CString::new(format!("present.{layer}"))?,
                heads,
                rows: Rows { bytes: Bytes::none()?, kind, width },
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
        let how = &providers.how;
        let place_of = |name| Place::of(name, if name == Place::CPU { 0 } else { how.device });
        let (cache_place, memory) = match place(session.provider())? {
            None => (Place::CPU, Memory::Own),
            Some(name) => {
                let kind = caches.first().map_or(Kind::F16, |cache| cache.rows.kind);
                let mover = Mover::new(&session, place_of(name)?, providers, kind)?;
                (name, Memory::Providers(Box::new(mover)))
            }
        };
        let (cache_place, host) = (place_of(cache_place)?, place_of(Place::CPU)?);
        pages::gather();
        Ok(Self {
            bindings: HashMap::new(),
            caches,
            memory,
            session,
            cache_place,
            host,
            inputs,
            slots: 0,
            capacity: 0,
            vocabulary,
            logits: Vec::new(),
        })
    }

    /// What runs the graph.
    pub fn provider(&self) -> Provider {
        self.session.provider()
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
        let bytes = |cache: &LayerCache| cache.heads.saturating_mul(cache.rows.row_bytes());
        self.caches.iter().map(bytes).fold(0, usize::saturating_add)
    }

    /// Makes so many slots with room for so many tokens each. What the kept slots have read stays, as far as there is
    /// room for it.
    ///
    /// # Errors
    /// There is no memory for them; nothing is changed then. The provider fails to copy what was read: there are no
    /// slots then.
    pub fn resize(&mut self, slots: usize, capacity: usize) -> Result<()> {
        if (slots, capacity) == (self.slots, self.capacity) {
            return Ok(());
        }
        let memory = &mut self.memory;
        let mut zeros = |cache: &LayerCache| {
            let rows = [cache.heads, capacity].into_iter().try_fold(slots, usize::checked_mul);
            memory.zeros(rows.context("too many rows")?, cache.rows.width, cache.rows.kind)
        };
        // all that is asked for before anything is changed: where it can't be had, that ends no process
        let made: Result<Vec<Rows>> = self.caches.iter().map(&mut zeros).collect();
        let made = made
            .with_context(|| format!("{slots} slots of {capacity} tokens are more than the memory holds"))?;
        self.bindings.clear(); // they point at what is freed below
        let kept = self.capacity.min(capacity);
        for (cache, mut rows) in self.caches.iter_mut().zip(made) {
            let heads = if kept > 0 { self.slots.min(slots) * cache.heads } else { 0 };
            let head = |i| RowMove { from: i * self.capacity, to: i * capacity, count: kept };
            let moves: Vec<RowMove> = (0..heads).map(head).collect();
            if let Err(error) = self.memory.move_to(&mut cache.rows, &mut rows, &moves) {
                self.forget()?;
                return Err(error);
            }
            cache.rows = rows;
        }
        (self.slots, self.capacity) = (slots, capacity);
        Ok(())
    }

    /// Lets all slots go.
    fn forget(&mut self) -> Result<()> {
        (self.slots, self.capacity) = (0, 0);
        self.caches.iter_mut().try_for_each(|cache| {
            cache.rows.bytes = Bytes::none()?;
            Ok(())
        })
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
    ///
    /// # Errors
    /// The provider fails.
    pub fn copy(&mut self, pairs: &[(usize, usize)], tokens: Range<usize>) -> Result<()> {
        let capacity = self.capacity;
        assert!(tokens.end <= capacity, "tokens {tokens:?} of slots with room for {capacity}");
        for cache in &mut self.caches {
            let row = |slot: usize, head: usize| (slot * cache.heads + head) * capacity + tokens.start;
            let count = tokens.len();
            let of_pair = |&(from, to): &(usize, usize)| {
                (0..cache.heads).map(move |head| RowMove { from: row(from, head), to: row(to, head), count })
            };
            let moves: Vec<RowMove> = pairs.iter().flat_map(of_pair).collect();
            self.memory.move_within(&mut cache.rows, &moves)?;
        }
        Ok(())
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
                    let shape = [rows, cache.heads, self.capacity, cache.rows.width];
                    let size = cache.heads * self.capacity * cache.rows.row_bytes();
                    let part = cache.rows.bytes.part(slots.start * size..slots.end * size);
                    // SAFETY: the bindings are dropped before a cache is freed, which never moves, and nobody looks at
                    // it while a run is under way, for which `self` is borrowed mutably.
                    let value = unsafe { Tensor::over(&self.cache_place, part, cache.rows.kind, &shape)? };
                    binding.output(&cache.present, &value)?;
                    binding.input(&cache.past, &value)?;
                }
                place.insert(binding)
            }
        };
        let (shape, host) = ([rows, tokens], &self.host);
        // SAFETY: what these point at lives until the run is over. The binding keeps a share of them, which then points
        // at what may be gone; nobody follows it, because each of them is bound anew before the next run.
        unsafe {
            let small = [
                (c"input_ids", Tensor::of(host, ids, &shape)?),
                (c"position_ids", Tensor::of(host, &positions, &shape)?),
                (c"seqlens_k", Tensor::of(host, &last, &[rows])?),
                (c"total_sequence_length", Tensor::of(host, &total, &[1])?),
                (c"logits_at", Tensor::of(host, asked, &[asked.len()])?),
            ];
            for (name, value) in small.iter().filter(|(name, _)| self.inputs.contains(name)) {
                binding.input(name, value)?;
            }
            let logits = NonNull::from(self.logits.as_mut_slice());
            let logits = NonNull::slice_from_raw_parts(logits.cast::<u8>(), size_of_val(&*self.logits));
            let shape = [rows, asked.len(), self.vocabulary];
            binding.output(c"logits", &Tensor::over(host, logits, Kind::F32, &shape)?)?;
            binding
                .run(&mut self.session)
                .with_context(|| format!("{rows} slots read {tokens} tokens each"))?;
        }
        Ok(&mut self.logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{GraphKind, Precision, model, write};
    use crate::saved::Saved;

    /// The tiny language model's graph in this precision.
    fn graph(dir: &Path, precision: Precision) -> std::path::PathBuf {
        let saved = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-gpt2-lm");
        let Saved { config, task, weights, tokenizer, .. } = Saved::open(&saved).unwrap();
        let kind = GraphKind::in_place(precision);
        let path = dir.join("generate.onnx");
        write::save(model::build(&config, &task, &weights, tokenizer.hash(), kind).unwrap(), &path, false)
            .unwrap();
        path
    }

    fn open(path: &Path, place: Option<&'static CStr>) -> Slots {
        let cpu = Providers::only(Provider::Cpu);
        Slots::open_where(path, &cpu, 1, Say::default(), |_| Ok(place)).unwrap()
    }

    /// The scores behind the last of a slot's new tokens.
    fn last(slots: &mut Slots, slot: usize, ids: &[i64], length: usize) -> Vec<f32> {
        let asked = [ids.len() as i64 - 1];
        slots
            .read(SlotRead { slots: &(slot..slot + 1), ids, lengths: &[length], asked: &asked })
            .unwrap()
            .to_vec()
    }

    /// As on a GPU, whose memory we never touch ourselves: here it is what ONNX Runtime allocates on the processor.
    #[test]
    fn what_slots_have_read_goes_with_them_in_our_memory_and_in_a_providers_in_two_bytes_and_in_four() {
        let dir = tempfile::tempdir().unwrap();
        for (precision, bytes) in [(Precision::Fp32, 4), (Precision::Fp16, 2)] {
            let path = graph(dir.path(), precision);
            for place in [None, Some(Place::CPU)] {
                let (mut alone, mut slots) = (open(&path, place), open(&path, place));
                assert_eq!(slots.token_bytes(), 2 * 2 * 32 * bytes, "keys and values of two layers, 32 wide");
                let texts: [Vec<i64>; 3] =
                    [0, 1, 2].map(|i| (0..5 + i).map(|k| 7 * k + 31 * i + 1).collect());
                alone.resize(1, 40).unwrap();
                let mut expected = |i: usize| last(&mut alone, 0, &[&texts[i][..], &[9]].concat(), 0);
                let expected: Vec<Vec<f32>> = (0..3).map(&mut expected).collect();
                assert!(expected[0] != expected[1] && expected[1] != expected[2]);

                slots.resize(3, 9).unwrap();
                for (i, text) in texts.iter().enumerate() {
                    last(&mut slots, i, text, 0);
                }
                let check = |slots: &mut Slots, slot: usize, i: usize| {
                    let found = last(slots, slot, &[9], texts[i].len());
                    let apart =
                        found.iter().zip(&expected[i]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    let most = if bytes == 4 { 1e-5 } else { 2e-2 };
                    assert!(apart < most, "{precision}, {place:?}, slot {slot} of text {i}: {apart}");
                };
                slots.resize(4, 30).unwrap(); // more, and each larger
                (0..3).for_each(|i| check(&mut slots, i, i));
                slots.copy(&[(2, 3), (0, 2), (2, 0)], 0..7).unwrap(); // two of them change places
                [(0, 2), (1, 1), (2, 0), (3, 2)].into_iter().for_each(|(slot, i)| check(&mut slots, slot, i));
                slots.resize(2, 8).unwrap(); // fewer, and each smaller
                [(0, 2), (1, 1)].into_iter().for_each(|(slot, i)| check(&mut slots, slot, i));
                // what is behind a copied range stays
                slots.copy(&[(0, 1)], 0..3).unwrap();
                slots.copy(&[(0, 1)], 3..7).unwrap();
                check(&mut slots, 1, 2);

                let before = (slots.slots(), slots.capacity());
                assert!(slots.resize(usize::MAX / 64, 64).is_err());
                assert_eq!((slots.slots(), slots.capacity()), before);
                check(&mut slots, 0, 2);
                slots.resize(0, 0).unwrap();
            }
        }
    }

    #[test]
    fn sizes_that_a_graph_does_not_say_are_none() {
        assert_eq!([1, 12, LARGEST].map(size), [Some(1), Some(12), Some(1 << 24)]);
        assert_eq!([-1, 0, LARGEST + 1, i64::MIN, i64::MAX].map(size), [None; 5]);
    }
}
