//! What attention's scores take from the distance between query and key: nothing, a number a head and bucket, products
//! with tables of distances, or queries and keys that are turned by their positions.

use std::sync::Arc;

use candle_core::Result;
use rayon::prelude::*;

use super::{Attention, ColumnsMut, QueryBlock};
use crate::eager::kernels::buffer::Buffer;
use crate::eager::kernels::gemm::{Factors, Matrix, MatrixMut, Shared, Write, product};
use crate::eager::kernels::{Numbers, Weight, add_here};
use crate::eager::tape::{Flow, TapeValue};
use crate::model::ops::{Buckets, turn_by};

/// What of the distance goes into the scores. `T` is an activation, on the tape or of candle's.
#[derive(Clone)]
pub enum Relative<T> {
    Nothing,
    /// A number of a table, (R, H), is added to the scaled score.
    Bias {
        table: Weight,
        rows: Arc<ByDistance>,
    },
    /// `q · keys[row] + k · queries[row]`, each (R, H·D), is added before the scaling, which has as many summands more.
    Products {
        keys: Option<T>,
        queries: Option<T>,
        rows: Arc<ByDistance>,
    },
    /// Queries and keys are turned by their positions (Su et al. 2021, arXiv:2104.09864).
    Rotary {
        theta: f64,
    },
}

impl<T> Relative<T> {
    /// What scores are multiplied with: `1 / √(D · summands)`.
    pub(super) fn scale(&self, d: usize) -> f32 {
        let summands = match self {
            Self::Products { keys, queries, .. } => {
                1 + usize::from(keys.is_some()) + usize::from(queries.is_some())
            }
            _ => 1,
        };
        1.0 / ((d * summands) as f32).sqrt()
    }
}

/// The row of a table for every distance, query − key, inside sequences up to some length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByDistance {
    rows: Vec<u32>,
    longest: usize,
}

impl ByDistance {
    /// For sequences of at most so many tokens.
    pub fn new(buckets: Buckets, longest: usize) -> Self {
        Self { rows: buckets.by_distance(longest), longest }
    }

    pub(super) fn at(&self, distance: isize) -> u32 {
        self.rows[(distance + self.longest as isize - 1) as usize]
    }

    /// The tokens of the longest sequence.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    /// How many distances there are.
    fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn check(&self, table: (usize, usize), columns: usize, longest: usize) -> Result<()> {
        if longest > self.longest
            || self.rows.iter().any(|&row| row as usize >= table.0)
            || table.1 != columns
        {
            candle_core::bail!(
                "a table of distances of {table:?}, for sequences of {} tokens, is used for {longest} tokens and {columns} \
                 columns",
                self.longest
            );
        }
        Ok(())
    }
}

/// Tasks of a head that add to one table's gradient, at most: their number must not depend on that of the threads.
const GROUPS: usize = 4;

/// The same in numbers, for blocks of scores.
pub(super) enum Terms<'a> {
    Nothing,
    /// (H, 2L − 1), by key − query, ascending.
    Bias {
        by_distance: Vec<f32>,
        rows: &'a ByDistance,
    },
    Products {
        keys: Option<&'a [f32]>,
        queries: Option<&'a [f32]>,
        rows: &'a ByDistance,
        width: usize,
        /// Of the products.
        factors: Factors,
    },
}

/// The tables' gradients of a backward pass, one for each of some groups of sequences.
pub(super) enum Sums {
    Nothing,
    /// (G, H, 2L − 1)
    Bias(Vec<f32>),
    /// (G, R, H·D) each
    Products([Option<Vec<f32>>; 2]),
}

/// A block's place in the gradients of tables.
#[derive(Clone, Copy)]
pub(super) enum Places {
    Nothing,
    Bias(Shared),
    Products([Option<Shared>; 2]),
}

impl Sums {
    pub fn places(&mut self) -> Places {
        match self {
            Self::Nothing => Places::Nothing,
            Self::Bias(sums) => Places::Bias(Shared::new(sums)),
            Self::Products(sums) => {
                Places::Products(sums.each_mut().map(|sums| sums.as_mut().map(|sums| Shared::new(sums))))
            }
        }
    }
}

/// What a block's products with tables take: memory that is used again for the next one.
#[derive(Default)]
pub(super) struct Scratch {
    keys: Vec<f32>,
    queries: Vec<f32>,
    columns: Vec<usize>,
}

impl<'a> Terms<'a> {
    pub fn new(relative: &'a Relative<Arc<TapeValue>>, how: &Attention, width: usize) -> Result<Self> {
        let longest = how.spans.iter().map(|span| span.len()).max().unwrap_or(0);
        Ok(match relative {
            Relative::Nothing | Relative::Rotary { .. } => Self::Nothing,
            Relative::Bias { table, rows } => {
                rows.check(table.values.dims2()?, how.heads, longest)?;
                let values = Numbers::of(&table.values)?;
                let by_distance = (0..how.heads)
                    .flat_map(|head| rows.rows.iter().rev().map(move |&row| (row, head)))
                    .map(|(row, head)| values[row as usize * how.heads + head])
                    .collect();
                Self::Bias { by_distance, rows }
            }
            Relative::Products { keys, queries, rows } => {
                for table in keys.iter().chain(queries) {
                    rows.check((table.rows(), table.width), width, longest)?;
                }
                let numbers =
                    |table: &'a Option<Arc<TapeValue>>| table.as_ref().map(|table| &table.numbers[..]);
                let (keys, queries) = (numbers(keys), numbers(queries));
                Self::Products { keys, queries, rows, width, factors: how.factors }
            }
        })
    }

    /// Whether blocks are to be of many queries, because each has a product of all its keys.
    pub fn wants_large_blocks(&self) -> bool {
        matches!(self, Self::Products { .. })
    }

    /// Empty gradients, of so many groups.
    pub fn sums(&self, heads: usize) -> Sums {
        match self {
            Self::Nothing => Sums::Nothing,
            Self::Bias { rows, .. } => Sums::Bias(vec![0.0; GROUPS * heads * rows.len()]),
            Self::Products { keys, queries, .. } => Sums::Products(
                [*keys, *queries].map(|table| table.map(|table| vec![0.0; GROUPS * table.len()])),
            ),
        }
    }

    /// The group of a sequence, where tables have gradients.
    pub fn group(&self, sequence: usize, sequences: usize) -> Option<usize> {
        (!matches!(self, Self::Nothing)).then(|| sequence * GROUPS / sequences.max(1))
    }

    /// Adds what the distances give to a block's scores, (m, n).
    pub fn add(
        &self,
        scores: &mut [f32],
        block: &QueryBlock,
        (q, k): (Matrix, Matrix),
        scale: f32,
        scratch: &mut Scratch,
    ) {
        let (m, n) = (block.queries.len(), block.keys.len());
        match self {
            Self::Nothing => {}
            Self::Bias { by_distance, rows } => {
                for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                    let start = rows.longest - 1 + block.first_key - (block.position + i);
                    add_here(row, &by_distance[block.head * rows.len() + start..][..n]);
                }
            }
            Self::Products { keys, queries, rows, width, factors } => {
                let Range { low, high } = scratch.columns(block, rows);
                let r = high - low;
                let Scratch { keys: by_key, queries: by_query, columns } = scratch;
                if let Some(table) = keys {
                    by_key.resize(m * r, 0.0);
                    let table = part(table, *width, low..high, block.head, q);
                    product(
                        MatrixMut::new(by_key, m, r, r),
                        Write::Replace,
                        scale,
                        q,
                        table.transposed(),
                        *factors,
                    );
                    for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                        let (from, columns) = (&by_key[i * r..][..r], &columns[m - 1 - i..][..n]);
                        for (x, &column) in row.iter_mut().zip(columns) {
                            *x += from[column];
                        }
                    }
                }
                if let Some(table) = queries {
                    by_query.resize(n * r, 0.0);
                    let table = part(table, *width, low..high, block.head, k);
                    product(
                        MatrixMut::new(by_query, n, r, r),
                        Write::Replace,
                        scale,
                        k,
                        table.transposed(),
                        *factors,
                    );
                    for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                        let columns = &columns[m - 1 - i..][..n];
                        for ((x, &column), from) in row.iter_mut().zip(columns).zip(by_query.chunks_exact(r))
                        {
                            *x += from[column];
                        }
                    }
                }
            }
        }
    }

    /// Adds the scores' gradient, (m, n), to those of the tables, of a block's queries and of its keys.
    ///
    /// # Safety
    /// The places outlive the call; the group's part of this head, dq and dk are nobody else's.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn backward(
        &self,
        dscores: &[f32],
        block: &QueryBlock,
        (q, k): (Matrix, Matrix),
        (dqs, dks): (ColumnsMut, ColumnsMut),
        (d, scale): (usize, f32),
        (group, places): (usize, Places),
        heads: usize,
        scratch: &mut Scratch,
    ) {
        let (m, n) = (block.queries.len(), block.keys.len());
        match (self, places) {
            (Self::Bias { rows, .. }, Places::Bias(sums)) => {
                // SAFETY: the caller's promise.
                let sums = unsafe { sums.slice((group * heads + block.head) * rows.len(), rows.len()) };
                for (i, row) in dscores.chunks_exact(n).enumerate() {
                    let start = rows.longest - 1 + block.first_key - (block.position + i);
                    add_here(&mut sums[start..][..n], row);
                }
            }
            (Self::Products { keys, queries, rows, width, factors }, Places::Products(sums)) => {
                let Range { low, high } = scratch.columns(block, rows);
                let r = high - low;
                let Scratch { keys: by_key, queries: by_query, columns } = scratch;
                let gradient = |sums: Shared, table: &[f32]| {
                    let sums = ColumnsMut { x: sums, at: group * table.len(), stride: *width };
                    // SAFETY: the caller's promise.
                    unsafe { sums.head(&(low..high), block.head, d) }
                };
                if let (Some(table), Some(sums)) = (keys, sums[0]) {
                    by_key.clear();
                    by_key.resize(m * r, 0.0);
                    for (i, row) in dscores.chunks_exact(n).enumerate() {
                        let (to, columns) = (&mut by_key[i * r..][..r], &columns[m - 1 - i..][..n]);
                        for (x, &column) in row.iter().zip(columns) {
                            to[column] += x;
                        }
                    }
                    let (by, rows) =
                        (Matrix::new(by_key, m, r, r), part(table, *width, low..high, block.head, q));
                    // SAFETY: the caller's promise.
                    product(
                        unsafe { dqs.head(&block.queries, block.head, d) },
                        Write::Add,
                        scale,
                        by,
                        rows,
                        *factors,
                    );
                    product(gradient(sums, table), Write::Add, scale, by.transposed(), q, *factors);
                }
                if let (Some(table), Some(sums)) = (queries, sums[1]) {
                    by_query.clear();
                    by_query.resize(n * r, 0.0);
                    for (i, row) in dscores.chunks_exact(n).enumerate() {
                        let columns = &columns[m - 1 - i..][..n];
                        for ((x, &column), to) in row.iter().zip(columns).zip(by_query.chunks_exact_mut(r)) {
                            to[column] += x;
                        }
                    }
                    let (by, rows) =
                        (Matrix::new(by_query, n, r, r), part(table, *width, low..high, block.head, k));
                    // SAFETY: the caller's promise.
                    product(
                        unsafe { dks.head(&block.keys, block.head, d) },
                        Write::Add,
                        scale,
                        by,
                        rows,
                        *factors,
                    );
                    product(gradient(sums, table), Write::Add, scale, by.transposed(), k, *factors);
                }
            }
            _ => {}
        }
    }
}

/// A range of a table's rows.
struct Range {
    low: usize,
    high: usize,
}

impl Scratch {
    /// The rows that a block's distances need, and for each distance, from the largest down, which of them it is.
    fn columns(&mut self, block: &QueryBlock, rows: &ByDistance) -> Range {
        let (m, n) = (block.queries.len() as isize, block.keys.len() as isize);
        let largest = block.position as isize + m - 1 - block.first_key as isize;
        self.columns.clear();
        self.columns.extend((0..m + n - 1).map(|i| rows.at(largest - i) as usize));
        let low = self.columns.iter().copied().min().unwrap_or(0);
        let high = self.columns.iter().copied().max().unwrap_or(0) + 1;
        self.columns.iter_mut().for_each(|column| *column -= low);
        Range { low, high }
    }
}

/// Some rows of a head's part of a table, as wide as `like`.
fn part<'a>(
    table: &'a [f32],
    width: usize,
    rows: std::ops::Range<usize>,
    head: usize,
    like: Matrix,
) -> Matrix<'a> {
    let d = like.width();
    Matrix::new(&table[rows.start * width + head * d..], rows.len(), d, width)
}

impl Relative<Arc<TapeValue>> {
    /// Whether one of the tables wants its gradient.
    pub(super) fn learns(&self) -> bool {
        match self {
            Self::Nothing | Self::Rotary { .. } => false,
            Self::Bias { table, .. } => table.learns(),
            Self::Products { keys, queries, .. } => [keys, queries].into_iter().flatten().any(|x| x.learns),
        }
    }

    /// Hands the tables' gradients over.
    pub(super) fn give(&self, sums: Sums, heads: usize, flow: &mut Flow) {
        match (self, sums) {
            (Self::Bias { table, rows }, Sums::Bias(sums)) => {
                let Some(gradient) = &table.gradient else { return };
                let mut own = vec![0.0; table.values.elem_count()];
                for of_group in sums.chunks_exact(heads * rows.len()) {
                    for (head, of_head) in of_group.chunks_exact(rows.len()).enumerate() {
                        for (dx, &row) in of_head.iter().zip(rows.rows.iter().rev()) {
                            own[row as usize * heads + head] += dx;
                        }
                    }
                }
                gradient.add_values(&own);
            }
            (Self::Products { keys, queries, .. }, Sums::Products(sums)) => {
                for (table, sums) in [keys, queries].into_iter().zip(sums) {
                    if let (Some(table), Some(sums)) = (table, sums) {
                        let mut all = Buffer::of(&sums[..table.numbers.len()]);
                        sums.chunks_exact(all.len()).skip(1).for_each(|sums| add_here(&mut all, sums));
                        flow.give(table, all);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Cosines and sines of a head's angles at every position, (L, D / 2) each.
pub(super) struct Turns {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Turns {
    /// For heads of d channels, in sequences of at most so many tokens.
    pub fn new(theta: f64, d: usize, longest: usize) -> Result<Self> {
        if !d.is_multiple_of(2) {
            candle_core::bail!("heads of {d} channels can't be turned: their channels are turned by two");
        }
        let (sin, cos) = turn_by(theta, d, longest).into_iter().unzip();
        Ok(Self { cos, sin, half: d / 2 })
    }

    /// Turns some columns of a matrix of so many rows, each of whose heads stands at a position; or turns them back.
    pub fn turn(
        &self,
        x: &mut [f32],
        stride: usize,
        columns: std::ops::Range<usize>,
        at: &[u32],
        back: bool,
    ) {
        let half = self.half;
        x.par_chunks_exact_mut(stride).zip(at).for_each(|(row, &at)| {
            let (cos, sin) =
                (&self.cos[at as usize * half..][..half], &self.sin[at as usize * half..][..half]);
            for head in row[columns.clone()].chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let sin = if back { -sin } else { sin };
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        });
    }
}
