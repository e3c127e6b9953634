//! An activation of the candle interpreter: computed, or waiting for the verb that it is computed together with.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{Result, Tensor};

use super::kernels::dropout::{Mask, dropout};
use super::kernels::linear::linear;
use super::kernels::{Kernels, Weight};

/// An activation. Some verbs only note what is to be done, so that the next one can do both in one operation: a
/// linear map waits for a non-linearity or for attention, a sum for a layer norm.
#[derive(Clone)]
pub struct X {
    kernels: Kernels,
    state: Rc<RefCell<State>>,
}

/// What is known of an activation.
#[derive(Clone)]
pub(super) enum State {
    Ready(Tensor),
    /// `x · Wᵀ + b`
    Linear {
        x: Tensor,
        weight: Weight,
        bias: Weight,
    },
    /// `dropout(x)`
    Dropped {
        x: Tensor,
        mask: Mask,
    },
    /// `x + dropout(branch)`
    Sum {
        branch: Tensor,
        mask: Option<Mask>,
        x: Tensor,
    },
}

impl X {
    pub(super) fn new(kernels: Kernels, state: State) -> Self {
        Self { kernels, state: Rc::new(RefCell::new(state)) }
    }

    pub(super) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// The numbers, computed at the first call.
    pub fn tensor(&self) -> Result<Tensor> {
        let tensor = match self.state() {
            State::Ready(tensor) => return Ok(tensor),
            State::Linear { x, weight, bias } => linear(self.kernels, &x, &weight, &bias)?,
            State::Dropped { x, mask } => dropout(self.kernels, &x, mask)?,
            State::Sum { branch, mask: None, x } => (branch + x)?,
            State::Sum { branch, mask: Some(mask), x } => (dropout(self.kernels, &branch, mask)? + x)?,
        };
        *self.state.borrow_mut() = State::Ready(tensor.clone());
        Ok(tensor)
    }
}
