//! Processes that train one model together, each on its share of a step's micro-batches.
//!
//! All read all data, hold all weights and take the same steps; sums are taken in the order of the ranks, so
//! that every process has the same bits, in every run. Rank 0 alone writes.

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;

use std::sync::OnceLock;

use candle_core::{DType, Tensor};

use crate::Result;

/// What processes that train together need of each other. All of them make the same calls in the same order.
pub trait World: Send + Sync {
    /// Which of them this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Which of those on the same machine this is, from 0.
    fn local_rank(&self) -> usize;

    /// Each number's sum over the processes, in the order of their ranks, in place: the same bits in all of them.
    ///
    /// # Errors
    /// Another process can't be reached.
    fn sum(&self, values: &mut [f32]) -> Result<()>;

    /// What each process hands over, by rank.
    ///
    /// # Errors
    /// Another process can't be reached.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Says that this process is done, and waits for the others. Nothing is asked of them from then on.
    fn end(&self) {}

    /// Ends all processes, with this exit code.
    fn abort(&self, code: i32) -> !;
}

/// A process by itself.
pub struct Alone;

impl World for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn local_rank(&self) -> usize {
        0
    }

    fn sum(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

impl dyn World + '_ {
    /// Whether this process writes, and speaks.
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// The device that a command line asks for: of several processes on a machine, `cuda` gives each a GPU of its own.
    pub fn device(&self, asked: &str) -> String {
        match asked {
            "cuda" if self.size() > 1 => format!("cuda:{}", self.local_rank()),
            asked => asked.to_owned(),
        }
    }

    /// Each number's sum over the processes, in the order of their ranks.
    ///
    /// # Errors
    /// Another process can't be reached.
    pub fn sums(&self, values: &mut [f64]) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        values.fill(0.0);
        for theirs in self.gather(&bytes)? {
            for (sum, value) in values.iter_mut().zip(theirs.as_chunks().0) {
                *sum += f64::from_le_bytes(*value);
            }
        }
        Ok(())
    }

    /// A tensor's sum over the processes, in the order of their ranks, in f32, where the tensor is. On GPUs the numbers go
    /// from one to the other with the feature `nccl`, else by way of the processes' memory.
    ///
    /// # Errors
    /// Another process can't be reached.
    pub fn sum_tensor(&self, tensor: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "nccl")]
        if tensor.device().is_cuda() && self.size() > 1 {
            return nccl::sum(self, tensor);
        }
        let mut values: Vec<f32> = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
        self.sum(&mut values)?;
        Ok(Tensor::from_vec(values, tensor.shape(), tensor.device())?)
    }

    /// The largest of a number of each.
    ///
    /// # Errors
    /// Another process can't be reached.
    pub fn largest(&self, value: i32) -> Result<i32> {
        if self.size() == 1 {
            return Ok(value);
        }
        let all = self.gather(&value.to_le_bytes())?;
        let read =
            |bytes: &Vec<u8>| bytes.as_chunks().0.first().map_or(0, |bytes| i32::from_le_bytes(*bytes));
        Ok(all.iter().map(read).max().unwrap_or(value))
    }

    /// Waits for all.
    ///
    /// # Errors
    /// Another process can't be reached.
    pub fn meet(&self) -> Result<()> {
        self.largest(0).map(drop)
    }

    /// Whether the n-th of things that are dealt out one by one is this process's.
    pub fn has(&self, n: usize) -> bool {
        n % self.size() == self.rank()
    }
}

/// What launchers of MPI programs tell each of their processes: how many there are.
const LAUNCHED: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"];

/// The processes that this one was started with; it alone where nothing started more. Asked for once, in the process's
/// main thread.
///
/// # Errors
/// Unusable: it was started as one of several, and can't reach the others.
pub fn world() -> Result<&'static dyn World> {
    static WORLD: OnceLock<Box<dyn World>> = OnceLock::new();
    if let Some(world) = WORLD.get() {
        return Ok(&**world);
    }
    let size = LAUNCHED.iter().find_map(|name| std::env::var(name).ok()?.parse::<usize>().ok());
    let world = open(size.unwrap_or(1))?;
    Ok(&**WORLD.get_or_init(|| world))
}

/// The processes that this one was started with, if it has asked for them.
#[cfg(feature = "mpi")]
fn open(size: usize) -> Result<Box<dyn World>> {
    if size == 1 { Ok(Box::new(Alone)) } else { Ok(Box::new(mpi::Mpi::open()?)) }
}

#[cfg(not(feature = "mpi"))]
fn open(size: usize) -> Result<Box<dyn World>> {
    if size > 1 {
        crate::bail_unusable!(
            "this process was started as one of {size}, but this tk is built without MPI: build it by \
             `cargo build --release --features mpi` (scripts/setup --mpi gets what that needs)"
        );
    }
    Ok(Box::new(Alone))
}

#[cfg(test)]
pub mod tests {
    use std::sync::{Arc, Barrier, Mutex};

    use candle_core::Device;

    use super::*;

    /// Threads that are processes to each other.
    pub struct Threads {
        rank: usize,
        places: Arc<Mutex<Vec<Vec<u8>>>>,
        barrier: Arc<Barrier>,
    }

    impl World for Threads {
        fn rank(&self) -> usize {
            self.rank
        }

        fn size(&self) -> usize {
            self.places.lock().unwrap().len()
        }

        fn local_rank(&self) -> usize {
            self.rank
        }

        fn sum(&self, values: &mut [f32]) -> Result<()> {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            values.fill(0.0);
            for theirs in self.gather(&bytes)? {
                let theirs = theirs.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                values.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
            }
            Ok(())
        }

        fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
            self.places.lock().unwrap()[self.rank] = bytes.to_vec();
            self.barrier.wait();
            let all = self.places.lock().unwrap().clone();
            self.barrier.wait();
            Ok(all)
        }

        fn abort(&self, _: i32) -> ! {
            panic!("a process has ended all")
        }
    }

    /// Runs something in so many processes; the results by rank.
    pub fn each<T: Send>(size: usize, run: impl Fn(&dyn World) -> T + Sync) -> Vec<T> {
        let (places, barrier) = (Arc::new(Mutex::new(vec![Vec::new(); size])), Arc::new(Barrier::new(size)));
        let run = &run;
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..size)
                .map(|rank| {
                    let world = Threads { rank, places: places.clone(), barrier: barrier.clone() };
                    scope.spawn(move || run(&world))
                })
                .collect();
            started.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn things_are_dealt_out_and_sums_are_in_the_order_of_ranks() {
        let found = each(3, |world| {
            let mut values = [world.rank() as f64, 1e16, 1.0];
            if world.rank() == 2 {
                values[1] = -1e16;
            }
            world.sums(&mut values).unwrap();
            assert_eq!(world.device("cuda"), format!("cuda:{}", world.rank()));
            assert_eq!(
                (world.device("cpu"), world.device("cuda:1")),
                ("cpu".to_owned(), "cuda:1".to_owned())
            );
            let alone: &dyn World = &Alone;
            assert_eq!(alone.device("cuda"), "cuda");
            let summed =
                world.sum_tensor(&Tensor::new(&[[world.rank() as f32, 1.0]], &Device::Cpu).unwrap()).unwrap();
            assert_eq!(summed.to_vec2::<f32>().unwrap(), [[3.0, 3.0]]);
            (
                (0..7).filter(|n| world.has(*n)).collect::<Vec<_>>(),
                values,
                world.largest(world.rank() as i32 * 5).unwrap(),
                world.leads(),
            )
        });
        let shares: Vec<_> = found.iter().map(|own| own.0.clone()).collect();
        assert_eq!(shares, [vec![0, 3, 6], vec![1, 4], vec![2, 5]]);
        assert!(found.iter().all(|own| own.1 == [3.0, 1e16, 3.0] && own.2 == 10));
        assert_eq!(found.iter().map(|own| own.3).collect::<Vec<_>>(), [true, false, false]);
    }
}
