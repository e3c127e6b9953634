//! A language model's graph against candle, the same texts read in three ways: whole; half of it and then token by
//! token behind the past; and several together, padded on the left.

use std::path::Path;

use super::{Compared, Runtime};
use crate::data::batch::Encoding;
use crate::eager::Evaluator;
use crate::runtime::decoder::Tokens;
use crate::runtime::{Decoder, Provider, Providers};
use crate::saved::Saved;
use crate::say::Say;
use crate::{Result, unusable};

/// Texts whose scores are held at once, and that are padded together.
const TOGETHER: usize = 4;

/// The first tokens of a few texts: enough to find what is wired wrongly, little enough for every export.
pub fn few(encodings: &[Encoding]) -> Vec<Encoding> {
    let cut = |encoding: &Encoding| Encoding {
        ids: encoding.ids.iter().copied().take(16).collect(),
        ..encoding.clone()
    };
    encodings.iter().filter(|encoding| encoding.len() > 1).take(8).map(cut).collect()
}

/// Compares the scores behind every token, by every way.
///
/// # Errors
/// Unusable: no text has two tokens. A runtime can't be had or fails.
pub fn run(
    saved: &Saved,
    graph: &Path,
    encodings: &[Encoding],
    provider: Provider,
    tolerance: f32,
) -> Result<Compared> {
    let evaluator = Evaluator::open(saved, &candle_core::Device::Cpu)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut decoder = Decoder::open(graph, &Providers::only(provider), threads, Say::default())?;
    let texts: Vec<&Encoding> = encodings.iter().filter(|encoding| encoding.len() > 1).collect();
    let mut all: Option<Compared> = None;
    for texts in texts.chunks(TOGETHER) {
        let expected = evaluator.scores(texts)?.concat();
        for found in read_in_every_way(&mut decoder, texts)? {
            let compared =
                Compared::new(Runtime::Ort(provider), Runtime::Eager, &expected, &found, tolerance);
            all = Some(match all {
                Some(all) => all.with(&compared),
                None => compared,
            });
        }
    }
    all.ok_or_else(|| unusable!("no text has two tokens, so there is nothing that could be compared"))
}

/// The rows of scores of all texts, for each way.
fn read_in_every_way(decoder: &mut Decoder, texts: &[&Encoding]) -> Result<[Vec<Vec<f32>>; 3]> {
    let mut found = [(); 3].map(|()| Vec::new());
    for text in texts {
        decoder.forget();
        found[0].extend(read(decoder, &[text], 0, text.len())?.concat());
        decoder.forget();
        let half = text.len() / 2;
        found[1].extend(read(decoder, &[text], 0, half)?.concat());
        for at in half..text.len() {
            found[1].extend(read(decoder, &[text], at, at + 1)?.concat());
        }
    }
    decoder.forget();
    let width = texts.iter().map(|text| text.len()).max().unwrap_or(0);
    found[2] = read(decoder, texts, 0, width)?.concat();
    Ok(found)
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
