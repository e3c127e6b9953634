//! An activation of the candle interpreter: a tensor, or one of the tape's, computed or waiting for the verb that it
//! is computed together with.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::kernels::dropout::{Mask, dropout};
use super::kernels::linear::{LinearMap, linear, linear_activation, linear_gated};
use super::kernels::residual::{Branch, residual};
use super::kernels::split::split;
use super::tape::{Tape, TapeValue};
use crate::model::ops::Activation;

/// An activation.
#[derive(Clone)]
pub enum X {
    /// On candle's tape: the composite operations.
    Tensor(Tensor),
    /// On our own: the fused ones.
    Fused(Fused),
}

impl X {
    /// As a tensor of candle's, through which gradients flow back.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            X::Tensor(tensor) => Ok(tensor.clone()),
            X::Fused(x) => x.tape.tensor(&x.value()?),
        }
    }

    /// How many rows it has.
    pub(super) fn rows(&self) -> Result<usize> {
        Ok(match self {
            X::Tensor(tensor) => tensor.dim(0)?,
            X::Fused(x) => x.value()?.rows(),
        })
    }

    /// The numbers alone.
    pub(super) fn numbers(&self) -> Result<Tensor> {
        match self {
            X::Tensor(tensor) => Ok(tensor.detach()),
            X::Fused(x) => {
                let value = x.value()?;
                Tensor::from_slice(&value.numbers, (value.rows(), value.width), &Device::Cpu)
            }
        }
    }
}

/// An activation of the fused operations. Some verbs only note what is to be done, so that the next one can do both
/// in one operation.
#[derive(Clone)]
pub struct Fused {
    tape: Arc<Tape>,
    state: Rc<RefCell<Pending>>,
}

/// What is known of an activation.
#[derive(Clone)]
pub(super) enum Pending {
    Branch(Branch),
    /// `how(map(x))`, or the second half of `map(x)` times `how` of the first
    Activated {
        x: Arc<TapeValue>,
        map: LinearMap,
        how: Activation,
        gated: bool,
    },
    /// `dropout(branch)`
    Dropped {
        branch: Branch,
        mask: Mask,
    },
    /// One of equal parts of a whole's channels.
    Part {
        whole: Fused,
        index: usize,
        parts: usize,
    },
    /// `x + dropout(branch)`
    Sum {
        branch: Branch,
        mask: Option<Mask>,
        x: Arc<TapeValue>,
    },
}

impl Fused {
    pub(super) fn new(tape: &Arc<Tape>, state: Pending) -> Self {
        Self { tape: tape.clone(), state: Rc::new(RefCell::new(state)) }
    }

    pub(super) fn state(&self) -> Pending {
        self.state.borrow().clone()
    }

    /// Whether this is the very same activation.
    pub(super) fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.state, &other.state)
    }

    /// Notes what has been computed.
    pub(super) fn is_now(&self, value: Arc<TapeValue>) {
        *self.state.borrow_mut() = Pending::Branch(Branch::Ready(value));
    }

    /// The numbers, computed at the first call.
    pub(super) fn value(&self) -> Result<Arc<TapeValue>> {
        let value = match self.state() {
            Pending::Branch(branch) => self.computed(branch)?,
            Pending::Activated { x, map, how, gated } => self.activated(&x, &map, how, gated)?,
            Pending::Dropped { branch, mask } => dropout(&self.tape, &self.computed(branch)?, mask),
            Pending::Part { whole, index, parts } => split(&self.tape, &whole.value()?, index, parts)?,
            Pending::Sum { branch, mask, x } => residual(&self.tape, &branch, mask, &x)?,
        };
        self.is_now(value.clone());
        Ok(value)
    }

    fn computed(&self, branch: Branch) -> Result<Arc<TapeValue>> {
        match branch {
            Branch::Ready(value) => Ok(value),
            Branch::Linear { x, map } => linear(&self.tape, &x, &map),
            Branch::FeedForward { x, first, how, gated, second } => {
                linear(&self.tape, &self.activated(&x, &first, how, gated)?, &second)
            }
        }
    }

    fn activated(
        &self,
        x: &Arc<TapeValue>,
        map: &LinearMap,
        how: Activation,
        gated: bool,
    ) -> Result<Arc<TapeValue>> {
        match gated {
            true => linear_gated(&self.tape, x, map, how),
            false => linear_activation(&self.tape, x, map, how),
        }
    }

    /// What may be added to something else: itself, or what it waits for.
    pub(super) fn branch(&self) -> Result<Branch> {
        Ok(match self.state() {
            Pending::Branch(branch) => branch,
            _ => Branch::Ready(self.value()?),
        })
    }
}
