//! What the fused operations of a forward pass leave for the backward pass, and the walk back over it.
//!
//! An operation pushes its result and a closure that turns the result's gradient into those of what it was made of.
//! Gradients of activations are written where they are wanted, or added there by the products themselves; those of
//! parameters go to their slots ([`super::kernels::Gradient`]). To candle, all of it is one custom operation.

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var};

use super::kernels::buffer::Buffer;
use super::kernels::gemm::Write;
use super::kernels::{Numbers, add, stored};

/// An activation, (rows, width), and its place on the tape.
pub struct TapeValue {
    pub numbers: Buffer,
    pub width: usize,
    /// Whether its gradient is wanted: a parameter that is trained went into it.
    pub learns: bool,
    node: usize,
}

impl TapeValue {
    /// How many rows it has.
    pub fn rows(&self) -> usize {
        self.numbers.len() / self.width
    }
}

type Backward = Box<dyn FnOnce(Buffer, &mut Flow) -> Result<()> + Send>;

/// The operations of one forward pass.
pub struct Tape {
    recording: bool,
    recomputing: bool,
    state: Mutex<TapeState>,
}

#[derive(Default)]
struct TapeState {
    nodes: Vec<Option<Backward>>,
    /// Results that candle goes on with, and the gradients that it has given back for them.
    results: usize,
    gradients: Vec<(Arc<TapeValue>, Buffer)>,
}

impl Tape {
    /// An empty tape; one that does not record forgets what it is handed.
    pub fn new(recording: bool) -> Self {
        Self { recording, recomputing: false, state: Mutex::default() }
    }

    /// One whose operations keep none of their inner values, and compute them again on the way back (Chen et al.
    /// 2016, arXiv:1604.06174). No bit of a result changes.
    pub fn recomputing() -> Self {
        Self { recomputing: true, ..Self::new(true) }
    }

    /// Whether operations are to keep their inner values for a backward pass.
    pub fn keeps(&self) -> bool {
        self.recording && !self.recomputing
    }

    /// How many values it holds.
    #[cfg(test)]
    pub fn operations(&self) -> usize {
        self.state().nodes.len()
    }

    fn state(&self) -> MutexGuard<'_, TapeState> {
        // a panic elsewhere has ended the pass whose tape this is
        self.state.lock().unwrap_or_else(|broken| broken.into_inner())
    }

    /// A value that was made of nothing on the tape, and whose gradient is wanted.
    pub fn leaf(&self, numbers: Buffer, width: usize) -> Arc<TapeValue> {
        self.place(numbers, width, true, None)
    }

    /// The result of an operation, which learns where one of its operands does: `backward` is called with its gradient
    /// then, if it has got one, and forgotten else.
    pub fn push(
        &self,
        numbers: Buffer,
        width: usize,
        learns: bool,
        backward: impl FnOnce(Buffer, &mut Flow) -> Result<()> + Send + 'static,
    ) -> Arc<TapeValue> {
        self.place(numbers, width, learns, Some(Box::new(backward)))
    }

    /// The same with a `backward` that looks at the result, too.
    pub fn push_with_result(
        &self,
        numbers: Buffer,
        width: usize,
        learns: bool,
        backward: impl FnOnce(Arc<TapeValue>, Buffer, &mut Flow) -> Result<()> + Send + 'static,
    ) -> Arc<TapeValue> {
        let value = self.place(numbers, width, learns, None);
        if self.recording && learns {
            let result = value.clone();
            let backward: Backward = Box::new(move |gradient, flow| backward(result, gradient, flow));
            self.state().nodes[value.node] = Some(backward);
        }
        value
    }

    fn place(
        &self,
        numbers: Buffer,
        width: usize,
        learns: bool,
        backward: Option<Backward>,
    ) -> Arc<TapeValue> {
        let nodes = &mut self.state().nodes;
        let node = nodes.len();
        if self.recording {
            nodes.push(backward.filter(|_| learns));
        }
        Arc::new(TapeValue { numbers, width, learns, node })
    }

    /// Walks back from values with their gradients. What operations have kept is dropped on the way; the gradients
    /// of leaves remain.
    pub fn backward(&self, from: Vec<(Arc<TapeValue>, Buffer)>) -> Result<Flow> {
        let mut nodes = std::mem::take(&mut self.state().nodes);
        let mut flow = Flow { gradients: (0..nodes.len()).map(|_| None).collect() };
        from.into_iter().for_each(|(value, gradient)| flow.give(&value, gradient));
        while let Some(backward) = nodes.pop() {
            let Some(backward) = backward else { continue };
            if let Some(gradient) = flow.gradients[nodes.len()].take() {
                backward(gradient, &mut flow)?;
            }
        }
        Ok(flow)
    }

    /// A value as a tensor of candle's. When candle's own backward pass has come to all that were asked for, the
    /// tape walks back.
    pub fn tensor(self: &Arc<Self>, value: &Arc<TapeValue>) -> Result<Tensor> {
        if !self.recording {
            return Tensor::from_slice(&value.numbers, (value.rows(), value.width), &Device::Cpu);
        }
        self.result(Pass { tape: self.clone(), value: value.clone() })
    }
}

impl Tape {
    /// Takes the gradient of a result; walks back when it is the last.
    fn arrived(&self, value: &Arc<TapeValue>, gradient: Buffer) -> Result<()> {
        let mut state = self.state();
        state.gradients.push((value.clone(), gradient));
        if state.gradients.len() == state.results {
            let gradients = std::mem::take(&mut state.gradients);
            drop(state);
            self.backward(gradients)?;
        }
        Ok(())
    }

    /// A loss that was computed from a value, whose gradient came with it, as a scalar tensor of candle's.
    pub fn loss(self: &Arc<Self>, value: &Arc<TapeValue>, loss: f32, gradient: Vec<f32>) -> Result<Tensor> {
        let (tape, value) = (self.clone(), value.clone());
        self.result(Loss { tape, value, loss, gradient })
    }

    /// Puts an operation of candle's at the end of the tape.
    fn result(&self, operation: impl CustomOp1 + Send + Sync + 'static) -> Result<Tensor> {
        self.state().results += 1;
        // candle's tape begins at a variable
        let start = Var::from_tensor(&Tensor::zeros(1, DType::F32, &Device::Cpu)?)?;
        start.as_tensor().apply_op1(operation)
    }
}

/// A whole pass over the tape, as candle sees it.
struct Pass {
    tape: Arc<Tape>,
    value: Arc<TapeValue>,
}

impl CustomOp1 for Pass {
    fn name(&self) -> &'static str {
        "tape"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        stored(self.value.numbers.to_vec(), (self.value.rows(), self.value.width))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = Buffer::of(&Numbers::of(&gradient.contiguous()?)?);
        self.tape.arrived(&self.value, gradient)?;
        // nothing reads the start's gradient, and a variable needs none
        Ok(None)
    }
}

/// A loss at the end of the tape, as candle sees it.
struct Loss {
    tape: Arc<Tape>,
    value: Arc<TapeValue>,
    loss: f32,
    gradient: Vec<f32>,
}

impl CustomOp1 for Loss {
    fn name(&self) -> &'static str {
        "loss"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        stored(vec![self.loss], ())
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, factor: &Tensor) -> Result<Option<Tensor>> {
        let factor = factor.to_scalar::<f32>()?;
        let mut gradient = Buffer::of(&self.gradient);
        if factor != 1.0 {
            gradient.iter_mut().for_each(|gradient| *gradient *= factor);
        }
        self.tape.arrived(&self.value, gradient)?;
        Ok(None)
    }
}

/// The gradients of activations in a backward pass.
pub struct Flow {
    gradients: Vec<Option<Buffer>>,
}

impl Flow {
    /// Lets `write` put a gradient of `of` into a buffer, or add it to what has arrived there; where none is wanted, it
    /// is not computed.
    pub fn add(&mut self, of: &TapeValue, write: impl FnOnce(&mut [f32], Write) -> Result<()>) -> Result<()> {
        if !of.learns {
            return Ok(());
        }
        match &mut self.gradients[of.node] {
            Some(sum) => write(sum, Write::Add),
            empty => {
                let mut first = Buffer::any(of.numbers.len());
                write(&mut first, Write::Replace)?;
                *empty = Some(first);
                Ok(())
            }
        }
    }

    /// Hands a gradient of `of` over, where it is wanted.
    pub fn give(&mut self, of: &TapeValue, gradient: Buffer) {
        if !of.learns {
            return;
        }
        match &mut self.gradients[of.node] {
            Some(sum) => add(sum, &gradient),
            empty => *empty = Some(gradient),
        }
    }

    /// The gradient of a leaf, if one has arrived.
    pub fn of(&self, leaf: &TapeValue) -> Option<&[f32]> {
        self.gradients[leaf.node].as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `y = factor · x`.
    fn scale(tape: &Tape, x: &Arc<TapeValue>, factor: f32) -> Arc<TapeValue> {
        let mut y = Buffer::of(&x.numbers);
        y.iter_mut().for_each(|y| *y *= factor);
        let x = x.clone();
        tape.push(y, x.width, x.learns, move |mut dy, flow| {
            dy.iter_mut().for_each(|dy| *dy *= factor);
            flow.give(&x, dy);
            Ok(())
        })
    }

    #[test]
    fn gradients_of_all_uses_add_up_and_unused_values_cost_nothing() {
        let tape = Tape::new(true);
        let x = tape.leaf(Buffer::of(&[1.0, 2.0]), 2);
        let (a, b) = (scale(&tape, &x, 3.0), scale(&tape, &x, 5.0));
        let unused = scale(&tape, &a, 7.0);
        let flow = tape.backward(vec![(a, Buffer::of(&[1.0, 1.0])), (b, Buffer::of(&[1.0, 10.0]))]).unwrap();
        assert_eq!(flow.of(&x), Some(&[8.0, 53.0][..]));
        assert_eq!(flow.of(&unused), None);
    }

    /// As a model with two outputs has it: both gradients come from candle, in whatever order.
    #[test]
    fn the_tape_walks_back_once_candle_has_come_to_every_result() {
        let tape = Arc::new(Tape::new(true));
        let (seen, x) = (Arc::new(Mutex::new(Vec::new())), tape.leaf(Buffer::of(&[2.0]), 1));
        let (kept, behind) = (seen.clone(), x.clone());
        let middle = tape.push(Buffer::of(&x.numbers), 1, true, move |dy, flow| {
            kept.lock().unwrap().push(dy.to_vec());
            flow.give(&behind, dy);
            Ok(())
        });
        let results = [3.0, 5.0].map(|factor| tape.tensor(&scale(&tape, &middle, factor)).unwrap());
        assert_eq!(results[1].to_vec2::<f32>().unwrap(), [[10.0]]);
        let loss = (&results[0] + (&results[1] * 2.0).unwrap()).unwrap().sum_all().unwrap();
        loss.backward().unwrap();
        assert_eq!(*seen.lock().unwrap(), [vec![13.0]], "once, with the gradients of both");
    }

    #[test]
    fn what_is_done_to_a_loss_reaches_its_gradient() {
        let tape = Arc::new(Tape::new(true));
        let (seen, x) = (Arc::new(Mutex::new(Vec::new())), tape.leaf(Buffer::of(&[2.0, 4.0]), 2));
        let (kept, behind) = (seen.clone(), x.clone());
        let y = tape.push(Buffer::of(&x.numbers), 2, true, move |dy, flow| {
            kept.lock().unwrap().push(dy.to_vec());
            flow.give(&behind, dy);
            Ok(())
        });
        let loss = tape.loss(&y, 5.0, vec![1.0, -1.0]).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 5.0);
        (loss * 3.0).unwrap().backward().unwrap();
        assert_eq!(*seen.lock().unwrap(), [vec![3.0, -3.0]]);
    }

    #[test]
    fn a_tape_that_does_not_record_keeps_nothing() {
        let tape = Tape::new(false);
        let x = tape.leaf(Buffer::of(&[1.0]), 1);
        let weak = Arc::downgrade(&x);
        let y = scale(&tape, &x, 2.0);
        drop(x);
        assert!(weak.upgrade().is_none());
        assert_eq!(&y.numbers[..], [2.0]);
    }
}
