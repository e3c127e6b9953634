//! `generation_config.json` of a model that is trained on.

use std::path::Path;

use anyhow::Context;
use serde_json::json;

use super::CausalLm;
use crate::Result;
use crate::generate::prompt::{self, GENERATION_CONFIG};
use crate::model::token_ids;
use crate::say::Say;

/// What generation_config.json says of the trained model: what it said of the model that training started from, and that
/// texts end by the token that they are learnt to end by. None where there was none. Of a vocabulary that was trained
/// anew it keeps no token.
pub(super) fn of_trained(model: &Path, lm: &CausalLm, trained: bool, say: &Say) -> Result<Option<String>> {
    let Some(mut fields) = prompt::read(model)? else { return Ok(None) };
    let path = model.join(GENERATION_CONFIG);
    if trained {
        let of_tokens = ["token_id", "_tokens", "_words_ids", "decoder_ids", "sequence_bias"];
        fields.retain(|key, _| key.starts_with("m") || !of_tokens.iter().any(|part| key.ends_with(part)));
        for key in ["bos_token_id", "pad_token_id"] {
            fields.insert(key.to_owned(), json!(lm.start));
        }
    }
    token_ids::check(&fields, lm.vocabulary).with_context(|| path.display().to_string())?;
    let mut ends = token_ids::read(&fields, "eos_token_id", lm.vocabulary)?.unwrap_or_default();
    if let Some(&end) = lm.ends.first()
        && !ends.contains(&end)
    {
        if !trained {
            say.line(format!(
                "{}: {end}, which texts are learnt to end by, is added to eos_token_id",
                path.display()
            ));
        }
        ends.push(end);
        let ends = if let [end] = ends[..] { json!(end) } else { json!(ends) };
        fields.insert("eos_token_id".to_owned(), ends);
    }
    Ok(Some(serde_json::to_string_pretty(&fields)? + "\n"))
}
