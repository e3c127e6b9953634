//! Texts → a byte-level BPE of their own, as GPT-2's.

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, TokenizerImpl};

use super::byte_level::END;
use crate::Result;

/// The tokenizer.json of a vocabulary of at most `vocab_size` tokens: the end of a text, all bytes, and the most
/// frequent pairs, merged again and again (Sennrich et al. 2016, arXiv:1508.07909).
pub(super) fn tokenizer_json<S: AsRef<str> + Send + Sync>(texts: &[S], vocab_size: usize) -> Result<String> {
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel> =
        TokenizerImpl::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(byte_level));
    tokenizer.with_post_processor(Some(ByteLevel::new(true, false, true)));
    tokenizer.with_decoder(Some(byte_level));
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END, true)])
        .build();
    let of = |error: tokenizers::Error| anyhow::anyhow!(error).context("training a tokenizer");
    tokenizer.train(&mut trainer, texts.iter().map(AsRef::as_ref)).map_err(of)?;
    tokenizer.to_string(true).map_err(of)
}
