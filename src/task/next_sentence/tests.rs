use std::collections::HashSet;
use std::path::Path;

use super::*;
use crate::data::tokens::{Tokenizer, Vocabulary};

/// Five documents of sentences whose words say where they stand: `d2s3w1` is a word of the fourth sentence of the third.
fn texts() -> Vec<String> {
    let sentence = |d: usize, s: usize| {
        let words = (0..3 + (d + 2 * s) % 5).map(|w| {
            format!(
                "{}{}{}",
                "abcde".as_bytes()[d] as char,
                (s as u8 + b'a') as char,
                (w as u8 + b'a') as char
            )
        });
        let mut sentence = words.collect::<Vec<_>>().join(" ");
        sentence[..1].make_ascii_uppercase();
        sentence + "."
    };
    (0..5).map(|d| (0..4 + 3 * d).map(|s| sentence(d, s)).collect::<Vec<_>>().join(" ")).collect()
}

fn tokenizer(texts: &[String]) -> Tokenizer {
    Tokenizer::train(Vocabulary::WordPiece, texts, 400).unwrap()
}

/// The text of tokens, without what marks that they go on.
fn said(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    tokenizer.inner().decode(ids, true).unwrap()
}

#[test]
fn half_of_the_second_texts_follow_and_the_others_are_of_other_documents() {
    let texts = texts();
    let mut tokenizer = tokenizer(&texts);
    tokenizer.check_fits(400, Some(2)).unwrap();
    let chunks = Corpus::new(&texts, &Path::new("x").into(), &tokenizer).unwrap().chunks(40).unwrap();
    let (mut following, mut all) = (0, 0);
    let mut seen = HashSet::new();
    for chunk in &chunks {
        for key in 0..200 {
            let Pair { encoding, words, follows } = chunk.pair(mix(key)).unwrap();
            assert!(encoding.len() <= 40 && encoding.len() == words.len());
            assert!(encoding.len() <= chunk.most_tokens());
            let second = encoding.type_ids.iter().position(|&kind| kind == 1).unwrap();
            let (first, second) = (&encoding.ids[..second], &encoding.ids[second..]);
            let (first, second) = (said(&tokenizer, first), said(&tokenizer, second));
            let document = |text: &str| text.chars().next().unwrap();
            assert!(!first.is_empty() && !second.is_empty());
            if follows {
                assert_eq!(document(&first), document(&second), "{first} | {second}");
                let together = texts.iter().any(|text| {
                    let text = text.to_lowercase();
                    text.contains(&format!("{first} {second}"))
                });
                assert!(together, "{first} | {second}");
            } else {
                assert_ne!(document(&first), document(&second), "{first} | {second}");
            }
            following += usize::from(follows);
            all += 1;
            seen.insert((first, second));
        }
    }
    let share = following as f64 / all as f64;
    assert!((share - 0.5).abs() < 0.03, "{following} of {all}");
    assert!(seen.len() > 20 * chunks.len(), "{} pairs of {} chunks", seen.len(), chunks.len());
}

#[test]
fn every_token_stands_in_a_chunk_and_a_key_repeats_a_pair() {
    let texts = texts();
    let tokenizer = tokenizer(&texts);
    let corpus = Corpus::new(&texts, &Path::new("x").into(), &tokenizer).unwrap();
    let total: usize = texts.iter().map(|text| tokenizer.body(text).unwrap().ids.len()).sum();
    let chunks = corpus.chunks(23).unwrap();
    let tokens: usize = chunks.iter().map(|chunk| chunk.most_tokens() - 3).sum();
    assert!(tokens >= total, "{tokens} of {total}");
    let (one, two) = (chunks[1].pair(7).unwrap(), chunks[1].pair(7).unwrap());
    assert_eq!((one.encoding, one.words, one.follows), (two.encoding, two.words, two.follows));
}

#[test]
fn one_document_or_no_room_is_refused() {
    let tokenizer = tokenizer(&texts());
    let corpus = |texts: &[&str]| {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        Corpus::new(&texts, &Path::new("x.txt").into(), &tokenizer)
    };
    let refused = |texts: &[&str]| corpus(texts).err().unwrap().to_string();
    assert!(refused(&["one document", "", " "]).contains("1 documents with text, two at least"));
    assert!(refused(&["a", "b"]).contains("no document has two tokens"));
    assert!(corpus(&["a b", "c d"]).unwrap().chunks(4).err().unwrap().to_string().contains("no room"));
    assert_eq!(corpus(&["a b", "c"]).unwrap().chunks(5).unwrap().len(), 1);
}
