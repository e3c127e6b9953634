//! Token classification: a label a word, and entities of words.

pub mod decode;
pub mod entities;
pub mod labels;
pub mod metrics;
pub mod offsets;
pub mod scheme;
