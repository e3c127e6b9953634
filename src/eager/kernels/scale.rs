//! An activation times a number.

use std::sync::Arc;

use rayon::prelude::*;

use super::CHUNK;
use super::buffer::Buffer;
use crate::eager::tape::{Tape, TapeValue};

/// `factor · x`, fused.
pub fn scale(tape: &Tape, x: &Arc<TapeValue>, factor: f64) -> Arc<TapeValue> {
    let mut y = Buffer::of(&x.numbers);
    times(&mut y, factor as f32);
    let x = x.clone();
    tape.push(y, x.width, x.learns, move |mut dy, flow| {
        times(&mut dy, factor as f32);
        flow.give(&x, dy);
        Ok(())
    })
}

fn times(numbers: &mut [f32], factor: f32) {
    numbers.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|x| *x *= factor));
}
