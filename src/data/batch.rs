//! Encoded examples → batches: packed for candle (no padding), padded for ONNX graphs.

use serde::{Deserialize, Serialize};

/// One example's tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encoding {
    /// Token ids, special tokens included. (T)
    pub ids: Vec<u32>,
    /// 0 for the first text, 1 for the second. (T)
    pub type_ids: Vec<u32>,
    /// Whether tokens were cut off to fit the maximum length.
    pub truncated: bool,
}

impl Encoding {
    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether it has no token at all.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Where the sequences of a packed batch stand: sequence b is `bounds[b]..bounds[b + 1]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans {
    bounds: Vec<usize>,
}

impl Spans {
    /// Spans of sequences of the given lengths, back to back.
    pub fn of_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut bounds = vec![0];
        let mut end = 0;
        for length in lengths {
            end += length;
            bounds.push(end);
        }
        Self { bounds }
    }

    /// The number of sequences, B.
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of tokens of all sequences, T.
    pub fn tokens(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }

    /// The tokens of sequence `b`.
    pub fn get(&self, b: usize) -> std::ops::Range<usize> {
        self.bounds[b]..self.bounds[b + 1]
    }

    /// Each sequence's range of tokens.
    pub fn iter(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.bounds.windows(2).map(|pair| pair[0]..pair[1])
    }
}

/// Sequences one after another, without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBatch {
    /// (T)
    pub ids: Vec<u32>,
    /// (T)
    pub type_ids: Vec<u32>,
    pub spans: Spans,
    /// The tokens that are asked for, where not all of them are.
    pub asked: Option<Asked>,
}

/// Tokens of a packed batch that something is computed for. The first of every sequence is one of them, so that what is
/// read there can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Their places among the batch's tokens, in order.
    pub rows: Vec<u32>,
    /// Which of the rows each sequence has.
    pub spans: Spans,
}

impl PackedBatch {
    /// Packs encodings in the given order.
    pub fn new<'a>(encodings: impl IntoIterator<Item = &'a Encoding>) -> Self {
        let (mut ids, mut type_ids, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for encoding in encodings {
            ids.extend_from_slice(&encoding.ids);
            type_ids.extend_from_slice(&encoding.type_ids);
            lengths.push(encoding.len());
        }
        Self { ids, type_ids, spans: Spans::of_lengths(lengths), asked: None }
    }

    /// The same where the first token of every sequence is asked for, and those at its places, in order; all of them
    /// where it has none.
    pub fn asking(self, places: &[Option<Vec<usize>>]) -> Self {
        let (mut rows, mut lengths) = (Vec::new(), Vec::new());
        for (span, places) in self.spans.iter().zip(places) {
            let before = rows.len();
            let Some(places) = places else {
                rows.extend(span.clone().map(|at| at as u32));
                lengths.push(span.len());
                continue;
            };
            rows.extend(span.clone().take(1).map(|at| at as u32));
            rows.extend(places.iter().filter(|&&at| at > 0).map(|at| (span.start + at) as u32));
            lengths.push(rows.len() - before);
        }
        Self { asked: Some(Asked { rows, spans: Spans::of_lengths(lengths) }), ..self }
    }

    /// 0, 1, 2 … in every sequence. (T)
    pub fn positions(&self) -> Vec<u32> {
        self.spans.iter().flat_map(|span| 0..span.len() as u32).collect()
    }

    /// [`crate::model::ops::Ids::PositionsBehind`]: `padding` + 1, + 2 … in every sequence, and `padding` for each
    /// token that is `padding` and not counted. (T)
    pub fn positions_behind(&self, padding: u32) -> Vec<u32> {
        let mut positions = Vec::with_capacity(self.ids.len());
        for span in self.spans.iter() {
            let mut last = padding;
            positions.extend(self.ids[span].iter().map(|&id| {
                if id == padding {
                    return padding;
                }
                last += 1;
                last
            }));
        }
        positions
    }
}

/// Sequences of one batch padded to the longest, as exported graphs take them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaddedBatch {
    pub rows: usize,
    pub width: usize,
    /// (rows, width), row-major; padding is `pad_id`.
    pub ids: Vec<i64>,
    /// 1 for a token, 0 for padding.
    pub mask: Vec<i64>,
    pub type_ids: Vec<i64>,
}

impl PaddedBatch {
    /// The number of tokens of each sequence.
    pub fn lengths(&self) -> Vec<usize> {
        let ones = |row: &[i64]| row.iter().filter(|&&one| one == 1).count();
        self.mask.chunks(self.width.max(1)).take(self.rows).map(ones).collect()
    }

    /// 0, 1, 2 … in every row, padding's too.
    pub fn positions(&self) -> Vec<i64> {
        (0..self.rows).flat_map(|_| 0..self.width as i64).collect()
    }

    /// Pads on the right to the longest encoding.
    pub fn new(encodings: &[&Encoding], pad_id: u32) -> Self {
        let width = encodings.iter().map(|e| e.len()).max().unwrap_or(0);
        let rows = encodings.len();
        let mut padded = Self {
            rows,
            width,
            ids: vec![i64::from(pad_id); rows * width],
            mask: vec![0; rows * width],
            type_ids: vec![0; rows * width],
        };
        for (row, encoding) in encodings.iter().enumerate() {
            let start = row * width;
            for (i, (&id, &kind)) in encoding.ids.iter().zip(&encoding.type_ids).enumerate() {
                padded.ids[start + i] = i64::from(id);
                padded.mask[start + i] = 1;
                padded.type_ids[start + i] = i64::from(kind);
            }
        }
        padded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoding(ids: &[u32]) -> Encoding {
        Encoding { ids: ids.to_vec(), type_ids: vec![0; ids.len()], truncated: false }
    }

    #[test]
    fn packing_keeps_every_token_and_restarts_positions() {
        let packed = PackedBatch::new(&[encoding(&[5, 6]), encoding(&[7]), encoding(&[8, 9, 10])]);
        assert_eq!(packed.ids, [5, 6, 7, 8, 9, 10]);
        assert_eq!(packed.positions(), [0, 1, 0, 0, 1, 2]);
        assert_eq!(packed.spans.iter().collect::<Vec<_>>(), [0..2, 2..3, 3..6]);
    }

    #[test]
    fn the_first_token_of_every_sequence_is_asked_for() {
        let packed = PackedBatch::new(&[encoding(&[5, 6]), encoding(&[]), encoding(&[8, 9, 10])]);
        let places = [Some(vec![0]), None, Some(vec![2])];
        let asked = packed.asking(&places).asked.unwrap();
        assert_eq!((asked.rows, asked.spans), (vec![0, 2, 4], Spans::of_lengths([1, 0, 2])));
    }

    #[test]
    fn positions_behind_padding_count_what_is_none() {
        let packed = PackedBatch::new(&[encoding(&[5, 1, 6]), encoding(&[1, 1, 7, 8])]);
        assert_eq!(packed.positions_behind(1), [2, 1, 3, 1, 1, 2, 3]);
    }

    #[test]
    fn padding_is_masked_out() {
        let (a, b) = (encoding(&[5, 6]), encoding(&[7]));
        let padded = PaddedBatch::new(&[&a, &b], 99);
        assert_eq!((padded.rows, padded.width), (2, 2));
        assert_eq!(padded.ids, [5, 6, 7, 99]);
        assert_eq!(padded.mask, [1, 1, 1, 0]);
    }
}
