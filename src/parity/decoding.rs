//! A language model's graph against candle, the same texts read in three ways: whole; half of it and then token by
//! token behind the past; and several together, padded on the left.

use std::path::Path;

use super::{Compared, Runtime};
use crate::Result;
use crate::data::batch::Encoding;
use crate::eager::Evaluator;
use crate::runtime::decoder::Tokens;
use crate::runtime::{Decoder, Provider, Providers};
use crate::saved::Saved;
use crate::say::Say;

/// How many texts are read, and how many tokens of each: their scores are all held at once.
const TEXTS: usize = 8;
const LENGTH: usize = 16;

/// Compares the scores behind every token, by every way.
///
/// # Errors
/// A runtime can't be had or fails.
pub fn run(saved: &Saved, graph: &Path, encodings: &[Encoding], tolerance: f32) -> Result<Compared> {
    let texts: Vec<Encoding> = encodings
        .iter()
        .filter(|encoding| encoding.len() > 1)
        .take(TEXTS)
        .map(|encoding| {
            let ids = encoding.ids[..encoding.len().min(LENGTH)].to_vec();
            Encoding { type_ids: vec![0; ids.len()], ids, truncated: false }
        })
        .collect();
    let expected = Evaluator::open(saved, &candle_core::Device::Cpu)?.scores(&texts)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut decoder = Decoder::open(graph, &Providers::only(Provider::Cpu), threads, Say::default())?;

    let mut found = Vec::new();
    for text in &texts {
        decoder.forget();
        found.extend(read(&mut decoder, &[text], 0, text.len())?.remove(0));
    }
    for text in &texts {
        decoder.forget();
        let half = text.len() / 2;
        found.extend(read(&mut decoder, &[text], 0, half)?.remove(0));
        for at in half..text.len() {
            found.extend(read(&mut decoder, &[text], at, at + 1)?.remove(0));
        }
    }
    decoder.forget();
    let together: Vec<&Encoding> = texts.iter().collect();
    let width = together.iter().map(|text| text.len()).max().unwrap_or(0);
    found.extend(read(&mut decoder, &together, 0, width)?.into_iter().flatten());

    let wanted: Vec<Vec<f32>> = [&expected; 3].into_iter().flatten().flatten().cloned().collect();
    Ok(Compared::new(Runtime::Ort(Provider::Cpu), Runtime::Eager, &wanted, &found, tolerance))
}

/// Reads the columns from `start` to `end` of texts that are padded on the left to one width; each text's rows of
/// scores, without those of padding.
fn read(decoder: &mut Decoder, texts: &[&Encoding], start: usize, end: usize) -> Result<Vec<Vec<Vec<f32>>>> {
    let width = texts.iter().map(|text| text.len()).max().unwrap_or(0);
    let (mut ids, mut mask, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for text in texts {
        let padding = width - text.len();
        mask.extend((0..end).map(|column| i64::from(column >= padding)));
        for column in start..end {
            let place = column.saturating_sub(padding);
            ids.push(i64::from(text.ids[place]));
            positions.push(place as i64);
        }
    }
    let scores = decoder.read(Tokens { rows: texts.len(), ids: &ids, mask: &mask, positions: &positions })?;
    let vocabulary = scores.shape.last().copied().unwrap_or(1);
    let rows = scores.values.chunks_exact(vocabulary).map(<[f32]>::to_vec).collect::<Vec<_>>();
    let of_texts = rows.chunks(end - start).zip(texts);
    Ok(of_texts.map(|(rows, text)| rows[(width - text.len()).saturating_sub(start)..].to_vec()).collect())
}
