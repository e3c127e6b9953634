//! Questions' answers beside the right ones → what people look at.

use anyhow::Context;

use super::decode::answers;
use super::squad::Match;
use super::{Asked, QuestionAnswering, read};
use crate::Result;
use crate::task::review::{Review, Source, Wrong};

impl QuestionAnswering {
    /// What there is to see of the answers: those that are not exactly right.
    ///
    /// # Errors
    /// The records are others than those that were answered.
    pub(super) fn reviewed(&self, questions: &[Asked], of: Source) -> Result<Review> {
        let records = read(of.files, of.records)?;
        let mut wrong = Vec::new();
        for Asked { wanted, windows, loss } in questions {
            let found = answers(&wanted.context, windows, wanted.limits);
            let best = found.found.first();
            let said = match best {
                Some(best) if !self.says_none(&found) => &wanted.context[best.span.clone()],
                _ => "",
            };
            let how = Match::of(said, &wanted.right);
            if how.exact == 1.0 {
                continue;
            }
            let record = records.get(wanted.question).context("the records have changed")?;
            let or_none = |text: &str| if text.is_empty() { "no answer".to_owned() } else { text.to_owned() };
            wrong.push(Wrong {
                line: record.at.line,
                text: record.question.clone(),
                pair: Some(record.context.to_string()),
                wanted: or_none(&wanted.right.join(" | ")),
                found: or_none(said),
                score: Some(how.f1),
                loss: loss / windows.len() as f64,
            });
        }
        Ok(Review { scores: Some("F1"), ..Review::default() }.with_wrong(wrong))
    }
}
