//! Rows that move inside of memory and from one to another: by ourselves, or where only a provider reaches them by a graph
//! that the provider runs.

use std::sync::Arc;

use anyhow::Context;
use prost::Message;

use super::binding::{Binding, Kind, Place, Tensor};
use super::memory::{Allocator, Bytes, PinnedBytes};
use super::session::{Model, OrtSession, Threads};
use super::{Providers, pages};
use crate::Result;
use crate::onnx::proto::tensor_proto::DataType;
use crate::onnx::rows;
use crate::say::Say;

/// Consecutive rows that are copied to another place.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowMove {
    pub from: usize,
    pub to: usize,
    pub count: usize,
}

/// A matrix of rows of so many numbers.
pub(super) struct Rows {
    pub bytes: Bytes,
    pub kind: Kind,
    pub width: usize,
}

impl Rows {
    /// The bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.width * self.kind.size()
    }
}

/// Where rows are kept, and what moves them there.
pub(super) enum Memory {
    /// This process's own.
    Own,
    /// A provider's.
    Providers(Box<Mover>),
}

impl Memory {
    /// A matrix of zeros.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn zeros(&mut self, rows: usize, width: usize, kind: Kind) -> Result<Rows> {
        let length = rows.checked_mul(width).and_then(|n| n.checked_mul(kind.size()));
        let length = length.context("more numbers than can be counted")?;
        match self {
            Self::Own => {
                let bytes = PinnedBytes::zeros(length)?;
                pages::ask_for(bytes.as_slice());
                Ok(Rows { bytes: Bytes::Own(bytes), kind, width })
            }
            Self::Providers(mover) => mover.zeros(rows, width, kind),
        }
    }

    /// Copies rows of a matrix to others of it; all are read before any is written.
    ///
    /// # Errors
    /// The provider fails.
    pub fn move_within(&mut self, rows: &mut Rows, moves: &[RowMove]) -> Result<()> {
        let size = rows.row_bytes();
        match (self, &mut rows.bytes) {
            (Self::Own, Bytes::Own(bytes)) => {
                let bytes = bytes.as_mut_slice();
                let part = |start: usize, count: usize| start * size..(start + count) * size;
                let read: Vec<Vec<u8>> =
                    moves.iter().map(|moved| bytes[part(moved.from, moved.count)].to_vec()).collect();
                for (read, moved) in read.iter().zip(moves) {
                    bytes[part(moved.to, moved.count)].copy_from_slice(read);
                }
                Ok(())
            }
            (Self::Providers(mover), _) => mover.move_within(rows, moves),
            (Self::Own, Bytes::Providers(_)) => anyhow::bail!("these rows are a provider's"),
        }
    }

    /// Copies rows of a matrix to another one of the same width.
    ///
    /// # Errors
    /// The provider fails.
    pub fn move_to(&mut self, from: &mut Rows, to: &mut Rows, moves: &[RowMove]) -> Result<()> {
        let size = to.row_bytes();
        match (self, &from.bytes, &mut to.bytes) {
            (Self::Own, Bytes::Own(old), Bytes::Own(new)) => {
                let (old, new) = (old.as_slice(), new.as_mut_slice());
                for &RowMove { from, to, count } in moves {
                    new[to * size..(to + count) * size]
                        .copy_from_slice(&old[from * size..(from + count) * size]);
                }
                Ok(())
            }
            (Self::Providers(mover), ..) => mover.move_to(from, to, moves),
            (Self::Own, ..) => anyhow::bail!("these rows are a provider's"),
        }
    }
}

/// A provider's memory, and the graph that it moves rows by.
pub(super) struct Mover {
    // before the session that it is of
    pub allocator: Arc<Allocator>,
    session: OrtSession,
    kind: Kind,
    /// Where the numbers of the rows lie, and where this process's memory is.
    host: Place,
}

impl Mover {
    /// Rows of numbers of one kind, in what a loaded model allocates at `place`.
    ///
    /// # Errors
    /// The providers can't run the graph.
    pub fn new(model: &OrtSession, place: Place, providers: &Providers, kind: Kind) -> Result<Self> {
        let data_type = match kind {
            Kind::F16 => DataType::Float16,
            Kind::F32 => DataType::Float,
            other => anyhow::bail!("rows of {other:?} are not moved"),
        };
        let graph = rows::copying(data_type).encode_to_vec();
        let providers = Providers { how: providers.how.clone(), ..Providers::only(model.provider()) };
        let (graph, threads) = (Model::Bytes(&graph), Threads::Together(1));
        let session = OrtSession::open(graph, &providers, threads, Say::default())?;
        let allocator = Arc::new(Allocator::of(model, place)?);
        Ok(Self { allocator, session, kind, host: Place::of(Place::CPU, 0)? })
    }

    fn zeros(&mut self, rows: usize, width: usize, kind: Kind) -> Result<Rows> {
        anyhow::ensure!(kind == self.kind, "rows of {kind:?} where those of {:?} are moved", self.kind);
        let length = rows * width * kind.size(); // the caller has counted them
        let bytes = Bytes::Providers(self.allocator.allocate(length)?);
        let mut matrix = Rows { bytes, kind, width };
        if length > 0 {
            // what is no number, times a weight of zero, would still be none
            let mut zeros = Bytes::Own(PinnedBytes::zeros(width * kind.size())?);
            let to: Vec<i64> = (0..rows as i64).collect();
            // SAFETY: a row of zeros in this process's memory, and so many rows in the provider's
            unsafe {
                let zeros = Tensor::over(&self.host, zeros.whole(), kind, &[1, width])?;
                let matrix = self.tensor(&mut matrix, rows)?;
                self.run(&zeros, &matrix, &vec![0; rows], &to)?;
            }
        }
        Ok(matrix)
    }

    fn move_within(&mut self, rows: &mut Rows, moves: &[RowMove]) -> Result<()> {
        let count = self.rows(rows);
        let (from, to) = each(moves);
        // SAFETY: the rows outlive the run
        unsafe {
            let rows = self.tensor(rows, count)?;
            self.run(&rows, &rows, &from, &to)
        }
    }

    fn move_to(&mut self, from: &mut Rows, to: &mut Rows, moves: &[RowMove]) -> Result<()> {
        let counts = [self.rows(from), self.rows(to)];
        let (places_from, places_to) = each(moves);
        // SAFETY: the rows outlive the run
        unsafe {
            let (from, to) = (self.tensor(from, counts[0])?, self.tensor(to, counts[1])?);
            self.run(&from, &to, &places_from, &places_to)
        }
    }

    fn rows(&self, rows: &mut Rows) -> usize {
        rows.bytes.whole().len() / rows.row_bytes()
    }

    /// # Safety
    /// The rows outlive the runs that the tensor is bound to.
    unsafe fn tensor(&self, rows: &mut Rows, count: usize) -> Result<Tensor> {
        // SAFETY: promised by the caller
        unsafe { Tensor::over(&self.allocator.place, rows.bytes.whole(), rows.kind, &[count, rows.width]) }
    }

    /// # Safety
    /// What the tensors point at is alive.
    unsafe fn run(&mut self, rows_from: &Tensor, rows_to: &Tensor, from: &[i64], to: &[i64]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the indices outlive the run, and the rest is promised by the caller
        unsafe {
            let mut binding = Binding::new(&self.session)?;
            binding.input(c"rows_from", rows_from)?;
            binding.input(c"rows_to", rows_to)?;
            binding.input(c"from", &Tensor::of(&self.host, from, &[from.len()])?)?;
            binding.input(c"to", &Tensor::of(&self.host, to, &[to.len(), 1])?)?;
            binding.output(c"moved", rows_to)?;
            binding.run(&mut self.session).context("moving rows of the cache")
        }
    }
}

/// Each row's places.
fn each(moves: &[RowMove]) -> (Vec<i64>, Vec<i64>) {
    let rows = |start: usize, count: usize| start as i64..(start + count) as i64;
    let from = moves.iter().flat_map(|moved| rows(moved.from, moved.count)).collect();
    (from, moves.iter().flat_map(|moved| rows(moved.to, moved.count)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Provider;

    #[test]
    fn a_providers_memory_holds_zeros_and_rows_change_places_in_it() {
        let cpu = Providers::only(Provider::Cpu);
        let graph = rows::copying(DataType::Float16).encode_to_vec();
        let session =
            OrtSession::open(Model::Bytes(&graph), &cpu, Threads::Together(1), Say::default()).unwrap();
        let mover = Mover::new(&session, Place::of(Place::CPU, 0).unwrap(), &cpu, Kind::F16).unwrap();
        let bytes = |rows: &mut Rows| {
            let mut bytes = rows.bytes.whole();
            // SAFETY: of this provider it is the processor's memory, and no run is under way
            unsafe { bytes.as_mut() }
        };
        let mut memory = Memory::Providers(Box::new(mover));
        for _ in 0..2 {
            let mut rows = memory.zeros(5, 3, Kind::F16).unwrap();
            assert_eq!(bytes(&mut rows), [0; 5 * 3 * 2]);
            (0..5).for_each(|i| bytes(&mut rows)[i * 6..][..6].fill(i as u8 + 1));
            let moves = [RowMove { from: 0, to: 1, count: 2 }, RowMove { from: 2, to: 0, count: 1 }];
            memory.move_within(&mut rows, &moves).unwrap();
            let firsts = |bytes: &[u8]| bytes.iter().step_by(6).copied().collect::<Vec<_>>();
            assert_eq!(firsts(bytes(&mut rows)), [3, 1, 2, 4, 5]);
            let mut larger = memory.zeros(7, 3, Kind::F16).unwrap();
            memory.move_to(&mut rows, &mut larger, &[RowMove { from: 3, to: 5, count: 2 }]).unwrap();
            assert_eq!(firsts(bytes(&mut larger)), [0, 0, 0, 0, 0, 4, 5]);
            bytes(&mut rows).fill(0xff); // what the next ones may find
            bytes(&mut larger).fill(0xff);
        }
        assert!(memory.zeros(2, 3, Kind::F32).is_err(), "the graph is for other numbers");
    }
}
