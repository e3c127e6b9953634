//! Documents → pairs of texts, of which the second follows the first or is another document's (Devlin et al. 2018,
//! arXiv:1810.04805, A.2).
//!
//! Documents are cut into chunks once. Where a chunk parts into two texts, whether the second is its own, and which other
//! one stands for it, is drawn anew at every step. A second text begins with a sentence and has about as many tokens
//! either way; where the chunk ends its document, it ends one too. So neither length nor place tells.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use unicode_segmentation::UnicodeSegmentation;

use crate::data::batch::Encoding;
use crate::data::cache::Key;
use crate::data::records::Files;
use crate::data::tokens::Tokenizer;
use crate::task::masked_lm::below;
use crate::{Result, bail_unusable};

/// Documents, as tokens.
pub struct Corpus {
    documents: Vec<Document>,
    tokenizer: Tokenizer,
}

/// One document.
#[derive(Serialize, Deserialize)]
struct Document {
    /// (T)
    ids: Vec<u32>,
    /// (T): the word of each.
    words: Vec<usize>,
    /// The tokens that sentences begin with, the first among them.
    sentences: Vec<usize>,
}

/// Tokens of a document that part into two texts.
#[derive(Clone)]
pub struct Chunk {
    corpus: Arc<Corpus>,
    document: usize,
    tokens: Range<usize>,
}

/// Two texts.
pub struct Pair {
    pub encoding: Encoding,
    /// (T): the word that each token is of, none of what the tokenizer puts around texts.
    pub words: Vec<Option<u32>>,
    /// Whether the second follows the first.
    pub follows: bool,
}

impl Document {
    fn new(text: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let pieces = tokenizer.pieces(text)?;
        let mut sentences = Vec::new();
        let mut at = 0;
        for (start, _) in text.split_sentence_bound_indices() {
            while pieces.spans.get(at).is_some_and(|span| span.start < start) {
                at += 1;
            }
            if at < pieces.ids.len() && sentences.last() != Some(&at) {
                sentences.push(at);
            }
        }
        Ok(Self { ids: pieces.ids, words: pieces.words, sentences })
    }

    /// The first token from `at` to before `end` that a word begins with; `at` itself where there is none.
    fn word_from(&self, at: usize, end: usize) -> usize {
        (at..end).find(|&i| i == 0 || self.words[i] != self.words[i - 1]).unwrap_or(at)
    }

    /// The sentences that begin inside of some tokens.
    fn sentences(&self, tokens: &Range<usize>) -> &[usize] {
        let first = self.sentences.partition_point(|&at| at <= tokens.start);
        let end = self.sentences.partition_point(|&at| at < tokens.end);
        &self.sentences[first.min(end)..end]
    }
}

impl Corpus {
    /// Tokenizes documents; those without tokens are left out.
    ///
    /// # Errors
    /// Unusable: fewer than two documents, or none of two tokens: no second text could be another's.
    pub fn new(texts: &[String], files: &Files, tokenizer: &Tokenizer) -> Result<Self> {
        let mut documents: Vec<Document> = Vec::new();
        let own = |text: &String, key: &mut Key| key.add(Some(text));
        let document = |text: &String| Document::new(text, tokenizer);
        tokenizer.in_order("sentences", texts, own, document, |_, document| {
            documents.extend(Some(document?).filter(|document| !document.ids.is_empty()));
            Ok(())
        })?;
        if documents.len() < 2 {
            bail_unusable!(
                "{files}: {} documents with text, two at least are needed: a second text is often another document's. In a \
                 .txt file a blank line stands between documents (--text-unit)",
                documents.len()
            );
        }
        if documents.iter().all(|document| document.ids.len() < 2) {
            bail_unusable!("{files}: no document has two tokens, one for each text of a pair");
        }
        Ok(Self { documents, tokenizer: tokenizer.clone() })
    }

    /// Chunks of at most `max_length` tokens with those that the tokenizer puts around a pair. One that is cut inside a
    /// sentence is followed by one that begins with it.
    ///
    /// # Errors
    /// Unusable: no room for a token of each text.
    pub fn chunks(self, max_length: usize) -> Result<Vec<Chunk>> {
        let frame = self.tokenizer.frame_of_pair();
        let room = max_length.saturating_sub(frame);
        if room < 2 {
            bail_unusable!(
                "--max-length {max_length} has no room for a token of each text beside {frame} special ones"
            );
        }
        let corpus = Arc::new(self);
        let mut chunks = Vec::new();
        for (i, document) in corpus.documents.iter().enumerate() {
            let mut start = 0;
            loop {
                let end = document.ids.len().min(start + room);
                if end - start > 1 {
                    chunks.push(Chunk { corpus: corpus.clone(), document: i, tokens: start..end });
                }
                if end == document.ids.len() {
                    break;
                }
                let last = document.sentences(&(start..end + 1)).last();
                start = last.copied().unwrap_or(end);
            }
        }
        Ok(chunks)
    }
}

impl Chunk {
    /// The pair that a key draws.
    ///
    /// # Errors
    /// The tokenizer's post-processor fails.
    pub fn pair(&self, key: u64) -> Result<Pair> {
        let mut rng = ChaCha8Rng::seed_from_u64(key);
        let own = &self.corpus.documents[self.document];
        let (start, end) = (self.tokens.start, self.tokens.end);
        let splits = own.sentences(&self.tokens);
        let split = match splits.len() {
            0 => own.word_from(start + (end - start) / 2, end),
            n => splits[below(&mut rng, n)],
        };
        let follows = rng.next_u64() & 1 == 0;
        let (other, second) = match follows {
            true => (self.document, split..end),
            false => self.other(end - split, &mut rng),
        };
        let other = &self.corpus.documents[other];
        let (first, second_ids) = (&own.ids[start..split], &other.ids[second.clone()]);
        let (encoding, texts) = self.corpus.tokenizer.framed_pair(first, second_ids)?;
        let mut of_texts = [own.words[start..split].iter(), other.words[second].iter()];
        let word =
            |text: &Option<usize>| text.and_then(|text| of_texts[text].next()).map(|&word| word as u32);
        Ok(Pair { words: texts.iter().map(word).collect(), encoding, follows })
    }

    /// About so many tokens of another document.
    fn other(&self, length: usize, rng: &mut impl Rng) -> (usize, Range<usize>) {
        let documents = &self.corpus.documents;
        let other = below(rng, documents.len() - 1);
        let other = if other < self.document { other } else { other + 1 };
        let document = &documents[other];
        let (sentences, tokens) = (&document.sentences, document.ids.len());
        if self.tokens.end == documents[self.document].ids.len() {
            let short = sentences.iter().find(|&&at| tokens - at <= length);
            let cut = || document.word_from(tokens.saturating_sub(length), tokens);
            return (other, short.copied().unwrap_or_else(cut)..tokens);
        }
        let long = sentences.partition_point(|&at| tokens - at >= length);
        let start = if long == 0 { 0 } else { sentences[below(rng, long)] };
        (other, start..tokens.min(start + length))
    }

    /// The most tokens of a pair that is drawn, with those around the texts.
    pub fn most_tokens(&self) -> usize {
        self.tokens.len() + self.corpus.tokenizer.frame_of_pair()
    }
}

impl PartialEq for Chunk {
    fn eq(&self, other: &Self) -> bool {
        let of = |chunk: &Self| (chunk.document, chunk.tokens.clone());
        Arc::ptr_eq(&self.corpus, &other.corpus) && of(self) == of(other)
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "tokens {:?} of document {}", self.tokens, self.document)
    }
}
