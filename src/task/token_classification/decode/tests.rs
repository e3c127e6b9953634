use super::*;

/// Bytes, the token as the vocabulary has it, whether it is the unknown one, logits.
type Case = (Range<usize>, &'static str, bool, [f32; 5]);
/// Type or label, text, start and end in characters, score.
type Expected = (&'static str, &'static str, usize, usize, f32);

const LABELS: [&str; 5] = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"];

// What transformers 4.57.6 answers to these tokens: of a BERT with a small vocabulary, and of a RoBERTa.
const BERT_TEXT: &str = "Zoé Merkel saw New York 東!";
const BERT_PIECES: &[Case] = &[
    (0..1, "z", false, [-1.5, -2.0, 1.5, 0.0, 2.0]),
    (1..2, "##o", false, [-0.5, -0.5, 1.5, 2.0, 2.0]),
    (2..4, "##e", false, [1.5, 1.0, -1.0, -0.5, -1.0]),
    (5..6, "m", false, [2.0, 1.0, -2.0, -1.5, -1.0]),
    (6..8, "##er", false, [-2.0, 0.0, -2.0, 0.0, 1.5]),
    (8..9, "##k", false, [1.0, 1.0, 1.0, 1.5, -1.0]),
    (9..10, "##e", false, [0.5, -1.5, -2.0, -1.0, 1.5]),
    (10..11, "##l", false, [-0.5, 0.0, 1.0, 0.0, 1.0]),
    (12..13, "s", false, [2.0, 1.0, 0.5, 2.0, 1.0]),
    (13..14, "##a", false, [-0.5, 0.5, -2.0, 0.0, -1.0]),
    (14..15, "##w", false, [0.5, 2.0, -1.5, -0.5, 0.0]),
    (16..17, "n", false, [0.0, -1.5, -1.5, 1.5, 1.5]),
    (17..18, "##e", false, [-1.5, 0.5, -1.5, 1.0, -1.0]),
    (18..19, "##w", false, [-2.0, 0.0, 1.0, 1.0, -1.5]),
    (20..21, "y", false, [-2.0, -2.0, 1.0, 0.5, 2.0]),
    (21..22, "##o", false, [0.0, 2.0, -0.5, -2.0, 0.0]),
    (22..23, "##r", false, [-2.0, -1.5, -1.5, 2.0, -2.0]),
    (23..24, "##k", false, [-0.5, 1.0, 0.0, 0.0, -1.0]),
    (25..28, "[UNK]", true, [-2.0, 0.5, 0.5, 0.5, -1.0]),
    (28..29, "!", false, [1.0, 1.0, 1.5, 2.0, 1.0]),
];
const BERT: &[(Aggregation, &[Expected])] = &[
    (
        Aggregation::None,
        &[
            ("I-LOC", "Z", 0, 1, 0.558541),
            ("B-LOC", "o", 1, 2, 0.36092),
            ("I-LOC", "er", 5, 7, 0.663722),
            ("B-LOC", "k", 7, 8, 0.344628),
            ("I-LOC", "e", 8, 9, 0.653617),
            ("I-PER", "l", 9, 10, 0.337965),
            ("B-PER", "a", 12, 13, 0.438669),
            ("B-PER", "w", 13, 14, 0.679926),
            ("B-LOC", "N", 15, 16, 0.430533),
            ("B-LOC", "e", 16, 17, 0.524649),
            ("I-PER", "w", 17, 18, 0.40004),
            ("I-LOC", "Y", 19, 20, 0.614386),
            ("B-PER", "o", 20, 21, 0.729357),
            ("B-LOC", "r", 21, 22, 0.911555),
            ("B-PER", "k", 22, 23, 0.477504),
            ("B-PER", "東", 24, 25, 0.302552),
            ("B-LOC", "!", 25, 26, 0.368981),
        ],
    ),
    (
        Aggregation::Simple,
        &[
            ("LOC", "Z", 0, 1, 0.558541),
            ("LOC", "o", 1, 2, 0.36092),
            ("LOC", "er", 5, 7, 0.663722),
            ("LOC", "ke", 7, 9, 0.499122),
            ("PER", "l", 9, 10, 0.337965),
            ("PER", "a", 12, 13, 0.438669),
            ("PER", "w", 13, 14, 0.679926),
            ("LOC", "N", 15, 16, 0.430533),
            ("LOC", "e", 16, 17, 0.524649),
            ("PER", "w", 17, 18, 0.40004),
            ("LOC", "Y", 19, 20, 0.614386),
            ("PER", "o", 20, 21, 0.729357),
            ("LOC", "r", 21, 22, 0.911555),
            ("PER", "k", 22, 23, 0.477504),
            ("PER", "東", 24, 25, 0.302552),
            ("LOC", "!", 25, 26, 0.368981),
        ],
    ),
    (
        Aggregation::First,
        &[
            ("LOC", "Zoé", 0, 3, 0.558541),
            ("LOC", "New York", 15, 23, 0.522459),
            ("PER", "東", 24, 25, 0.302552),
            ("LOC", "!", 25, 26, 0.368981),
        ],
    ),
    (
        Aggregation::Average,
        &[
            ("LOC", "Zoé Merkel", 0, 10, 0.332176),
            ("PER", "saw", 11, 14, 0.414308),
            ("LOC", "New", 15, 18, 0.451741),
            ("PER", "York", 19, 23, 0.31141),
            ("PER", "東", 24, 25, 0.302552),
            ("LOC", "!", 25, 26, 0.368981),
        ],
    ),
    (
        Aggregation::Max,
        &[
            ("LOC", "Zoé", 0, 3, 0.558541),
            ("PER", "saw", 11, 14, 0.679926),
            ("LOC", "New", 15, 18, 0.524649),
            ("LOC", "York", 19, 23, 0.911555),
            ("PER", "東", 24, 25, 0.302552),
            ("LOC", "!", 25, 26, 0.368981),
        ],
    ),
];
const ROBERTA_TEXT: &str = "Zoé Merkel saw New\nYork 東!";
const ROBERTA_PIECES: &[Case] = &[
    (0..0, "Ġ", false, [-1.5, -2.0, 1.5, 0.0, 2.0]),
    (0..1, "Z", false, [-0.5, -0.5, 1.5, 2.0, 2.0]),
    (1..2, "o", false, [1.5, 1.0, -1.0, -0.5, -1.0]),
    (2..4, "Ã", false, [2.0, 1.0, -2.0, -1.5, -1.0]),
    (2..4, "©", false, [-2.0, 0.0, -2.0, 0.0, 1.5]),
    (5..5, "Ġ", false, [1.0, 1.0, 1.0, 1.5, -1.0]),
    (5..6, "M", false, [0.5, -1.5, -2.0, -1.0, 1.5]),
    (6..8, "er", false, [-0.5, 0.0, 1.0, 0.0, 1.0]),
    (8..9, "k", false, [2.0, 1.0, 0.5, 2.0, 1.0]),
    (9..10, "e", false, [-0.5, 0.5, -2.0, 0.0, -1.0]),
    (10..11, "l", false, [0.5, 2.0, -1.5, -0.5, 0.0]),
    (12..13, "Ġs", false, [0.0, -1.5, -1.5, 1.5, 1.5]),
    (13..14, "a", false, [-1.5, 0.5, -1.5, 1.0, -1.0]),
    (14..15, "w", false, [-2.0, 0.0, 1.0, 1.0, -1.5]),
    (16..16, "Ġ", false, [-2.0, -2.0, 1.0, 0.5, 2.0]),
    (16..17, "N", false, [0.0, 2.0, -0.5, -2.0, 0.0]),
    (17..18, "e", false, [-2.0, -1.5, -1.5, 2.0, -2.0]),
    (18..19, "w", false, [-0.5, 1.0, 0.0, 0.0, -1.0]),
    (19..20, "Ċ", false, [-2.0, 0.5, 0.5, 0.5, -1.0]),
    (20..21, "Y", false, [1.0, 1.0, 1.5, 2.0, 1.0]),
    (21..23, "or", false, [2.0, -1.5, 2.0, 0.0, 1.0]),
    (23..24, "k", false, [-0.5, 0.0, 1.0, 0.0, 2.0]),
    (25..25, "Ġ", false, [0.0, 2.0, 0.5, -2.0, 1.0]),
    (25..28, "æ", false, [0.5, -2.0, 1.0, -1.0, -2.0]),
    (25..28, "Ŀ", false, [0.5, 1.5, 0.5, 0.5, 0.0]),
    (25..28, "±", false, [1.5, -2.0, -2.0, -2.0, 0.5]),
    (28..29, "!", false, [0.0, 1.5, 0.0, 0.5, -1.0]),
];
const ROBERTA: &[(Aggregation, &[Expected])] = &[
    (
        Aggregation::None,
        &[
            ("I-LOC", "", 0, 0, 0.558541),
            ("B-LOC", "Z", 0, 1, 0.36092),
            ("I-LOC", "é", 2, 3, 0.663722),
            ("B-LOC", "", 4, 4, 0.344628),
            ("I-LOC", "M", 4, 5, 0.653617),
            ("I-PER", "er", 5, 7, 0.337965),
            ("B-PER", "e", 8, 9, 0.438669),
            ("B-PER", "l", 9, 10, 0.679926),
            ("B-LOC", "s", 11, 12, 0.430533),
            ("B-LOC", "a", 12, 13, 0.524649),
            ("I-PER", "w", 13, 14, 0.40004),
            ("I-LOC", "", 15, 15, 0.614386),
            ("B-PER", "N", 15, 16, 0.729357),
            ("B-LOC", "e", 16, 17, 0.911555),
            ("B-PER", "w", 17, 18, 0.477504),
            ("B-PER", "\n", 18, 19, 0.302552),
            ("B-LOC", "Y", 19, 20, 0.368981),
            ("I-LOC", "k", 22, 23, 0.581181),
            ("B-PER", "", 24, 24, 0.573177),
            ("I-PER", "東", 24, 25, 0.543053),
            ("B-PER", "東", 24, 25, 0.429781),
            ("B-PER", "!", 25, 26, 0.527364),
        ],
    ),
    (
        Aggregation::Simple,
        &[
            ("LOC", "", 0, 0, 0.558541),
            ("LOC", "Z", 0, 1, 0.36092),
            ("LOC", "é", 2, 3, 0.663722),
            ("LOC", "M", 4, 5, 0.499122),
            ("PER", "er", 5, 7, 0.337965),
            ("PER", "e", 8, 9, 0.438669),
            ("PER", "l", 9, 10, 0.679926),
            ("LOC", "s", 11, 12, 0.430533),
            ("LOC", "a", 12, 13, 0.524649),
            ("PER", "w", 13, 14, 0.40004),
            ("LOC", "", 15, 15, 0.614386),
            ("PER", "N", 15, 16, 0.729357),
            ("LOC", "e", 16, 17, 0.911555),
            ("PER", "w", 17, 18, 0.477504),
            ("PER", "\n", 18, 19, 0.302552),
            ("LOC", "Y", 19, 20, 0.368981),
            ("LOC", "k", 22, 23, 0.581181),
            ("PER", "東", 24, 25, 0.558115),
            ("PER", "東", 24, 25, 0.429781),
            ("PER", "!", 25, 26, 0.527364),
        ],
    ),
    (
        Aggregation::First,
        &[
            ("LOC", "", 0, 0, 0.558541),
            ("LOC", "Zoé", 0, 3, 0.36092),
            ("LOC", "Merkel", 4, 10, 0.499122),
            ("LOC", "saw ", 11, 15, 0.522459),
            ("PER", "New\nYork", 15, 23, 0.729357),
            ("PER", "東", 24, 25, 0.558115),
            ("PER", "東", 24, 25, 0.429781),
        ],
    ),
    (
        Aggregation::Average,
        &[
            ("LOC", "", 0, 0, 0.558541),
            ("LOC", "", 4, 4, 0.344628),
            ("PER", "Merkel", 4, 10, 0.279959),
            ("LOC", "saw ", 11, 15, 0.533063),
            ("LOC", "New\nYork", 15, 23, 0.272026),
            ("PER", "東", 24, 25, 0.558115),
            ("PER", "東", 24, 25, 0.429781),
        ],
    ),
    (
        Aggregation::Max,
        &[
            ("LOC", "", 0, 0, 0.558541),
            ("LOC", "", 4, 4, 0.344628),
            ("PER", "Merkel", 4, 10, 0.679926),
            ("LOC", "saw ", 11, 15, 0.569518),
            ("LOC", "New\nYork", 15, 23, 0.911555),
            ("PER", "東", 24, 25, 0.558115),
            ("PER", "東", 24, 25, 0.429781),
        ],
    ),
];

fn names(labels: &[&str]) -> Vec<String> {
    labels.iter().map(|label| (*label).to_owned()).collect()
}

fn pieces<'a>(text: &str, cases: &'a [Case], marks: bool) -> Vec<Piece<'a>> {
    let piece = |(span, token, unknown, logits): &'a Case| Piece {
        span: span.clone(),
        continues: continues(text, span, token, marks, *unknown),
        word: None,
        logits,
    };
    cases.iter().map(piece).collect()
}

#[test]
fn entities_are_those_of_transformers() {
    for (text, cases, marks, expected) in
        [(BERT_TEXT, BERT_PIECES, true, BERT), (ROBERTA_TEXT, ROBERTA_PIECES, false, ROBERTA)]
    {
        let pieces = pieces(text, cases, marks);
        for (aggregation, expected) in expected {
            let found =
                entities(text, &pieces, &names(&LABELS), Scheme::Iob2, *aggregation, OffsetUnit::Char);
            let shown: Vec<_> =
                found.iter().map(|f| (f.entity.as_str(), f.text.as_str(), f.start, f.end)).collect();
            let wanted: Vec<_> = expected.iter().map(|e| (e.0, e.1, e.2, e.3)).collect();
            assert_eq!(shown, wanted, "{aggregation:?}");
            for (found, expected) in found.iter().zip(*expected) {
                assert!((found.score - expected.4).abs() < 2e-6, "{found:?} {}", expected.4);
            }
        }
    }
}

#[test]
fn offsets_are_in_the_asked_unit_and_the_text_is_a_slice() {
    let pieces = pieces(BERT_TEXT, BERT_PIECES, true);
    for (unit, start, end) in
        [(OffsetUnit::Byte, 16, 24), (OffsetUnit::Char, 15, 23), (OffsetUnit::Utf16, 15, 23)]
    {
        let found = entities(BERT_TEXT, &pieces, &names(&LABELS), Scheme::Iob2, Aggregation::First, unit);
        assert_eq!((found[1].text.as_str(), found[1].start, found[1].end), ("New York", start, end));
    }
    let json =
        serde_json::json!(Found { entity: "PER".into(), text: "a".into(), start: 0, end: 1, score: 0.5 });
    assert_eq!(json.to_string(), r#"{"entity":"PER","text":"a","start":0,"end":1,"score":0.5}"#);
}

/// A token each with a label that is sure, spans of one letter.
fn sure(labels: &[usize], of: usize) -> Vec<Vec<f32>> {
    labels.iter().map(|&label| (0..of).map(|i| if i == label { 9.0 } else { 0.0 }).collect()).collect()
}

fn grouped_as(labels: &[&str], scheme: Scheme) -> String {
    let known = names(labels);
    let logits = sure(&(0..labels.len()).collect::<Vec<_>>(), labels.len());
    let text = "abcdefgh";
    let piece = |(i, logits)| Piece { span: i..i + 1, continues: false, word: None, logits };
    let pieces: Vec<Piece> = logits.iter().map(Vec::as_slice).enumerate().map(piece).collect();
    let found = entities(text, &pieces, &known, scheme, Aggregation::Simple, OffsetUnit::Byte);
    found.iter().map(|f| format!("{}:{}", f.entity, f.text)).collect::<Vec<_>>().join(" ")
}

#[test]
fn prefixes_of_bioes_begin_and_end_entities() {
    let labels = ["B-PER", "I-PER", "E-PER", "S-PER", "O", "B-LOC", "S-LOC"];
    assert_eq!(grouped_as(&labels, Scheme::Bioes), "PER:abc PER:d LOC:f LOC:g");
    let labels = ["B-PER", "L-PER", "U-PER", "I-PER"];
    assert_eq!(grouped_as(&labels, Scheme::Bioes), "PER:ab PER:c PER:d");
}

#[test]
fn labels_without_a_prefix_group_with_their_like() {
    assert_eq!(
        grouped_as(&["NOUN", "B-NOUN", "I-NOUN", "O", "X-Y", "I-X-Y"], Scheme::None),
        "NOUN:a NOUN:bc Y:ef"
    );
}

#[test]
fn a_word_has_one_tag_and_one_without_tokens_has_none() {
    let logits = [[0.0, 1.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.0, 9.0], [2.0, 0.0, 0.0]];
    let words = [Some(0), Some(0), None, Some(2)];
    let piece = |(logits, word): (&'static [f32; 3], _)| Piece { span: 0..0, continues: false, word, logits };
    let logits: &'static [[f32; 3]; 4] = Box::leak(Box::new(logits));
    let pieces: Vec<Piece> = logits.iter().zip(words).map(piece).collect();
    assert_eq!(tags(&pieces, 4, Aggregation::First), [Some(1), None, Some(0), None]);
    assert_eq!(tags(&pieces, 4, Aggregation::Max), [Some(2), None, Some(0), None]);
    assert_eq!(tags(&pieces, 4, Aggregation::Average), [Some(2), None, Some(0), None]);
    assert_eq!(tags(&pieces, 1, Aggregation::None), [Some(1)]);
}

#[test]
fn spans_that_part_a_character_or_leave_the_text_are_widened() {
    let logits = [0.0_f32, 1.0];
    for span in [1..2, 0..99, Range { start: 2, end: 1 }, 99..100] {
        let piece = Piece { span: span.clone(), continues: true, word: None, logits: &logits };
        continues("\u{1f600}", &span, "x", true, false);
        continues("\u{1f600}", &span, "x", false, false);
        let found = entities(
            "\u{1f600}",
            &[piece],
            &names(&["O", "X"]),
            Scheme::None,
            Aggregation::First,
            OffsetUnit::Char,
        );
        assert!(found[0].text == "\u{1f600}" || found[0].text.is_empty(), "{span:?}");
    }
    assert_eq!(entities("", &[], &names(&LABELS), Scheme::Iob2, Aggregation::First, OffsetUnit::Char), []);
}

#[test]
fn without_marks_a_word_begins_behind_or_with_a_space() {
    let text = "a b\nc";
    let goes_on = |span| continues(text, &span, "▁b", false, false);
    assert_eq!(
        [goes_on(0..1), goes_on(1..3), goes_on(2..3), goes_on(3..5), goes_on(4..5)],
        [false, false, false, true, true]
    );
    assert!(!continues(text, &(4..5), "▁b", false, true));
}
