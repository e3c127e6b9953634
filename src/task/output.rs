//! What a graph gives: names, symbolic shapes, and a batch's results as a view of each example.

use ndarray::{Array2, ArrayView2};

use crate::Result;

/// The name and the symbolic shape of a graph's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub name: &'static str,
    pub dims: Vec<Dim>,
}

impl Output {
    /// How many numbers a row of it has.
    pub fn width(&self) -> usize {
        match self.dims.last() {
            Some(&Dim::Of(width)) => width,
            _ => 1,
        }
    }

    /// What its rows stand for.
    pub fn scope(&self) -> Scope {
        match self.dims[..] {
            [Dim::Batch, Dim::Sequence | Dim::Asked, ..] => Scope::Token,
            _ => Scope::Sequence,
        }
    }
}

/// One dimension of a graph's input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Symbolic, `batch_size`.
    Batch,
    /// Symbolic, `sequence_length`.
    Sequence,
    /// Symbolic, `past_sequence_length`: tokens whose keys and values come in.
    Past,
    /// Symbolic, `past_sequence_length + sequence_length`.
    Total,
    /// Symbolic, `capacity`: tokens that a buffer has room for.
    Capacity,
    /// Symbolic, `asked`: tokens whose scores are asked for.
    Asked,
    Of(usize),
}

/// What the rows of an output stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One row a sequence.
    Sequence,
    /// One row a token.
    Token,
}

/// An example's outputs, in the task's order, each (1, C) or (T, C).
pub type Outputs = Vec<Array2<f32>>;

/// How the sequences of a batch stand in a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Back to back, as candle computes them.
    Packed,
    /// Each in so many rows, the last of which are padding, as graphs compute them.
    Padded { columns: usize },
}

impl Scope {
    /// Cuts a batch's result, `rows` of (…, C), into those of each sequence, of the given lengths.
    ///
    /// # Errors
    /// It has another number of rows than the sequences ask for.
    pub fn unpack(
        self,
        rows: ArrayView2<f32>,
        lengths: &[usize],
        standing: Standing,
    ) -> Result<Vec<Array2<f32>>> {
        let places: Vec<(usize, usize)> = match (self, standing) {
            (Self::Sequence, _) => lengths.iter().map(|_| (1, 1)).collect(),
            (Self::Token, Standing::Packed) => lengths.iter().map(|&length| (length, length)).collect(),
            (Self::Token, Standing::Padded { columns }) => {
                lengths.iter().map(|&length| (length, columns)).collect()
            }
        };
        let due: usize = places.iter().map(|(_, room)| room).sum();
        anyhow::ensure!(
            rows.nrows() == due && places.iter().all(|(length, room)| length <= room),
            "the model gives {} rows where {due} are due",
            rows.nrows()
        );
        let mut start = 0;
        let example = |(length, room)| {
            let own = rows.slice(ndarray::s![start..start + length, ..]).to_owned();
            start += room;
            own
        };
        Ok(places.into_iter().map(example).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_example_gets_its_rows_and_no_padding() {
        let rows = Array2::from_shape_fn((6, 2), |(row, column)| (10 * row + column) as f32);
        let firsts = |scope: Scope, rows: usize, lengths: &[usize], standing| {
            let all = Array2::from_shape_fn((rows, 2), |(row, column)| (10 * row + column) as f32);
            let found = scope.unpack(all.view(), lengths, standing)?;
            Ok::<_, anyhow::Error>(found.iter().map(|own| own.column(0).to_vec()).collect::<Vec<_>>())
        };
        let padded = Standing::Padded { columns: 3 };
        assert_eq!(
            firsts(Scope::Token, 6, &[2, 3], padded).unwrap(),
            [vec![0.0, 10.0], vec![30.0, 40.0, 50.0]]
        );
        assert_eq!(
            firsts(Scope::Token, 3, &[2, 1], Standing::Packed).unwrap(),
            [vec![0.0, 10.0], vec![20.0]]
        );
        assert_eq!(firsts(Scope::Sequence, 2, &[2, 3], padded).unwrap(), [[0.0], [10.0]]);
        assert!(Scope::Sequence.unpack(rows.view(), &[2, 3], Standing::Packed).is_err());
        assert!(firsts(Scope::Token, 4, &[2, 3], Standing::Packed).is_err());
        assert!(firsts(Scope::Token, 3, &[4], padded).is_err(), "a sequence that is longer than its room");
    }

    #[test]
    fn the_scope_of_an_output_is_seen_in_its_shape() {
        let scope = |dims: &[Dim]| Output { name: "logits", dims: dims.to_vec() }.scope();
        assert_eq!(scope(&[Dim::Batch, Dim::Of(3)]), Scope::Sequence);
        assert_eq!(scope(&[Dim::Batch, Dim::Sequence, Dim::Of(3)]), Scope::Token);
        assert_eq!(scope(&[Dim::Batch, Dim::Asked, Dim::Of(3)]), Scope::Token);
    }
}
