//! A language model's graphs against candle, the same texts read in three ways: whole; half of it and then token by
//! token behind the past; and several together, padded on the left or at lengths of their own.

use std::path::Path;

use super::{Compared, Measure, Runtime};
use crate::data::batch::Encoding;
use crate::eager::Evaluator;
use crate::runtime::decoder::Tokens;
use crate::runtime::slots::{SlotRead, Slots};
use crate::runtime::{Decoder, Provider, Providers};
use crate::saved::Saved;
use crate::say::Say;
use crate::task::Example;
use crate::task::scores::argmax;
use crate::{Result, unusable};

/// Texts whose scores are held at once, and that are padded together.
const TOGETHER: usize = 4;

/// Tokens that a text is gone on with.
const CONTINUED: usize = 256;

/// The first tokens of a few texts: enough to find what is wired wrongly, little enough for every export.
pub fn few(encodings: &[Encoding]) -> Vec<Encoding> {
    let cut = |encoding: &Encoding| Encoding {
        ids: encoding.ids.iter().copied().take(16).collect(),
        ..encoding.clone()
    };
    encodings.iter().filter(|encoding| encoding.len() > 1).take(8).map(cut).collect()
}

/// Compares the scores behind every token, by every way, in a graph of [`crate::task::Form::Cached`].
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
    let threads = crate::process::cores();
    let mut decoder = Decoder::open(graph, &Providers::only(provider), threads, Say::default())?;
    let runtime = Runtime::Ort(provider);
    compare(saved, encodings, |texts, expected| {
        let ways = read_in_every_way(&mut decoder, texts)?;
        let compared =
            |found: &Vec<Vec<f32>>| Compared::new(runtime, Runtime::Eager, expected, found, tolerance);
        ways.iter().map(compared).collect()
    })
}

/// The same for a graph of [`crate::task::Form::InPlace`], whose rows stand at lengths of their own; and every fourth
/// text goes on by the most likely tokens, up to 256 of them: each must be what candle finds in the whole.
///
/// # Errors
/// As [`run`].
pub fn in_place(
    saved: &Saved,
    graph: &Path,
    encodings: &[Encoding],
    provider: Provider,
    tolerance: f32,
) -> Result<Compared> {
    let evaluator = Evaluator::open(saved, &candle_core::Device::Cpu)?;
    let mut slots = open(graph, provider)?;
    slots.resize(TOGETHER, saved.config.max_positions())?;
    let new = |expected: &[Vec<f32>], found: &[Vec<f32>]| {
        let compared = Compared::new(Runtime::Ort(provider), Runtime::Eager, expected, found, tolerance)?;
        anyhow::Ok(Compared { name: in_place_on(provider), ..compared })
    };
    compare(saved, encodings, |texts, expected| {
        let ways = read_slots_in_every_way(&mut slots, texts)?;
        let mut compared =
            ways.iter().map(|found| new(expected, found)).collect::<Result<Vec<Compared>>>()?;
        for text in texts.iter().take(1) {
            let (whole, found) = continued(&mut slots, text, saved.config.max_positions())?;
            let first = text.len() - 1;
            compared.push(new(&evaluator.scores(&[&whole])?.concat()[first..whole.len() - 1], &found)?);
        }
        Ok(compared)
    })
}

/// What candle and a graph of [`crate::task::Form::InPlace`] measure on texts.
///
/// # Errors
/// As [`run`].
pub fn measure(saved: &Saved, graph: &Path, provider: Provider, examples: &[Example]) -> Result<Measure> {
    let expected = Evaluator::open(saved, &candle_core::Device::Cpu)?.measure(examples)?;
    let mut slots = open(graph, provider)?;
    Measure::of(&saved.task, &expected, &saved.task.measure_in_place(&mut slots, examples)?)
}

fn open(graph: &Path, provider: Provider) -> Result<Slots> {
    Slots::open(graph, &Providers::only(provider), crate::process::cores(), Say::default())
}

/// What a graph that generates is called in a table.
fn in_place_on(provider: Provider) -> &'static str {
    match provider {
        Provider::Cuda => "ort-cuda-in-place",
        _ => "ort-cpu-in-place",
    }
}

fn compare(
    saved: &Saved,
    encodings: &[Encoding],
    mut by_every_way: impl FnMut(&[&Encoding], &[Vec<f32>]) -> Result<Vec<Compared>>,
) -> Result<Compared> {
    let evaluator = Evaluator::open(saved, &candle_core::Device::Cpu)?;
    let texts: Vec<&Encoding> = encodings.iter().filter(|encoding| encoding.len() > 1).collect();
    let mut all: Option<Compared> = None;
    for texts in texts.chunks(TOGETHER) {
        for compared in by_every_way(texts, &evaluator.scores(texts)?.concat())? {
            all = Some(match all {
                Some(all) => all.with(&compared),
                None => compared,
            });
        }
    }
    all.ok_or_else(|| unusable!("no text has two tokens, so there is nothing that could be compared"))
}

/// A text and the most likely tokens behind it, and the scores of each of these.
fn continued(slots: &mut Slots, text: &Encoding, room: usize) -> Result<(Encoding, Vec<Vec<f32>>)> {
    let (mut whole, mut found) = (text.clone(), Vec::new());
    let mut unread = 0;
    while found.len() < CONTINUED && whole.len() < room {
        let ids: Vec<i64> = whole.ids[unread..].iter().map(|&id| i64::from(id)).collect();
        let asked = [ids.len() as i64 - 1];
        let scores = slots.read(SlotRead { slots: &(0..1), ids: &ids, lengths: &[unread], asked: &asked })?;
        unread = whole.len();
        whole.ids.push(argmax(scores) as u32);
        whole.type_ids.push(0);
        found.push(scores.to_vec());
    }
    Ok((whole, found))
}

/// The rows of scores of all texts: each read whole; half of each and then token by token; the same with all of them
/// side by side.
fn read_slots_in_every_way(slots: &mut Slots, texts: &[&Encoding]) -> Result<[Vec<Vec<f32>>; 3]> {
    let width = slots.vocabulary();
    let mut found = [(); 3].map(|()| Vec::new());
    let rows = |scores: &[f32]| scores.chunks_exact(width).map(<[f32]>::to_vec).collect::<Vec<_>>();
    for text in texts {
        slots.read_whole(&text.ids, |_, scores| {
            found[0].extend(rows(scores));
            Ok(())
        })?;
        let half = text.len() / 2;
        slots.read_whole(&text.ids[..half], |_, scores| {
            found[1].extend(rows(scores));
            Ok(())
        })?;
        for at in half..text.len() {
            let ids = [i64::from(text.ids[at])];
            found[1].extend(rows(slots.read(SlotRead {
                slots: &(0..1),
                ids: &ids,
                lengths: &[at],
                asked: &[0],
            })?));
        }
    }
    // the one with the most left to read first, so that those that still read are the first slots
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(texts[i].len().div_ceil(2)));
    let mut of_texts = vec![Vec::new(); texts.len()];
    for (slot, &i) in order.iter().enumerate() {
        let half: Vec<i64> = texts[i].ids[..texts[i].len() / 2].iter().map(|&id| i64::from(id)).collect();
        let asked: Vec<i64> = (0..half.len() as i64).collect();
        let reading = SlotRead { slots: &(slot..slot + 1), ids: &half, lengths: &[0], asked: &asked };
        of_texts[i].extend(rows(slots.read(reading)?));
    }
    loop {
        let left = order.iter().take_while(|&&i| of_texts[i].len() < texts[i].len()).count();
        if left == 0 {
            break;
        }
        let lengths: Vec<usize> = order[..left].iter().map(|&i| of_texts[i].len()).collect();
        let ids: Vec<i64> =
            order[..left].iter().zip(&lengths).map(|(&i, &at)| i64::from(texts[i].ids[at])).collect();
        let scores =
            rows(slots.read(SlotRead { slots: &(0..left), ids: &ids, lengths: &lengths, asked: &[0] })?);
        anyhow::ensure!(scores.len() == left, "{} rows of scores for {left} slots", scores.len());
        order[..left].iter().zip(scores).for_each(|(&i, row)| of_texts[i].push(row));
    }
    found[2] = of_texts.concat();
    Ok(found)
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
    let rows: Vec<Vec<f32>> = scores.array.rows().into_iter().map(|row| row.to_vec()).collect();
    let asked = texts.len() * (end - start);
    anyhow::ensure!(rows.len() == asked, "{} rows of scores for {asked} tokens", rows.len());
    let of_texts = rows.chunks(end - start).zip(texts);
    Ok(of_texts.map(|(rows, text)| rows[(width - text.len()).saturating_sub(start)..].to_vec()).collect())
}
