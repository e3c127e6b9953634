//! Exact match and F1 of answers, as SQuAD's official scripts count them (evaluate-v1.1.py and evaluate-v2.0.py).

/// How well a predicted answer meets one of several that are right, each from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Match {
    pub exact: f64,
    pub f1: f64,
}

impl Match {
    /// The better of each over the `right` answers. Where there is none, the question can't be answered, and "" is right;
    /// so it is where no right answer has a word, as in version 2.
    pub fn of(predicted: &str, right: &[String]) -> Self {
        let predicted = normalized(predicted);
        let right: Vec<String> =
            right.iter().map(|answer| normalized(answer)).filter(|a| !a.is_empty()).collect();
        if right.is_empty() {
            let same = f64::from(u8::from(predicted.is_empty()));
            return Self { exact: same, f1: same };
        }
        right.iter().fold(Self::default(), |best, right| Self {
            exact: best.exact.max(f64::from(u8::from(predicted == *right))),
            f1: best.f1.max(f1(&predicted, right)),
        })
    }
}

/// F1 of the words of two normalized answers, as bags.
fn f1(predicted: &str, right: &str) -> f64 {
    let (predicted, mut rest): (Vec<&str>, Vec<&str>) = (words(predicted).collect(), words(right).collect());
    let count = rest.len();
    let common = predicted
        .iter()
        .filter(|word| rest.iter().position(|other| other == *word).map(|at| rest.swap_remove(at)).is_some())
        .count() as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / predicted.len() as f64, common / count as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Lower case, without ASCII's punctuation and English articles, one space between words.
pub fn normalized(answer: &str) -> String {
    let lower = answer.to_lowercase();
    let mut text = String::with_capacity(lower.len());
    let mut word = String::new();
    // one more turn ends the last word
    for c in lower.chars().filter(|c| !c.is_ascii_punctuation()).map(Some).chain([None]) {
        match c {
            Some(c) if c.is_alphanumeric() => word.push(c),
            other => {
                match word.as_str() {
                    "a" | "an" | "the" => text.push(' '),
                    _ => text.push_str(&word),
                }
                word.clear();
                text.extend(other);
            }
        }
    }
    words(&text).collect::<Vec<_>>().join(" ")
}

/// Words between what Python's `str.split` takes for spaces: Unicode's, and ASCII's separators.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
        .filter(|word| !word.is_empty())
}

/// A question as it is measured, whatever the threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    /// How much likelier no answer is than the best one.
    pub null: f64,
    pub answerable: bool,
    /// Whether the best answer is one at all.
    pub answered: bool,
    /// How well it meets the right ones, from 0 to 1.
    pub score: f64,
}

/// What a threshold can reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// The highest mean.
    pub score: f64,
    /// The threshold that SQuAD's script gives for it: the last question's that is answered.
    pub at: f64,
    /// As far from that as from the next question's: rounding decides nothing.
    pub between: f64,
}

/// The highest mean that a threshold allows: a question is answered where [`Judged::null`] is not above it. What is not
/// answered is right where there is no answer.
pub fn best_threshold(questions: &[Judged]) -> Threshold {
    let mut order: Vec<&Judged> = questions.iter().collect();
    order.sort_by(|a, b| a.null.total_cmp(&b.null));
    let mut sum = questions.iter().filter(|question| !question.answerable).count() as f64;
    // how many are answered, from the surest
    let (mut best, mut answered) = (sum, 0);
    for (i, question) in order.iter().enumerate() {
        sum += match (question.answerable, question.answered) {
            (true, _) => question.score,
            (false, true) => -1.0,
            (false, false) => 0.0,
        };
        if sum > best {
            (best, answered) = (sum, i + 1);
        }
    }
    let null = |i: usize| order.get(i).map(|question| question.null);
    let last = answered.checked_sub(1).and_then(null);
    let between = match (last, null(answered)) {
        (Some(last), Some(next)) => (last + next) / 2.0,
        (Some(last), None) => last + 1.0,
        (None, Some(next)) => next - 1.0,
        (None, None) => 0.0,
    };
    Threshold { score: best / questions.len().max(1) as f64, at: last.unwrap_or(0.0), between }
}
