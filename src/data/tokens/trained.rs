//! Texts → a vocabulary of their own: GPT-2's byte-level BPE, RoBERTa's, or BERT's WordPiece.

use std::collections::HashMap;

use ahash::{AHashMap, RandomState};
use compact_str::CompactString;
use serde_json::{Map, Value, json};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer, Tokenizer,
};

use super::byte_level::END;
use crate::data::in_order;
use crate::{Result, bail_unusable};

/// What kind of vocabulary a family's models have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vocabulary {
    /// The end of a text, all bytes, and the most frequent pairs, merged again and again (Sennrich et al. 2016,
    /// arXiv:1508.07909).
    Gpt2,
    /// The same behind RoBERTa's special tokens.
    Roberta,
    /// BERT's special tokens, characters, and pieces of lower-cased words; accents are stripped.
    WordPiece,
}

/// RoBERTa's special tokens, in the order of their ids.
const OF_ROBERTA: [&str; 5] = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"];
/// BERT's.
const OF_BERT: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

impl Vocabulary {
    /// The tokens in front of those that are learnt.
    fn special(self) -> &'static [&'static str] {
        match self {
            Self::Gpt2 => &[END],
            Self::Roberta => &OF_ROBERTA,
            Self::WordPiece => &OF_BERT,
        }
    }

    /// What config.json says of the special tokens.
    pub fn ids(self) -> &'static [(&'static str, u32)] {
        match self {
            Self::Gpt2 => &[("bos_token_id", 0), ("eos_token_id", 0), ("pad_token_id", 0)],
            Self::Roberta => &[("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2)],
            Self::WordPiece => &[("pad_token_id", 0)],
        }
    }

    /// What tokenizer_config.json says of it.
    pub(super) fn settings(self) -> Map<String, Value> {
        let says = match self {
            Self::Gpt2 => json!({}),
            Self::Roberta => json!({
                "tokenizer_class": "RobertaTokenizer", "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>",
                "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
            }),
            Self::WordPiece => json!({
                "tokenizer_class": "BertTokenizer", "do_lower_case": true, "cls_token": "[CLS]", "sep_token": "[SEP]",
                "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]",
            }),
        };
        says.as_object().cloned().unwrap_or_default()
    }

    /// The fewest tokens that hold what stands in every such vocabulary.
    fn least(self) -> usize {
        match self {
            Self::Gpt2 | Self::Roberta => self.special().len() + 256,
            Self::WordPiece => self.special().len() + 1,
        }
    }

    /// The tokenizer.json of a vocabulary of at most `size` tokens, learnt from texts.
    ///
    /// # Errors
    /// Unusable: a size with no room for what stands in every one.
    pub(super) fn tokenizer_json<S: AsRef<str> + Send + Sync>(
        self,
        texts: &[S],
        size: usize,
    ) -> Result<String> {
        let least = self.least();
        if size < least {
            bail_unusable!(
                "vocab_size {size} has no room for {}: {least} at least",
                match self {
                    Self::Gpt2 => "the 256 bytes and the end of a text",
                    Self::Roberta => "the 256 bytes and the special tokens",
                    Self::WordPiece => "the special tokens and a letter",
                }
            );
        }
        let special: Vec<AddedToken> = self
            .special()
            .iter()
            .map(|token| AddedToken::from(*token, true).lstrip(*token == "<mask>"))
            .collect();
        let mut tokenizer = match self {
            Self::Gpt2 | Self::Roberta => Tokenizer::new(BPE::default()),
            Self::WordPiece => {
                let model = WordPiece::builder().unk_token("[UNK]".to_owned()).build();
                Tokenizer::new(model.map_err(|error| anyhow::anyhow!(error))?)
            }
        };
        let of = |error: tokenizers::Error| anyhow::anyhow!(error).context("training a tokenizer");
        let ends: PostProcessorWrapper = match self {
            Self::Gpt2 | Self::Roberta => {
                let bytes = ByteLevel::new(false, true, true);
                tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
                let mut trainer: TrainerWrapper = BpeTrainer::builder()
                    .show_progress(false)
                    .vocab_size(size)
                    .min_frequency(2)
                    .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
                    .special_tokens(special)
                    .build()
                    .into();
                tokenizer.train(&mut trainer, texts.iter().map(AsRef::as_ref)).map_err(of)?;
                match self {
                    Self::Gpt2 => ByteLevel::new(true, false, true).into(),
                    _ => RobertaProcessing::new(("</s>".to_owned(), 2), ("<s>".to_owned(), 0))
                        .add_prefix_space(false)
                        .into(),
                }
            }
            Self::WordPiece => {
                let lower_cased = BertNormalizer::new(true, true, None, true);
                tokenizer.with_normalizer(Some(lower_cased)).map_err(|error| anyhow::anyhow!(error))?;
                tokenizer
                    .with_pre_tokenizer(Some(BertPreTokenizer))
                    .with_decoder(Some(DecoderWrapper::from(WordPieceDecoder::default())));
                let words = words(&tokenizer, texts).map_err(of)?;
                tokenizer.with_model(word_pieces(&words, &special, size).map_err(of)?);
                tokenizer.add_special_tokens(special).map_err(of)?;
                BertProcessing::new(("[SEP]".to_owned(), 3), ("[CLS]".to_owned(), 2)).into()
            }
        };
        tokenizer.with_post_processor(Some(ends));
        tokenizer.to_string(true).map_err(of)
    }
}

/// How often each word stands in texts. The map's order is the same in every run.
fn words<S: AsRef<str> + Sync>(
    tokenizer: &Tokenizer,
    texts: &[S],
) -> tokenizers::Result<AHashMap<CompactString, u64>> {
    let words_of = |text: &S| -> tokenizers::Result<Vec<CompactString>> {
        let mut text = NormalizedString::from(text.as_ref());
        tokenizer.get_normalizer().map_or(Ok(()), |normalizer| normalizer.normalize(&mut text))?;
        let mut text = PreTokenizedString::from(text);
        tokenizer.get_pre_tokenizer().map_or(Ok(()), |cut| cut.pre_tokenize(&mut text))?;
        let parts = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(parts.into_iter().map(|(word, ..)| word.into()).collect())
    };
    let mut counts = HashMap::with_hasher(RandomState::with_seeds(1, 2, 3, 4));
    in_order(texts, words_of, |_, words| {
        for word in words.map_err(|error| anyhow::anyhow!(error))? {
            *counts.entry(word).or_default() += 1;
        }
        Ok(())
    })?;
    Ok(counts.into())
}

/// The pieces that the library's `WordPieceTrainer` learns. That one counts words in a map whose order is another one in
/// every run, numbers the pieces of one letter in this order, and by their numbers decides between pairs that are as
/// frequent.
fn word_pieces(
    words: &AHashMap<CompactString, u64>,
    special: &[AddedToken],
    size: usize,
) -> tokenizers::Result<WordPiece> {
    let mut pairs = BPE::default();
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(size)
        .min_frequency(2)
        .special_tokens(special.to_vec())
        .continuing_subword_prefix("##".to_owned());
    trainer.build().do_train(words, &mut pairs)?;
    Ok(WordPiece::from_bpe(&pairs))
}
