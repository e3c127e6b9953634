//! What a report shows of one runtime beside the table: how differences grow from layer to layer, how many are how large,
//! and the records that differ most.

use ndarray::Array2;
use serde_json::{Map, Value};

use super::runtimes::{LoadedGraph, outputs, padded};
use super::{BATCH, Runtime, Subject, compare};
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::records::Row;
use crate::eager::Evaluator;
use crate::parity::inputs::Text;
use crate::task::{AnswerFlags, Asking, Outputs};

/// Records whose taps are compared: every hidden state of each is held.
const TAPPED: usize = 64;
/// Records that are shown.
const SHOWN: usize = 8;
/// The smallest power of ten that is told apart.
pub const LEAST: i32 = -9;

/// One runtime beside the definition in candle.
pub struct Detail {
    pub name: &'static str,
    /// In the order of the definition.
    pub layers: Vec<Layer>,
    /// How many of the outputs' numbers differ by less than 10^([`LEAST`] + place), and by no less than the place before says.
    /// The first are those that do not differ at all, the last all that are larger.
    pub histogram: [usize; 11],
    /// Those that differ most, the worst first.
    pub worst: Vec<Worst>,
}

/// One tap of the definition.
pub struct Layer {
    pub tap: String,
    /// The largest |a − b|, and the mean.
    pub largest: f32,
    pub mean: f64,
}

/// One record.
pub struct Worst {
    pub record: usize,
    pub text: String,
    pub largest: f32,
    /// What is answered by candle, and by the runtime; none of records that are no texts of the task's.
    pub answers: Option<(String, String)>,
}

/// Compares a runtime with candle in all detail. `texts` are those of the records, where there are any.
///
/// # Errors
/// As of comparing the two.
pub fn of(subject: &Subject, runtime: Runtime, texts: &[Text]) -> Result<Detail> {
    let (wanted, found) = (outputs(Runtime::Eager, subject, BATCH)?, outputs(runtime, subject, BATCH)?);
    let mut histogram = [0; 11];
    for (a, b) in wanted.iter().flatten().flatten().zip(found.iter().flatten().flatten()) {
        histogram[place((a - b).abs())] += 1;
    }
    let flat = |outputs: &Outputs| -> Vec<f32> { outputs.iter().flatten().copied().collect() };
    let apart = |i: usize| compare::distance(&flat(&wanted[i]), &flat(&found[i]));
    let mut order: Vec<(usize, f32)> = (0..wanted.len()).map(|i| (i, apart(i))).collect();
    order.sort_by(|(i, a), (j, b)| b.total_cmp(a).then(i.cmp(j)));
    order.truncate(SHOWN);
    let asking = asking(subject);
    let shown = |(record, largest): (usize, f32)| {
        let encoding = &subject.encodings[record];
        let text = match texts.get(record) {
            Some((text, pair)) => pair.iter().fold(text.clone(), |text, pair| format!("{text} ⏐ {pair}")),
            None => asking.tokenizer.inner().decode(&encoding.ids, false).unwrap_or_default(),
        };
        let answers = texts.get(record).and_then(|text| {
            let answer = |outputs| answer(subject, &asking, text, encoding, outputs);
            Some((answer(&wanted[record])?, answer(&found[record])?))
        });
        Worst { record, text, largest, answers }
    };
    let worst = order.into_iter().map(shown).collect();
    Ok(Detail { name: runtime.name(), layers: layers(subject, runtime)?, histogram, worst })
}

/// Where a difference is counted.
fn place(difference: f32) -> usize {
    match difference {
        0.0 => 0,
        d if d.is_finite() => (d.log10().floor() as i32 - LEAST + 2).clamp(1, 10) as usize,
        _ => 10,
    }
}

fn asking(subject: &Subject) -> Asking {
    let (flags, saved) = (AnswerFlags::default(), subject.saved);
    Asking {
        columns: saved.task.columns(&flags),
        tokenizer: saved.tokenizer.clone(),
        max_length: saved.max_length,
        flags,
    }
}

/// What the task says of a record by its outputs, where the record is one that it takes.
fn answer(
    subject: &Subject,
    asking: &Asking,
    (text, pair): &Text,
    encoding: &Encoding,
    outputs: &Outputs,
) -> Option<String> {
    let fields = [("text", Some(text)), ("text_pair", pair.as_ref())];
    let fields = fields.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?.clone().into())));
    let row = Row::new(1, fields.collect::<Map<String, Value>>());
    let (windows, question) = subject.saved.task.ask(&row, asking).ok()?;
    if windows.len() != 1 || windows[0].ids != encoding.ids {
        return None;
    }
    let answer = subject.saved.task.answer(&question, std::slice::from_ref(outputs), asking).ok()?;
    Some(answer.map_or_else(|error| error, |fields| Value::Object(fields).to_string()))
}

/// The differences at every tap that the graph names too.
fn layers(subject: &Subject, runtime: Runtime) -> Result<Vec<Layer>> {
    let evaluator = Evaluator::open(subject.saved, &candle_core::Device::Cpu)?;
    let encodings = &subject.encodings[..subject.encodings.len().min(TAPPED)];
    let mut layers: Vec<(Layer, usize)> = Vec::new();
    let mut graph = None;
    for batch in encodings.chunks(BATCH) {
        let taps = evaluator.taps(batch)?;
        if graph.is_none() {
            let names: Vec<String> = taps.iter().map(|(name, _)| name.clone()).collect();
            graph = Some(LoadedGraph::open(runtime, subject, &names)?);
        }
        let Some(graph) = &mut graph else { continue };
        let padded = padded(subject, batch);
        let found = graph.run(&padded)?;
        for (name, tensor) in taps {
            let Some(values) = found.iter().find(|values| values.name == name) else { continue };
            let scope = match values.array.ndim() {
                3 => crate::task::Scope::Token,
                _ => crate::task::Scope::Sequence,
            };
            let own: Vec<Array2<f32>> = values.unpack(scope, &padded)?;
            let found: Vec<f32> = own.iter().flatten().copied().collect();
            let wanted: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
            let largest = compare::distance(&wanted, &found);
            let sum: f64 = wanted.iter().zip(&found).map(|(a, b)| f64::from((a - b).abs())).sum();
            match layers.iter_mut().find(|(layer, _)| layer.tap == name) {
                Some((layer, count)) => {
                    layer.largest = if largest.is_nan() { largest } else { layer.largest.max(largest) };
                    layer.mean += sum;
                    *count += wanted.len();
                }
                None => layers.push((Layer { tap: name, largest, mean: sum }, wanted.len())),
            }
        }
    }
    let mean = |(layer, count): (Layer, usize)| Layer { mean: layer.mean / count.max(1) as f64, ..layer };
    Ok(layers.into_iter().map(mean).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_counted_by_their_power_of_ten() {
        let places =
            [(0.0, 0), (1e-12, 1), (9e-10, 1), (2e-9, 2), (3e-6, 5), (0.5, 10), (7.0, 10), (f32::NAN, 10)];
        for (difference, due) in places {
            assert_eq!(place(difference), due, "{difference}");
        }
    }
}
