//! Attention in candle's operations, over all sequences at once: as many operations for many sequences as for one.
//!
//! Rows of queries, keys and values, (T, H·D), are put side by side, a head's sequences padded to the longest of their
//! bucket, (H, B, N, D). What padding holds is never seen: its keys are masked, and its queries are left out when the
//! rows go back. Indices and masks are made on the host once a forward pass, and kept on the device.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor, TensorId};

use super::relative::{ByDistance, Relative};
use super::{Asked, Attention, Queries};
use crate::data::batch::Spans;
use crate::eager::kernels::reorder::{NONE, Order};
use crate::eager::kernels::rotary::Turns;
use crate::eager::kernels::{Weight, dropout, softmax, wide};
use crate::model::ops::Sees;

/// Buckets of a batch, at most: each has operations of its own.
const BUCKETS: usize = 3;

/// Scores a head that a bucket more has to spare, at least: on a GPU, to start its operations takes longer than to compute
/// fewer.
const WORTH: usize = 1 << 18;

/// q, k, v (T, H·D) → (T, H·D): inside every span, every token sees every token, those up to itself, or those near it;
/// in candle's operations.
///
/// # Errors
/// Shapes that do not fit.
pub fn composite(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    how: &Attention,
    relative: &Relative<Tensor>,
) -> Result<Tensor> {
    composite_in(&Paddings::default(), q, k, v, how, relative)
}

/// The same in a forward pass whose layers share indices and masks.
///
/// # Errors
/// As [`composite`].
pub fn composite_in(
    pass: &Paddings,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    how: &Attention,
    relative: &Relative<Tensor>,
) -> Result<Tensor> {
    how.check([q.dims2()?, k.dims2()?, v.dims2()?], relative)?;
    pass.of(how, q.device())?.attend([q, k, v], how, relative)
}

/// The paddings of a forward pass, one for each kind of attention.
#[derive(Default)]
pub struct Paddings(RefCell<Vec<Rc<Padded>>>);

impl Paddings {
    fn of(&self, how: &Attention, device: &Device) -> Result<Rc<Padded>> {
        if let Some(padded) = self.0.borrow().iter().find(|padded| padded.is_of(how)) {
            return Ok(padded.clone());
        }
        let padded = Rc::new(Padded::new(how, device, WORTH)?);
        self.0.borrow_mut().push(padded.clone());
        Ok(padded)
    }
}

/// How a batch's sequences stand side by side, and what their tokens see of each other.
struct Padded {
    spans: Arc<Spans>,
    heads: usize,
    sees: Sees,
    asking: Queries,
    /// Rows of queries, (T·H, D), a bucket after the other, each (H, B, M, D).
    queries: Order,
    /// The same of keys and values: (H, B, N, D).
    keys: Order,
    buckets: Vec<Bucket>,
    turns: Kept<(f64, usize), [Turns; 2]>,
    /// For each bucket.
    biased: Kept<(Arc<ByDistance>, TensorId), Vec<Tensor>>,
    of_keys: Kept<Arc<ByDistance>, Vec<Tensor>>,
    of_queries: Kept<Arc<ByDistance>, Vec<Tensor>>,
}

/// Sequences of about one length.
struct Bucket {
    /// How many there are, B.
    sequences: usize,
    /// The most queries of one, M.
    queries: usize,
    /// The most keys of one, N.
    keys: usize,
    /// The place of each sequence's first query; one number where it is the same in all.
    first: Vec<usize>,
    /// Added to the scores: 0 where a query sees a key, else −∞. (B, M, N)
    unseen: Tensor,
}

/// What was made last, and for what.
struct Kept<K, T>(RefCell<Option<(K, T)>>);

impl<K: PartialEq, T: Clone> Kept<K, T> {
    fn nothing() -> Self {
        Self(RefCell::new(None))
    }

    fn of(&self, key: K, make: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Some((of, made)) = &*self.0.borrow()
            && *of == key
        {
            return Ok(made.clone());
        }
        let made = make()?;
        *self.0.borrow_mut() = Some((key, made.clone()));
        Ok(made)
    }
}

/// Sequences by their length, from the longest down, those of at most half a bucket's longest in the next one, where
/// that spares at least `worth` scores.
fn buckets(mut asked: Vec<Asked>, worth: usize) -> Vec<Vec<Asked>> {
    let area = |asked: &[Asked]| -> usize {
        let most = |of: fn(&Asked) -> usize| asked.iter().map(of).max().unwrap_or(0);
        most(|asked| asked.queries.len()) * most(|asked| asked.span.len())
    };
    asked.sort_by_key(|asked| std::cmp::Reverse(asked.span.len()));
    let mut buckets = Vec::new();
    while let Some(longest) = asked.first().map(|asked| asked.span.len()) {
        let short = asked.partition_point(|asked| 2 * asked.span.len() > longest);
        let spared = (asked.len() - short) * (area(&asked) - area(&asked[short..]));
        let is_last = buckets.len() + 1 == BUCKETS || short == asked.len() || spared < worth;
        let rest = if is_last { Vec::new() } else { asked.split_off(short) };
        buckets.push(std::mem::replace(&mut asked, rest));
    }
    buckets
}

impl Padded {
    /// Of attention that has been checked.
    fn new(how: &Attention, device: &Device, worth: usize) -> Result<Self> {
        let heads = how.heads;
        let asked: Vec<Asked> = how.asked().filter(|asked| !asked.queries.is_empty()).collect();
        let (mut queries, mut keys, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for asked in buckets(asked, worth) {
            let m = asked.iter().map(|asked| asked.queries.len()).max().unwrap_or(0);
            let n = asked.iter().map(|asked| asked.span.len()).max().unwrap_or(0);
            let row = |token: Option<usize>, head| token.map_or(NONE, |token| (token * heads + head) as u32);
            for head in 0..heads {
                for Asked { queries: own, span, .. } in &asked {
                    queries.extend((0..m).map(|i| row(own.clone().nth(i), head)));
                    keys.extend((0..n).map(|j| row(span.clone().nth(j), head)));
                }
            }
            let mut unseen = Vec::with_capacity(asked.len() * m * n);
            for Asked { queries, span, position } in &asked {
                for i in 0..m {
                    // a query that is padding sees something, too: a row of −∞ has no softmax
                    let seen = if i < queries.len() {
                        how.seen_from(position + i, span.len())
                    } else {
                        0..span.len()
                    };
                    unseen.extend((0..n).map(|j| if seen.contains(&j) { 0.0 } else { f32::NEG_INFINITY }));
                }
            }
            let mut first: Vec<usize> = asked.iter().map(|asked| asked.position).collect();
            if first.iter().all(|&at| at == first[0]) {
                first.truncate(1);
            }
            let unseen = Tensor::from_vec(unseen, (asked.len(), m, n), device)?;
            all.push(Bucket { sequences: asked.len(), queries: m, keys: n, first, unseen });
        }
        let keys = Order::new(keys, how.spans.tokens() * heads, device)?;
        let queries = match &how.queries {
            Queries::All => keys.clone(),
            Queries::First | Queries::Last => Order::new(queries, how.spans.len() * heads, device)?,
            Queries::Asked(rows) => Order::new(queries, rows.tokens() * heads, device)?,
        };
        Ok(Self {
            spans: how.spans.clone(),
            heads,
            sees: how.sees,
            asking: how.queries.clone(),
            queries,
            keys,
            buckets: all,
            turns: Kept::nothing(),
            biased: Kept::nothing(),
            of_keys: Kept::nothing(),
            of_queries: Kept::nothing(),
        })
    }

    fn is_of(&self, how: &Attention) -> bool {
        self.spans == how.spans
            && (self.heads, self.sees) == (how.heads, how.sees)
            && self.asking == how.queries
    }

    fn longest(&self) -> usize {
        self.spans.iter().map(|span| span.len()).max().unwrap_or(0)
    }

    /// Queries, keys and values, which fit → what the queries get.
    fn attend(
        &self,
        [q, k, v]: [&Tensor; 3],
        how: &Attention,
        relative: &Relative<Tensor>,
    ) -> Result<Tensor> {
        let (heads, width) = (self.heads, q.dim(1)?);
        let d = width / heads;
        let [q, k] = match relative {
            Relative::Rotary { theta } => self.turned([q, k], how, *theta)?,
            _ => [q.clone(), k.clone()],
        };
        let ordered = |order: &Order, x: &Tensor| order.apply(&x.reshape(((), d))?);
        let (q, k, v) = (ordered(&self.queries, &q)?, ordered(&self.keys, &k)?, ordered(&self.keys, v)?);
        let added = self.added(relative)?;
        let (mut asking, mut seen) = (0, 0);
        let mut outputs = Vec::with_capacity(self.buckets.len());
        for (i, bucket) in self.buckets.iter().enumerate() {
            let &Bucket { sequences: b, queries: m, keys: n, .. } = bucket;
            let part =
                |x: &Tensor, at, rows| x.narrow(0, at, heads * b * rows)?.reshape((heads * b, rows, d));
            let (q, k, v) = (part(&q, asking, m)?, part(&k, seen, n)?, part(&v, seen, n)?);
            let mut scores = wide(&q.matmul(&k.t()?)?)?.reshape((heads, b, m, n))?;
            for term in self.products(relative, i, [&q, &k])? {
                scores = (scores + wide(&term)?)?;
            }
            scores = (scores * f64::from(relative.scale(d)))?;
            let mut weights = softmax::softmax(&scores.broadcast_add(&added[i])?)?;
            if let Some(mask) = how.mask {
                let rows = self.queries.from().narrow(0, asking, heads * b * m)?;
                weights = dropout::composite_of_rows(&weights, mask, &rows)?;
            }
            let weights = weights.to_dtype(v.dtype())?.reshape((heads * b, m, n))?;
            outputs.push(weights.matmul(&v)?.reshape((heads * b * m, d))?);
            (asking, seen) = (asking + heads * b * m, seen + heads * b * n);
        }
        self.queries.back(&Tensor::cat(&outputs, 0)?)?.reshape(((), width))
    }

    /// Queries and keys, (T, H·D), turned by their positions.
    fn turned(&self, [q, k]: [&Tensor; 2], how: &Attention, theta: f64) -> Result<[Tensor; 2]> {
        let of_heads = (self.heads, q.dim(1)? / self.heads);
        let [of_queries, of_keys] = self.turns.of((theta, of_heads.1), || {
            let [queries, keys] = how.positions();
            let turns = |positions: &[u32]| Turns::new(theta, of_heads, positions, q.device());
            let of_keys = turns(&keys)?;
            Ok([if self.asking == Queries::All { of_keys.clone() } else { turns(&queries)? }, of_keys])
        })?;
        Ok([of_queries.turn(q)?, of_keys.turn(k)?])
    }

    /// What is added to each bucket's scaled scores: nothing or −∞, (B, M, N), and what a table gives, (H, B, M, N). Layers
    /// that share a table share the sum.
    fn added(&self, relative: &Relative<Tensor>) -> Result<Vec<Tensor>> {
        let Relative::Bias { table: Weight { values: table, .. }, rows } = relative else {
            return Ok(self.buckets.iter().map(|bucket| bucket.unseen.clone()).collect());
        };
        rows.check(table.dims2()?, self.heads, self.longest())?;
        let r = table.dim(0)?;
        self.biased.of((rows.clone(), table.id()), || {
            let of = |bucket: &Bucket| {
                let &Bucket { queries: m, keys: n, ref first, ref unseen, .. } = bucket;
                // a product with rows of zeros and a one: its gradient is a product again, where that of rows by their
                // ids would be added up row by row
                let ids = bucket.rows(rows);
                let mut hot = vec![0.0f32; ids.len() * r];
                ids.iter().enumerate().for_each(|(at, &row)| hot[at * r + row as usize] = 1.0);
                let hot = Tensor::from_vec(hot, (ids.len(), r), table.device())?;
                let bias = hot.matmul(table)?.reshape((first.len(), m, n, self.heads))?;
                bias.permute((3, 0, 1, 2))?.broadcast_add(unseen)
            };
            self.buckets.iter().map(of).collect()
        })
    }

    /// What products with tables give to a bucket's scores, before these are scaled: (H, B, M, N) each. q is
    /// (H·B, M, D), k (H·B, N, D).
    fn products(
        &self,
        relative: &Relative<Tensor>,
        bucket: usize,
        [q, k]: [&Tensor; 2],
    ) -> Result<Vec<Tensor>> {
        let Relative::Products { keys, queries, rows } = relative else { return Ok(Vec::new()) };
        let (heads, d) = (self.heads, q.dim(D::Minus1)?);
        let &Bucket { sequences: b, queries: m, keys: n, .. } = &self.buckets[bucket];
        // (H·B, L, D) by the table's (R, H·D), and of the R numbers those that the distances say
        let by_table = |x: &Tensor, table: &Tensor, ids: &Tensor| {
            rows.check(table.dims2()?, heads * d, self.longest())?;
            let r = table.dim(0)?;
            let table = table.reshape((r, heads, d))?.permute((1, 2, 0))?.contiguous()?;
            let length = x.dim(1)?;
            x.reshape((heads, b * length, d))?.matmul(&table)?.reshape((heads, b, length, r))?.gather(ids, 3)
        };
        let mut terms = Vec::new();
        if let Some(table) = keys {
            let ids = self.of_keys.of(rows.clone(), || self.gathered(rows, false, q.device()))?;
            terms.push(by_table(q, table, &ids[bucket])?);
        }
        if let Some(table) = queries {
            let ids = self.of_queries.of(rows.clone(), || self.gathered(rows, true, q.device()))?;
            terms.push(by_table(k, table, &ids[bucket])?.transpose(2, 3)?);
        }
        debug_assert!(terms.iter().all(|term| term.dims() == [heads, b, m, n]));
        Ok(terms)
    }

    /// The rows of a table for each bucket's pairs of a query and a key, (H, B, M, N), or of a key and a query,
    /// (H, B, N, M).
    fn gathered(&self, rows: &ByDistance, by_key: bool, device: &Device) -> Result<Vec<Tensor>> {
        let of = |bucket: &Bucket| {
            let &Bucket { sequences: b, queries: m, keys: n, ref first, .. } = bucket;
            let ids = Tensor::from_vec(bucket.rows(rows), (1, first.len(), m, n), device)?;
            let ids = if by_key { ids.transpose(2, 3)? } else { ids };
            let (_, _, rows, columns) = ids.dims4()?;
            ids.broadcast_as((self.heads, b, rows, columns))?.contiguous()
        };
        self.buckets.iter().map(of).collect()
    }
}

impl Bucket {
    /// The row of each distance between a query and a key: (1 or B, M, N).
    fn rows(&self, rows: &ByDistance) -> Vec<u32> {
        let of_query = |at: usize| (0..self.keys).map(move |j| rows.at(at as isize - j as isize));
        // what is behind a sequence's last token is padding, whose distance may be any that there is
        let last = rows.longest() - 1;
        let queries =
            self.first.iter().flat_map(|first| (0..self.queries).map(move |i| (first + i).min(last)));
        queries.flat_map(of_query).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::eager::kernels::dropout::{Mask, mix};
    use crate::eager::kernels::gemm::Factors;
    use crate::model::ops::Buckets;

    fn random(seed: u64, shape: (usize, usize)) -> Var {
        let number = |i: usize| (mix(seed << 32 ^ i as u64) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        let numbers: Vec<f32> = (0..shape.0 * shape.1).map(number).collect();
        Var::from_tensor(&Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn numbers(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn buckets_are_few_and_each_of_about_one_length() {
        let lengths = |spans: &Spans, worth| -> Vec<Vec<usize>> {
            let asked: Vec<_> = spans.iter().collect();
            let asked = asked
                .iter()
                .map(|span| Asked { span: span.clone(), queries: span.clone(), position: 0 })
                .collect();
            let of_one = |bucket: &Vec<Asked>| bucket.iter().map(|asked| asked.span.len()).collect();
            buckets(asked, worth).iter().map(of_one).collect()
        };
        let spans = Spans::of_lengths([3, 64, 100, 1, 20, 50, 51]);
        assert_eq!(lengths(&spans, 0), [vec![100, 64, 51], vec![50], vec![20, 3, 1]]);
        assert_eq!(lengths(&spans, usize::MAX), [[100, 64, 51, 50, 20, 3, 1]]);
        // 4 · (100² − 50²) scores are spared by the first cut, 3 · (50² − 20²) by the second
        assert_eq!(lengths(&spans, 30_000), [vec![100, 64, 51], vec![50, 20, 3, 1]]);
        assert_eq!(lengths(&spans, 30_001), [[100, 64, 51, 50, 20, 3, 1]]);
        assert_eq!(lengths(&Spans::of_lengths([]), 0), Vec::<Vec<usize>>::new());
    }

    /// Numbers and gradients of attention in so many buckets as it is worth.
    fn run(
        how: &Attention,
        inputs: &[Var],
        relative: &Relative<Tensor>,
        worth: usize,
    ) -> (usize, Vec<Vec<f32>>) {
        let padded = Padded::new(how, &Device::Cpu, worth).unwrap();
        let y = padded.attend([0, 1, 2].map(|i| inputs[i].as_tensor()), how, relative).unwrap();
        let cotangent = random(9, y.dims2().unwrap());
        let store = (&y * cotangent.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let mut found = vec![numbers(&y)];
        found.extend(inputs.iter().filter_map(|x| store.get(x.as_tensor()).map(numbers)));
        (padded.buckets.len(), found)
    }

    #[test]
    fn attention_in_several_buckets_is_that_in_one() {
        let spans = Arc::new(Spans::of_lengths([3, 40, 0, 9, 17, 1, 33]));
        let (heads, d) = (2, 4);
        let rows = |buckets| Arc::new(ByDistance::new(buckets, 40));
        let tables = [random(4, (16, heads * d)), random(5, (16, heads * d)), random(6, (32, heads))];
        let of_tables = [0, 1].map(|i| Some(tables[i].as_tensor().clone()));
        let [keys, queries] = of_tables;
        let products =
            Relative::Products { keys, queries, rows: rows(Buckets::Signed { span: 8, most: Some(30) }) };
        let table = Weight { values: tables[2].as_tensor().clone(), gradient: None };
        let bias = Relative::Bias { table, rows: rows(Buckets::T5) };
        let rotary = Relative::Rotary { theta: 50.0 };
        let full = Arc::new(Spans::of_lengths(spans.iter().map(|span| span.len()).filter(|&n| n > 0)));
        let asked = Queries::Asked(Arc::new(Spans::of_lengths([2, 1, 9, 3, 1, 4])));
        for (spans, sees, queries, relative) in [
            (&spans, Sees::All, Queries::All, &Relative::Nothing),
            (&spans, Sees::Causal, Queries::All, &Relative::Nothing),
            (&spans, Sees::Near { reach: 5 }, Queries::All, &rotary),
            (&spans, Sees::All, Queries::All, &bias),
            (&spans, Sees::All, Queries::All, &products),
            (&full, Sees::All, Queries::First, &products),
            (&full, Sees::Near { reach: 5 }, Queries::Last, &bias),
            (&full, Sees::Near { reach: 5 }, Queries::Last, &products),
            (&full, Sees::All, asked, &Relative::Nothing),
        ] {
            let asking = match &queries {
                Queries::All => spans.tokens(),
                Queries::First | Queries::Last => spans.len(),
                Queries::Asked(rows) => rows.tokens(),
            };
            let (mask, factors) = (Some(Mask::new(3, 0.2)), Factors::F32);
            let how = Attention { spans: spans.clone(), heads, sees, queries, mask, factors };
            let x = |seed, rows| random(seed, (rows, heads * d));
            let mut inputs = vec![x(1, asking), x(2, spans.tokens()), x(3, spans.tokens())];
            inputs.extend(tables.iter().cloned());
            let (one, wanted) = run(&how, &inputs, relative, usize::MAX);
            let (several, found) = run(&how, &inputs, relative, 0);
            assert_eq!((one, several), (1, 3));
            assert_eq!(found.len(), wanted.len());
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!(found.iter().all(|x| x.is_finite()));
                for (found, wanted) in found.iter().zip(wanted) {
                    assert!((found - wanted).abs() < 1e-5, "{found} and {wanted}");
                }
            }
        }
    }
}
