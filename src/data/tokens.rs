//! Texts → token ids, by the tokenizer that stands in the model's directory.
