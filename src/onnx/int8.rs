//! Matrices in 8 bits that are multiplied as integers: the numbers of an output share a scale.

use rayon::prelude::*;

use super::Range;
use super::proto::ModelProto;
use crate::model::ops::Layout;

/// What the numbers of a matrix reach that is multiplied with. Where a processor has no instruction for it (VNNI, AMX),
/// products of a byte and a signed byte are added up in pairs of 16 bits: 2 · 255 · 64 fits there, and a larger number
/// would be cut off without a word. So seven bits of the eight are used, and a graph gives the same everywhere.
const MULTIPLIED: f32 = 64.0;

/// The same of a table whose rows are only looked up.
const LOOKED_UP: f32 = 127.0;

/// The fewest outputs of a matrix that is worth it: a head with a few labels is small, and what it gives are the answers.
pub const LEAST_OUTPUTS: usize = 16;

/// Behind the name of a weight: its numbers.
pub(super) const NUMBERS: &str = "_quantized";

/// Behind the name of a weight: its scales.
pub(super) const SCALES: &str = "_scale";

/// How a weight is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rounding {
    /// Outputs of a matrix, rows of a table.
    pub channels: usize,
    /// How a checkpoint holds it.
    pub layout: Layout,
    /// Whether it is multiplied with.
    pub multiplied: bool,
}

/// A rounded weight: element = number · scale of its channel.
pub(super) struct Rounded {
    /// As the checkpoint lays them out.
    pub numbers: Vec<i8>,
    /// One a channel.
    pub scales: Vec<f32>,
}

impl Rounding {
    /// Rounds a weight to the nearest numbers; the largest of a channel stays what it is.
    pub fn round(self, values: &[f32]) -> Rounded {
        let inputs = values.len() / self.channels.max(1);
        let at = |channel: usize, input: usize| match self.layout {
            Layout::OutIn => channel * inputs + input,
            Layout::InOut => input * self.channels + channel,
        };
        let most = if self.multiplied { MULTIPLIED } else { LOOKED_UP };
        let largest =
            |channel| (0..inputs).fold(0.0, |most: f32, input| most.max(values[at(channel, input)].abs()));
        let scales: Vec<f32> =
            (0..self.channels).into_par_iter().map(|channel| largest(channel) / most).collect();
        let number = |(place, x): (usize, &f32)| {
            let channel = match self.layout {
                Layout::OutIn => place / inputs,
                Layout::InOut => place % self.channels,
            };
            // a channel of zeros has no scale
            if scales[channel] == 0.0 { 0 } else { (x / scales[channel]).round_ties_even() as i8 }
        };
        let numbers = values.par_iter().enumerate().map(|(place, x)| number((place, x))).collect();
        Rounded { numbers, scales }
    }
}

/// How the numbers of a range become bytes: their scale, and the byte that is 0. A range holds 0.
pub(super) fn bytes_of((least, most): Range) -> (f32, u8) {
    let (least, most) = (least.min(0.0), most.max(0.0));
    let scale = ((most - least) / 255.0).max(f32::MIN_POSITIVE);
    (scale, (-least / scale).round_ties_even() as u8)
}

/// The weights of a model that are in int8.
pub fn weights(model: &ModelProto) -> Vec<String> {
    let initializers = model.graph.iter().flat_map(|graph| &graph.initializer);
    initializers.filter_map(|tensor| tensor.name.strip_suffix(NUMBERS)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_within_half_a_step_of_its_channel_in_either_layout() {
        let (channels, inputs) = (5, 70);
        let value = |channel: usize, input: usize| {
            (((channel * 31 + input * 17) % 23) as f32 / 23.0 - 0.3) * (channel * 10) as f32
        };
        let out_in: Vec<f32> = (0..channels).flat_map(|n| (0..inputs).map(move |k| value(n, k))).collect();
        let in_out: Vec<f32> = (0..inputs).flat_map(|k| (0..channels).map(move |n| value(n, k))).collect();
        for (multiplied, most) in [(true, 64), (false, 127)] {
            let rounding = Rounding { channels, layout: Layout::OutIn, multiplied };
            let rounded = rounding.round(&out_in);
            let other = Rounding { layout: Layout::InOut, ..rounding }.round(&in_out);
            assert_eq!(rounded.scales, other.scales);
            for channel in 0..channels {
                let scale = rounded.scales[channel];
                for input in 0..inputs {
                    let number = rounded.numbers[channel * inputs + input];
                    assert_eq!(number, other.numbers[input * channels + channel]);
                    assert!(number.unsigned_abs() <= most);
                    let apart = (f32::from(number) * scale - value(channel, input)).abs();
                    assert!(apart <= scale * 0.5001, "channel {channel}, input {input}: {apart}");
                }
            }
            // the first channel is all zeros
            assert_eq!((rounded.scales[0], rounded.numbers[0]), (0.0, 0));
        }
    }
}
