//! How good embeddings are: at giving the order of similarities, and at finding what belongs to a text.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use ndarray::{Array2, ArrayView1, Axis};
use rayon::prelude::*;

use super::Related;
use crate::data::batch::Encoding;
use crate::task::Metrics;
use crate::task::text_classification::metrics::spearman;

/// Queries whose similarities to all documents are held at once.
const QUERIES: usize = 256;

/// `aᵀb / (|a| · |b|)`; 0 where one has no length.
pub fn cosine(a: ArrayView1<f32>, b: ArrayView1<f32>) -> f64 {
    let dot = |a: ArrayView1<f32>, b: ArrayView1<f32>| {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
    };
    dot(a, b) / (dot(a, a).sqrt().max(1e-12) * dot(b, b).sqrt().max(1e-12))
}

/// The rank correlation of pairs' similarities and scores.
pub fn scored(cosines: &[f64], scores: &[f32]) -> Metrics {
    let scores: Vec<f64> = scores.iter().map(|&score| f64::from(score)).collect();
    Metrics::from([("spearman".to_owned(), spearman(cosines, &scores))])
}

/// Which documents are found for a query: all texts behind the anchors are documents, and those that stand behind one
/// anchor as its positives are right for it. `rows` are embeddings, an example's one after another. Of documents that are as
/// near as a right one, the others are counted as before it.
pub fn retrieval(rows: &Array2<f32>, examples: &[(&Encoding, &Related)]) -> Metrics {
    let mut documents: BTreeMap<&[u32], usize> = BTreeMap::new();
    let mut queries: BTreeMap<&[u32], (usize, BTreeSet<usize>)> = BTreeMap::new();
    let (mut of_documents, mut at) = (Vec::new(), 0);
    for (anchor, related) in examples {
        let right = &mut queries.entry(&anchor.ids).or_insert((at, BTreeSet::new())).1;
        for (i, other) in related.others.iter().enumerate() {
            let document = *documents.entry(&other.ids).or_insert_with(|| {
                of_documents.push(at + 1 + i);
                of_documents.len() - 1
            });
            if i == 0 {
                right.insert(document);
            }
        }
        at += 1 + related.others.len();
    }
    let unit = |places: &[usize]| {
        let mut chosen = rows.select(Axis(0), places);
        for mut row in chosen.rows_mut() {
            let norm = row.dot(&row).sqrt().max(1e-12);
            row /= norm;
        }
        chosen
    };
    let of_documents = unit(&of_documents);
    let queries: Vec<(usize, BTreeSet<usize>)> = queries.into_values().collect();
    let found: Vec<[f64; 3]> = queries
        .par_chunks(QUERIES)
        .flat_map_iter(|queries| {
            let places: Vec<usize> = queries.iter().map(|(place, _)| *place).collect();
            let near = unit(&places).dot(&of_documents.t());
            let of = |(near, (_, right)): (ArrayView1<f32>, &(usize, BTreeSet<usize>))| of_one(near, right);
            near.rows().into_iter().zip(queries).map(of).collect::<Vec<_>>()
        })
        .collect();
    let mean = |of: usize| found.iter().map(|found| found[of]).sum::<f64>() / found.len() as f64;
    [("recall@1", 0), ("recall@10", 1), ("mrr", 2)].map(|(name, of)| (name.to_owned(), mean(of))).into()
}

/// The shares of the right documents among the first and among the first ten, and one over the place of the first of
/// them.
fn of_one(near: ArrayView1<f32>, right: &BTreeSet<usize>) -> [f64; 3] {
    // how many of the others stand before a document, for each of the right ones
    let mut places: Vec<usize> = right
        .iter()
        .map(|&document| {
            let own = near[document];
            let before = |(other, near): &(usize, &f32)| {
                // not a number stands in front of all
                !right.contains(other) && near.partial_cmp(&&own) != Some(Ordering::Less)
            };
            near.iter().enumerate().filter(before).count()
        })
        .collect();
    places.sort_unstable();
    // the right ones stand among themselves in this order
    let places: Vec<usize> = places.into_iter().enumerate().map(|(i, before)| before + i).collect();
    let share =
        |most: usize| places.iter().filter(|&&place| place < most).count() as f64 / right.len() as f64;
    [share(1), share(10), 1.0 / (places[0] + 1) as f64]
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;

    fn encoding(id: u32) -> Encoding {
        Encoding { ids: vec![id], type_ids: vec![0], truncated: false }
    }

    #[test]
    fn what_is_found_is_counted_once_a_query_over_distinct_documents() {
        // two records of one anchor, with documents of their own; the other anchor's own document is not the nearest
        let related =
            |ids: &[u32]| Related { others: ids.iter().map(|&id| encoding(id)).collect(), score: None };
        let examples =
            [(encoding(1), related(&[10, 12])), (encoding(1), related(&[11])), (encoding(2), related(&[12]))];
        let rows = arr2(&[
            [1.0, 0.0],  // anchor 1
            [2.0, 0.1],  // 10, right
            [1.0, 1.0],  // 12, wrong for it
            [1.0, 0.0],  // anchor 1
            [0.0, -1.0], // 11, right, and far
            [0.1, -1.0], // anchor 2
            [1.0, 1.0],  // 12, right, the last of three
        ]);
        let examples: Vec<_> = examples.iter().map(|(encoding, related)| (encoding, related)).collect();
        let found = retrieval(&rows, &examples);
        assert_eq!(found["recall@1"], (0.5 + 0.0) / 2.0);
        assert_eq!(found["recall@10"], 1.0);
        assert_eq!(found["mrr"], (1.0 + 1.0 / 3.0) / 2.0);
    }

    #[test]
    fn of_documents_that_are_as_near_the_wrong_ones_come_first() {
        let [first, ten, rank] = of_one(arr2(&[[0.5, 0.5, 0.5]]).row(0), &BTreeSet::from([1]));
        assert_eq!((first, ten, rank), (0.0, 1.0, 1.0 / 3.0));
        assert_eq!(of_one(arr2(&[[f32::NAN, 0.5]]).row(0), &BTreeSet::from([1]))[2], 0.5);
    }

    #[test]
    fn a_row_without_length_is_near_nothing() {
        let rows = arr2(&[[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]);
        assert_eq!(cosine(rows.row(0), rows.row(1)), 0.0);
        assert!((cosine(rows.row(1), rows.row(2)) - 1.0).abs() < 1e-12);
    }
}
