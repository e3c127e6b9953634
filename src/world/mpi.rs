//! Processes that `mpirun` has started (MPI 3, by the library that the crate `mpi` was built against).

use std::sync::Mutex;

use anyhow::Context;
use mpi::collective::CommunicatorCollectives;
use mpi::datatype::PartitionMut;
use mpi::environment::{Threading, Universe};
use mpi::topology::{Communicator, SimpleCommunicator};

use super::World;
use crate::{Result, process};

/// Numbers that are summed at a time: MPI counts in 32 bits, and each process holds as many again.
const BLOCK: usize = 1 << 26;

/// All processes of the run.
pub struct Mpi {
    /// Ends MPI when it is dropped.
    universe: Mutex<Option<Universe>>,
    rank: usize,
    size: usize,
    local_rank: usize,
}

// SAFETY: MPI is initialised for calls from any thread, one at a time, and training makes its calls one after the other.
unsafe impl Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

impl Mpi {
    /// Joins the others. The threads of this process are its share of the machine's cores, unless `RAYON_NUM_THREADS` says
    /// otherwise.
    ///
    /// # Errors
    /// MPI can't be initialised.
    pub fn open() -> Result<Self> {
        let (universe, threading) =
            mpi::initialize_with_threading(Threading::Serialized).context("MPI is initialised already")?;
        anyhow::ensure!(
            threading >= Threading::Serialized,
            "this build of MPI is for processes with one thread ({threading:?})"
        );
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        let here = world.split_shared(rank as i32);
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            let threads = (process::cores() / here.size() as usize).max(1);
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        let local_rank = here.rank() as usize;
        Ok(Self { universe: Mutex::new(Some(universe)), rank, size, local_rank })
    }

    fn all(&self) -> SimpleCommunicator {
        SimpleCommunicator::world()
    }
}

impl World for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local_rank(&self) -> usize {
        self.local_rank
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        let world = self.all();
        for values in values.chunks_mut(BLOCK) {
            // each process sums its part of the numbers, those of all in the order of the ranks
            let part = values.len().div_ceil(self.size);
            let mut sent = vec![0.0f32; part * self.size];
            sent[..values.len()].copy_from_slice(values);
            let mut received = vec![0.0f32; part * self.size];
            world.all_to_all_into(&sent[..], &mut received[..]);
            let (sums, others) = received.split_at_mut(part);
            for theirs in others.chunks_exact(part) {
                sums.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
            }
            world.all_gather_into(&*sums, &mut sent[..]);
            values.copy_from_slice(&sent[..values.len()]);
        }
        Ok(())
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let world = self.all();
        let mut counts = vec![0i32; self.size];
        let count = i32::try_from(bytes.len()).context("more than 2 GB at once")?;
        world.all_gather_into(&count, &mut counts[..]);
        let starts: Vec<i32> = counts
            .iter()
            .scan(0i32, |end, &count| {
                let start = *end;
                *end = end.saturating_add(count);
                Some(start)
            })
            .collect();
        let all: usize = counts.iter().map(|&count| count as usize).sum();
        anyhow::ensure!(i32::try_from(all).is_ok(), "more than 2 GB at once");
        let mut received = vec![0u8; all];
        world.all_gather_varcount_into(
            bytes,
            &mut PartitionMut::new(&mut received[..], &counts[..], &starts[..]),
        );
        Ok(starts
            .iter()
            .zip(&counts)
            .map(|(&start, &count)| received[start as usize..][..count as usize].to_vec())
            .collect())
    }

    fn end(&self) {
        drop(self.universe.lock().unwrap_or_else(|broken| broken.into_inner()).take());
    }

    fn abort(&self, code: i32) -> ! {
        self.all().abort(code)
    }
}
