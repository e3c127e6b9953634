//! Multi-head attention over packed sequences: a task a sequence and head, queries in blocks.
//!
//! Nothing of the size of a sequence squared outlives a block: the forward pass keeps the logarithm of each
//! row's softmax denominator, and the backward pass computes the weights again from it (Dao et al. 2022,
//! arXiv:2205.14135). Causal attention computes no key behind a block's last query, and attention in a window none
//! outside of it.

mod composite;
mod relative;

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;
use rayon::prelude::*;

pub use composite::{Paddings, composite, composite_in};
pub use relative::{ByDistance, Relative};
use relative::{Scratch, Terms, Turns};

use super::buffer::Buffer;
use super::dropout::{Mask, Row};
use super::gemm::{Factors, Matrix, MatrixMut, Shared, Write, product, row_blocks};
use super::kept::Kept;
use super::linear::{Input, LinearMap};
use super::simd;
use crate::data::batch::Spans;
use crate::eager::tape::{Flow, Tape, TapeValue};
use crate::model::ops::Sees;

/// Queries of one block.
const BLOCK: usize = 64;

/// The same where each block has products of all its keys with a table.
const LARGE_BLOCK: usize = 256;

/// What scores take from distances, on the tape.
type OnTape = Relative<Arc<TapeValue>>;

/// q, k, v (T, H·D) → (T, H·D), fused; q and the result are (B, H·D) where one token of every sequence asks.
pub fn attention(
    tape: &Tape,
    q: &Arc<TapeValue>,
    k: &Arc<TapeValue>,
    v: &Arc<TapeValue>,
    how: &Attention,
    relative: &OnTape,
) -> Result<Arc<TapeValue>> {
    let width = q.width;
    how.check([q, k, v].map(|x| (x.rows(), x.width)), relative)?;
    let turns = how.turns(relative, width)?;
    let turned = how.turned([&q.numbers, &k.numbers], width, turns.as_ref());
    let mut log_sums = Buffer::any(q.rows() * how.heads);
    let columns = match &turned {
        Some([q, k]) => [q, k, &v.numbers].map(|x| Columns::all(x, width)),
        None => [q, k, v].map(|x| Columns::all(&x.numbers, width)),
    };
    let y = how.forward(columns, width, &mut log_sums, relative)?;
    let kept = turned.filter(|_| tape.keeps());
    let learns = [q, k, v].iter().any(|x| x.learns) || relative.learns();
    let (how, inputs, relative) = (how.clone(), [q, k, v].map(Arc::clone), relative.clone());
    Ok(tape.push_with_result(y, width, learns, move |y, dy, flow| {
        let [q, k, v] = inputs.each_ref().map(|x| &x.numbers[..]);
        let turned = kept.or_else(|| how.turned([q, k], width, turns.as_ref()));
        let numbers = match &turned {
            Some([q, k]) => [&q[..], k, v],
            None => [q, k, v],
        };
        let mut gradients = how.backward_of_all(numbers, &y, &log_sums, &dy, &relative, flow)?;
        if let Some(turns) = &turns {
            for (dx, at) in gradients.iter_mut().zip(how.positions()) {
                turns.turn(dx, width, 0..width, &at, true);
            }
        }
        inputs.iter().zip(gradients).for_each(|(x, gradient)| flow.give(x, gradient));
        Ok(())
    }))
}

/// The same where q, k and v are the three parts of one value, (T, 3·H·D), as one linear map gives them.
pub fn attention_of_parts(
    tape: &Tape,
    x: &Arc<TapeValue>,
    how: &Attention,
    relative: &OnTape,
) -> Result<Arc<TapeValue>> {
    let width = x.width / 3;
    how.check([(x.rows(), width); 3], relative)?;
    let turns = how.turns(relative, width)?;
    let turn = move |how: &Attention, x: &mut [f32], back| {
        if let Some(turns) = &turns {
            turns.turn(x, 3 * width, 0..2 * width, &how.positions()[1], back);
        }
    };
    let copy = matches!(relative, Relative::Rotary { .. }).then(|| {
        let mut copy = Buffer::of(&x.numbers);
        turn(how, &mut copy, false);
        copy
    });
    let mut log_sums = Buffer::any(x.rows() * how.heads);
    let columns = Columns::parts(copy.as_deref().unwrap_or(&x.numbers), width);
    let y = how.forward(columns, width, &mut log_sums, relative)?;
    let learns = x.learns || relative.learns();
    let (how, x, relative) = (how.clone(), x.clone(), relative.clone());
    Ok(tape.push_with_result(y, width, learns, move |y, dy, flow| {
        let mut dx = Buffer::any(x.numbers.len());
        let places = ColumnsMut::parts(&mut dx, width);
        let columns = Columns::parts(copy.as_deref().unwrap_or(&x.numbers), width);
        how.backward(columns, &y, &log_sums, &dy, places, &relative, flow)?;
        turn(&how, &mut dx, true);
        flow.give(&x, dx);
        Ok(())
    }))
}

/// The same over one linear map of x, (T, C) → (T, 3·H·D).
pub fn self_attention_of_parts(
    tape: &Tape,
    x: &Arc<TapeValue>,
    map: &LinearMap,
    how: &Attention,
    relative: &OnTape,
) -> Result<Arc<TapeValue>> {
    let (rows, width) = (x.rows(), map.output / 3);
    map.check(x.width)?;
    how.check([(rows, width); 3], relative)?;
    let turns = how.turns(relative, width)?;
    let mapped = how.mapped_parts(&x.numbers, map, turns.as_ref())?;
    let mut log_sums = Buffer::any(rows * how.heads);
    let y = how.forward(Columns::parts(&mapped, width), width, &mut log_sums, relative)?;
    let kept = tape.keeps().then(|| Kept::of(mapped, how.factors));
    let learns = x.learns || map.learns() || relative.learns();
    let (how, x, map, relative) = (how.clone(), x.clone(), map.clone(), relative.clone());
    Ok(tape.push_with_result(y, width, learns, move |y, dy, flow| {
        let mapped = match kept {
            Some(kept) => kept.numbers(),
            None => how.mapped_parts(&x.numbers, &map, turns.as_ref())?,
        };
        let mut dmapped = Buffer::any(mapped.len());
        let places = ColumnsMut::parts(&mut dmapped, width);
        how.backward(Columns::parts(&mapped, width), &y, &log_sums, &dy, places, &relative, flow)?;
        drop(mapped);
        if let Some(turns) = &turns {
            turns.turn(&mut dmapped, 3 * width, 0..2 * width, &how.positions()[1], true);
        }
        flow.add(&x, |dx, write| map.backward_input(dx, write, &dmapped))?;
        map.backward_weights(&Input::new(&x.numbers), &dmapped);
        Ok(())
    }))
}

/// The same over three linear maps of x, (T, C).
pub fn self_attention(
    tape: &Tape,
    x: &Arc<TapeValue>,
    maps: [&LinearMap; 3],
    how: &Attention,
    relative: &OnTape,
) -> Result<Arc<TapeValue>> {
    let (rows, width) = (x.rows(), maps[0].output);
    maps.iter().try_for_each(|map| map.check(x.width))?;
    how.check(maps.map(|map| (rows, map.output)), relative)?;
    let turns = how.turns(relative, width)?;
    let mapped = how.mapped(&x.numbers, maps, turns.as_ref())?;
    let mut log_sums = Buffer::any(rows * how.heads);
    let y = how.forward(mapped.each_ref().map(|x| Columns::all(x, width)), width, &mut log_sums, relative)?;
    let kept = tape.keeps().then(|| mapped.map(|x| Kept::of(x, how.factors)));
    let learns = x.learns || maps.iter().any(|map| map.learns()) || relative.learns();
    let (how, x, maps, relative) = (how.clone(), x.clone(), maps.map(LinearMap::clone), relative.clone());
    Ok(tape.push_with_result(y, width, learns, move |y, dy, flow| {
        let mapped = match kept {
            Some(kept) => kept.map(Kept::numbers),
            None => how.mapped(&x.numbers, maps.each_ref(), turns.as_ref())?,
        };
        let numbers = mapped.each_ref().map(|x| &x[..]);
        let mut gradients = how.backward_of_all(numbers, &y, &log_sums, &dy, &relative, flow)?;
        drop(mapped);
        if let Some(turns) = &turns {
            for (dx, at) in gradients.iter_mut().zip(how.positions()) {
                turns.turn(dx, width, 0..width, &at, true);
            }
        }
        let input = Input::new(&x.numbers);
        for (map, dy) in maps.iter().zip(&gradients) {
            flow.add(&x, |dx, write| map.backward_input(dx, write, dy))?;
            map.backward_weights(&input, dy);
        }
        Ok(())
    }))
}

/// Three linear maps of x, (T, C).
fn map_all(x: &[f32], maps: [&LinearMap; 3]) -> Result<[Buffer; 3]> {
    let (rows, width) = (x.len() / maps[0].input, maps[0].output);
    let mut mapped = [(); 3].map(|()| Buffer::any(rows * width));
    let packed = [maps[0].packed()?, maps[1].packed()?, maps[2].packed()?];
    let biases = [maps[0].bias()?, maps[1].bias()?, maps[2].bias()?];
    let starts = mapped.each_mut().map(|y| Shared::new(y));
    row_blocks(rows, maps[0].factors, |rows| {
        for (i, start) in starts.iter().enumerate() {
            // SAFETY: blocks of rows do not overlap, and the buffers outlive the loop.
            let y = unsafe { start.slice(rows.start * width, rows.len() * width) };
            maps[i].block(&packed[i], biases[i].as_deref(), y, x, rows.clone());
        }
    });
    Ok(mapped)
}

/// Which tokens see each other, by how many heads, and which weights are dropped: row `t · H + head` of the mask,
/// column the key's place in its span.
#[derive(Clone)]
pub struct Attention {
    pub spans: Arc<Spans>,
    pub heads: usize,
    pub sees: Sees,
    pub queries: Queries,
    pub mask: Option<Mask>,
    /// Of its products.
    pub factors: Factors,
}

/// Which tokens of every sequence ask.
#[derive(Clone, PartialEq, Eq)]
pub enum Queries {
    All,
    /// The first alone.
    First,
    /// The last alone.
    Last,
    /// Some, one at least: these are the rows of q that each sequence has.
    Asked(Arc<Spans>),
}

/// A sequence and its queries.
struct Asked {
    /// The sequence's rows of the keys.
    span: Range<usize>,
    /// Its rows of the queries.
    queries: Range<usize>,
    /// The first of them's place in the sequence.
    position: usize,
}

/// One block of queries of one head of one sequence.
struct QueryBlock {
    head: usize,
    sequence: usize,
    /// The sequence's tokens that any of the block's sees: the keys.
    keys: Range<usize>,
    /// The first of them's place in the sequence.
    first_key: usize,
    /// The block's rows of the queries.
    queries: Range<usize>,
    /// The first of them's place in the sequence.
    position: usize,
    /// The tokens of the sequence.
    length: usize,
}

/// Queries, keys or values: columns of a row-major matrix, from `at` on.
#[derive(Clone, Copy)]
struct Columns<'a> {
    x: &'a [f32],
    at: usize,
    stride: usize,
}

impl<'a> Columns<'a> {
    fn all(x: &'a [f32], width: usize) -> Self {
        Self { x, at: 0, stride: width }
    }

    fn parts(x: &'a [f32], width: usize) -> [Self; 3] {
        [0, 1, 2].map(|i| Self { x, at: i * width, stride: 3 * width })
    }

    fn rows(&self) -> usize {
        self.x.len() / self.stride
    }

    /// A head's (rows, D).
    fn head(&self, rows: &Range<usize>, head: usize, d: usize) -> Matrix<'a> {
        Matrix::new(&self.x[rows.start * self.stride + self.at + head * d..], rows.len(), d, self.stride)
    }
}

/// The same of a matrix that is written.
#[derive(Clone, Copy)]
struct ColumnsMut {
    x: Shared,
    at: usize,
    stride: usize,
}

impl ColumnsMut {
    fn parts(x: &mut [f32], width: usize) -> [Self; 3] {
        let x = Shared::new(x);
        [0, 1, 2].map(|i| Self { x, at: i * width, stride: 3 * width })
    }

    /// Fills a head's (rows, D) with zeros.
    ///
    /// # Safety
    /// As [`ColumnsMut::head`].
    unsafe fn fill(&self, rows: &Range<usize>, head: usize, d: usize) {
        for row in rows.clone() {
            // SAFETY: the caller's promise.
            unsafe { self.x.slice(row * self.stride + self.at + head * d, d) }.fill(0.0);
        }
    }

    /// A head's (rows, D).
    ///
    /// # Safety
    /// The matrix outlives the result; no other task touches this part of it.
    unsafe fn head<'a>(&self, rows: &Range<usize>, head: usize, d: usize) -> MatrixMut<'a> {
        let start = rows.start * self.stride + self.at + head * d;
        // SAFETY: the part lies inside the matrix; the rest is the caller's promise.
        unsafe { MatrixMut::raw(self.x.get().add(start), rows.len(), d, self.stride) }
    }
}

impl Attention {
    fn mask_row(&self, query: usize, head: usize) -> Option<Row> {
        self.mask.map(|mask| mask.row((query * self.heads + head) as u64))
    }

    /// The places of a sequence of n tokens that the token at a place sees.
    fn seen_from(&self, position: usize, n: usize) -> Range<usize> {
        match self.sees {
            Sees::All => 0..n,
            Sees::Causal => 0..position + 1,
            Sees::Near { reach } => position.saturating_sub(reach)..n.min(position.saturating_add(reach + 1)),
        }
    }

    /// Which of a block's keys its `i`-th query sees.
    fn seen(&self, block: &QueryBlock, i: usize) -> Range<usize> {
        let seen = self.seen_from(block.position + i, block.length);
        seen.start - block.first_key..seen.end - block.first_key
    }

    /// The places in their sequences of the rows of queries, of keys.
    fn positions(&self) -> [Vec<u32>; 2] {
        let queries = self.asked().flat_map(|asked| {
            let first = asked.position as u32;
            first..first + asked.queries.len() as u32
        });
        [queries.collect(), self.spans.iter().flat_map(|span| 0..span.len() as u32).collect()]
    }

    /// How queries and keys are turned, where they are.
    fn turns(&self, relative: &OnTape, width: usize) -> Result<Option<Turns>> {
        let longest = self.spans.iter().map(|span| span.len()).max().unwrap_or(0);
        match relative {
            Relative::Rotary { theta } => Ok(Some(Turns::new(*theta, width / self.heads, longest)?)),
            _ => Ok(None),
        }
    }

    /// Turned copies of queries and keys, where they are turned.
    fn turned(&self, x: [&[f32]; 2], width: usize, turns: Option<&Turns>) -> Option<[Buffer; 2]> {
        let turns = turns?;
        let mut copies = x.map(Buffer::of);
        for (x, at) in copies.iter_mut().zip(self.positions()) {
            turns.turn(x, width, 0..width, &at, false);
        }
        Some(copies)
    }

    /// x through three maps, turned.
    fn mapped(&self, x: &[f32], maps: [&LinearMap; 3], turns: Option<&Turns>) -> Result<[Buffer; 3]> {
        let width = maps[0].output;
        let mut mapped = map_all(x, maps)?;
        if let Some(turns) = turns {
            for (x, at) in mapped.iter_mut().zip(self.positions()) {
                turns.turn(x, width, 0..width, &at, false);
            }
        }
        Ok(mapped)
    }

    /// x through one map to queries, keys and values, turned.
    fn mapped_parts(&self, x: &[f32], map: &LinearMap, turns: Option<&Turns>) -> Result<Buffer> {
        let mut mapped = Buffer::any(x.len() / map.input * map.output);
        map.forward(x, &mut mapped)?;
        if let Some(turns) = turns {
            turns.turn(&mut mapped, map.output, 0..map.output / 3 * 2, &self.positions()[1], false);
        }
        Ok(mapped)
    }

    fn asked(&self) -> impl Iterator<Item = Asked> + '_ {
        self.spans.iter().enumerate().map(|(b, span)| match &self.queries {
            Queries::All => Asked { queries: span.clone(), position: 0, span },
            Queries::First => Asked { queries: b..b + 1, position: 0, span },
            Queries::Last => Asked { queries: b..b + 1, position: span.len() - 1, span },
            Queries::Asked(rows) => Asked { queries: rows.get(b), position: 0, span },
        })
    }

    fn blocks(&self, size: usize) -> Vec<QueryBlock> {
        let mut blocks = Vec::new();
        for (sequence, Asked { span, queries, position }) in self.asked().enumerate() {
            let length = span.len();
            for head in 0..self.heads {
                for start in queries.clone().step_by(size) {
                    let position = position + start - queries.start;
                    let queries = start..(start + size).min(queries.end);
                    let seen = self.seen_from(position, length).start
                        ..self.seen_from(position + queries.len() - 1, length).end;
                    blocks.push(QueryBlock {
                        head,
                        sequence,
                        keys: span.start + seen.start..span.start + seen.end,
                        first_key: seen.start,
                        queries,
                        position,
                        length,
                    });
                }
            }
        }
        blocks
    }
}

impl Attention {
    fn check<T>(&self, shapes: [(usize, usize); 3], relative: &Relative<T>) -> Result<()> {
        let (tokens, width) = (self.spans.tokens(), shapes[0].1);
        let asking = match &self.queries {
            Queries::All => tokens,
            Queries::First | Queries::Last => self.spans.len(),
            Queries::Asked(rows) => rows.tokens(),
        };
        if shapes != [(asking, width), (tokens, width), (tokens, width)] || width % self.heads != 0 {
            candle_core::bail!(
                "attention by {} heads takes {asking} queries, {tokens} keys and values of one width, not {shapes:?}",
                self.heads
            );
        }
        match &self.queries {
            Queries::First | Queries::Last if self.spans.iter().any(|span| span.is_empty()) => {
                candle_core::bail!("a sequence without tokens has no token that asks")
            }
            // its keys and values would get no gradient
            Queries::Asked(rows) if rows.iter().any(|rows| rows.is_empty()) => {
                candle_core::bail!("a sequence has no token that asks")
            }
            Queries::First | Queries::Asked(_) if self.sees == Sees::Causal => {
                candle_core::bail!("of a causal model's tokens all ask, or the last one")
            }
            Queries::Asked(_) if self.sees != Sees::All || !matches!(relative, Relative::Nothing) => {
                candle_core::bail!("where distances count, all tokens ask, the first ones, or the last ones")
            }
            Queries::Asked(rows) if rows.len() != self.spans.len() => {
                candle_core::bail!("{} sequences ask, of {}", rows.len(), self.spans.len())
            }
            _ => Ok(()),
        }
    }

    /// `log_sums` (H, queries) receives the logarithm of each row's softmax denominator.
    fn forward(
        &self,
        [q, k, v]: [Columns; 3],
        width: usize,
        log_sums: &mut [f32],
        relative: &OnTape,
    ) -> Result<Buffer> {
        let (asking, d) = (q.rows(), width / self.heads);
        let scale = relative.scale(d);
        let terms = Terms::new(relative, self, width)?;
        let mut y = Buffer::any(asking * width);
        let y_columns = ColumnsMut { x: Shared::new(&mut y), at: 0, stride: width };
        let sums_start = Shared::new(log_sums);
        self.blocks(block_size(&terms)).par_iter().for_each_init(
            <(Vec<f32>, Scratch)>::default,
            |space, block| {
                let (weights, scratch) = space;
                let QueryBlock { head, keys, queries, .. } = block;
                let (m, n) = (queries.len(), keys.len());
                weights.resize(m * n, 0.0);
                let scores = MatrixMut::new(weights, m, n, n);
                let (q, k) = (q.head(queries, *head, d), k.head(keys, *head, d));
                product(scores, Write::Replace, scale, q, k.transposed(), self.factors);
                terms.add(weights, block, (q, k), scale, scratch);
                // SAFETY: a block's queries and head are its own, in the sums and in y.
                let sums = unsafe { sums_start.slice(head * asking + queries.start, m) };
                for (i, (row, sum)) in weights.chunks_exact_mut(n).zip(sums).enumerate() {
                    let (row, first) = only(row, self.seen(block, i));
                    *sum = softmax(row);
                    if let Some(mask) = self.mask_row(queries.start + i, *head) {
                        multiply(row, mask, block.first_key + first);
                    }
                }
                // SAFETY: as above.
                let y = unsafe { y_columns.head(queries, *head, d) };
                let (weights, v) = (Matrix::new(weights, m, n, n), v.head(keys, *head, d));
                product(y, Write::Replace, 1.0, weights, v, self.factors);
            },
        );
        Ok(y)
    }

    /// dq, dk and dv of queries, keys and values of their own.
    fn backward_of_all(
        &self,
        inputs: [&[f32]; 3],
        y: &TapeValue,
        log_sums: &[f32],
        dy: &[f32],
        relative: &OnTape,
        flow: &mut Flow,
    ) -> Result<[Buffer; 3]> {
        let mut gradients = inputs.map(|x| Buffer::any(x.len()));
        let places = gradients.each_mut().map(|gradient| {
            let x = Shared::new(gradient);
            ColumnsMut { x, at: 0, stride: y.width }
        });
        let inputs = inputs.map(|x| Columns::all(x, y.width));
        self.backward(inputs, y, log_sums, dy, places, relative, flow)?;
        Ok(gradients)
    }

    /// The blocks of the backward pass: those of a sequence's head, which add to the same dK and dV in order, together;
    /// and those tasks together that add to the same gradients of tables. Each with its group of tables.
    fn units(&self, terms: &Terms) -> Vec<(usize, Vec<Vec<QueryBlock>>)> {
        let mut tasks: Vec<Vec<QueryBlock>> = Vec::new();
        for block in self.blocks(block_size(terms)) {
            match tasks.last_mut() {
                Some(task) if (task[0].head, task[0].sequence) == (block.head, block.sequence) => {
                    task.push(block);
                }
                _ => tasks.push(vec![block]),
            }
        }
        if self.sees == Sees::Causal {
            // the last block has every key: it writes all of dK and dV, and the others add to the front
            tasks.iter_mut().for_each(|task| task.reverse());
        }
        let mut units: Vec<(usize, Vec<Vec<QueryBlock>>)> = Vec::new();
        let mut places = std::collections::HashMap::new();
        for task in tasks {
            match terms.group(task[0].sequence, self.spans.len()) {
                None => units.push((0, vec![task])),
                Some(group) => {
                    let place = *places.entry((group, task[0].head)).or_insert_with(|| {
                        units.push((group, Vec::new()));
                        units.len() - 1
                    });
                    units[place].1.push(task);
                }
            }
        }
        units
    }

    /// Writes dq, dk and dv, whose places outlive the call and are nobody else's; gradients of tables flow on.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        [qs, ks, vs]: [Columns; 3],
        y: &TapeValue,
        log_sums: &[f32],
        dy: &[f32],
        [dqs, dks, dvs]: [ColumnsMut; 3],
        relative: &OnTape,
        flow: &mut Flow,
    ) -> Result<()> {
        let (asking, width) = (qs.rows(), y.width);
        let d = width / self.heads;
        let scale = relative.scale(d);
        let terms = Terms::new(relative, self, width)?;
        let mut sums = terms.sums(self.heads);
        let places = sums.places();
        let (ys, dys) = (Columns::all(&y.numbers, width), Columns::all(dy, width));
        let of_task = |(weights, dweights, scratch): &mut (Vec<f32>, Vec<f32>, Scratch),
                       group: usize,
                       task: &[QueryBlock]| {
            for (i, block) in task.iter().enumerate() {
                let QueryBlock { head, keys, queries, .. } = block;
                let mut first = if i == 0 { Write::Replace } else { Write::Add };
                if let Sees::Near { .. } = self.sees {
                    if i == 0 {
                        // no block has every key
                        let all = keys.start - block.first_key..keys.start - block.first_key + block.length;
                        // SAFETY: this sequence and head belong to this task alone.
                        unsafe {
                            dks.fill(&all, *head, d);
                            dvs.fill(&all, *head, d);
                        }
                    }
                    first = Write::Add;
                }
                let (m, n) = (queries.len(), keys.len());
                weights.resize(m * n, 0.0);
                dweights.resize(m * n, 0.0);
                let (q, dy) = (qs.head(queries, *head, d), dys.head(queries, *head, d));
                let (k, v) = (ks.head(keys, *head, d), vs.head(keys, *head, d));
                let scores = MatrixMut::new(weights, m, n, n);
                product(scores, Write::Replace, scale, q, k.transposed(), self.factors);
                terms.add(weights, block, (q, k), scale, scratch);
                let dscores = MatrixMut::new(dweights, m, n, n);
                product(dscores, Write::Replace, 1.0, dy, v.transposed(), self.factors);
                for (i, query) in queries.clone().enumerate() {
                    let seen = self.seen(block, i);
                    let (row, first) = only(&mut weights[i * n..][..n], seen.clone());
                    let (drow, _) = only(&mut dweights[i * n..][..n], seen);
                    let at = query * width + head * d;
                    let delta = dot(&dys.x[at..at + d], &ys.x[at..at + d]);
                    let log_sum = log_sums[head * asking + query];
                    match self.mask_row(query, *head) {
                        None => softmax_backward(row, drow, log_sum, delta),
                        Some(mask) => {
                            let column = block.first_key + first;
                            softmax_backward_masked(row, drow, log_sum, delta, mask, column);
                        }
                    }
                }
                let (p, ds) = (Matrix::new(weights, m, n, n), Matrix::new(dweights, m, n, n));
                // SAFETY: this sequence and head belong to this task alone.
                unsafe {
                    product(dqs.head(queries, *head, d), Write::Replace, scale, ds, k, self.factors);
                    product(dks.head(keys, *head, d), first, scale, ds.transposed(), q, self.factors);
                    product(dvs.head(keys, *head, d), first, 1.0, p.transposed(), dy, self.factors);
                    let of_group = (group, places);
                    terms.backward(
                        dweights,
                        block,
                        (q, k),
                        (dqs, dks),
                        (d, scale),
                        of_group,
                        self.heads,
                        scratch,
                    );
                }
            }
        };
        self.units(&terms).par_iter().for_each_init(Default::default, |space, (group, tasks)| {
            tasks.iter().for_each(|task| of_task(space, *group, task));
        });
        relative.give(sums, self.heads, flow);
        Ok(())
    }
}

fn block_size(terms: &Terms) -> usize {
    if terms.wants_large_blocks() { LARGE_BLOCK } else { BLOCK }
}

/// The part of a row that is seen, and where it begins; the rest becomes 0.
fn only(row: &mut [f32], seen: Range<usize>) -> (&mut [f32], usize) {
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    (&mut row[seen.clone()], seen.start)
}

simd::vectorised! {
    /// Scores → weights in place; returns the logarithm of the denominator.
    pub(super) fn softmax(row: &mut [f32]) -> f32 {
        let max = simd::max(row);
        for x in row.iter_mut() {
            *x = simd::exp(*x - max);
        }
        let sum = simd::sum(row.len(), |i| row[i]);
        let factor = 1.0 / sum;
        for x in row.iter_mut() {
            *x *= factor;
        }
        max + sum.ln()
    }
}

simd::vectorised! {
    /// Scores and the weights' gradient → weights and the scores' gradient, in place.
    pub(super) fn softmax_backward(row: &mut [f32], drow: &mut [f32], log_sum: f32, delta: f32) {
        for (x, dx) in row.iter_mut().zip(drow) {
            let p = simd::exp(*x - log_sum);
            *dx = p * (*dx - delta);
            *x = p;
        }
    }
}

simd::vectorised! {
    /// The same where weights were dropped: what goes on to the values is the masked weight.
    pub(super) fn softmax_backward_masked(
        row: &mut [f32],
        drow: &mut [f32],
        log_sum: f32,
        delta: f32,
        mask: Row,
        first: usize,
    ) {
        for (column, (x, dx)) in row.iter_mut().zip(drow).enumerate() {
            let p = simd::exp(*x - log_sum);
            let factor = mask.factor((first + column) as u32);
            *dx = p * (*dx * factor - delta);
            *x = p * factor;
        }
    }
}

simd::vectorised! {
    pub(super) fn multiply(row: &mut [f32], mask: Row, first: usize) {
        for (column, x) in row.iter_mut().enumerate() {
            *x *= mask.factor((first + column) as u32);
        }
    }
}

simd::vectorised! {
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        simd::sum(n, |i| a[i] * b[i])
    }
}
