//! The records that parity runs on where none are given: whatever is awkward for a tokenizer, a mask or a
//! position.

use crate::Result;
use crate::saved::Saved;

/// A text, or a pair of them.
pub type Text = (String, Option<String>);

/// Texts that are awkward in themselves.
const TEXTS: [&str; 30] = [
    "",
    " ",
    "a",
    ".",
    "[CLS] [SEP] [PAD]",
    "[PAD] [PAD] [PAD]",
    "[MASK] [UNK]",
    "I love this film, it is great!",
    "ALL CAPITALS AND digits 1234567890",
    "naïve café, Ångström, ça, señor, ß, ø, Æ",
    "cafe\u{301} nai\u{308}ve e\u{323}\u{302} a\u{300}\u{301}\u{302}\u{303}",
    "ｆｕｌｌ　ｗｉｄｔｈ ﬁ ﬂ ﬃ ² ½ ™ №",
    "中文字很好 日本語のテキスト 한국어 텍스트 臺灣",
    "мне не нравится это кино; Ελληνικά; Հայերեն; ქართული",
    "नमस्ते दुनिया ภาษาไทย ខ្មែរ",
    "שלום עולם مرحبا بالعالم \u{202e}backwards\u{202c}",
    "😀😂 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 ❤️ 1️⃣",
    "#tag @user http://t.co/x1Y2?a=b&c=%20 me@example.com",
    "&amp; &lt;b&gt; <br/> {\"json\": [1, 2]} `code` \\n \\u0041",
    "tabs\tand\nnew lines\r\nand\u{b}vertical\u{c}forms\u{85}next\u{2028}line\u{2029}paragraph",
    "bell \u{7} escape \u{1b}[31m delete \u{7f} nul \u{0} between",
    "no\u{a0}break thin\u{2009}space zero\u{200b}width joiner\u{200d} mark\u{feff} soft\u{ad}hyphen",
    "replacement \u{fffd} private \u{e000} noncharacter \u{ffff} last \u{10ffff}",
    "“quotes” ‘single’ «guillemets» — – … ¿? ¡!",
    "z\u{335}\u{321}\u{327}\u{322}a\u{334}\u{315}\u{341}l\u{337}g\u{338}o\u{336}",
    "𝕸𝖆𝖙𝖍 𝒻𝓇𝒶𝓀𝓉𝓊𝓇 𝟙𝟚𝟛 ⓒⓘⓡⓒⓛⓔⓓ",
    "don't can't won't it's rock'n'roll O'Neill's",
    "1,234.56 -7e-10 3.14159 0x1F 50% $100 €20 £5",
    "!!!!!!!!!! ?????????? ..........",
    "the end",
];

/// Pairs, for models that tell the two texts apart.
const PAIRS: [(&str, &str); 5] = [
    ("What a day", "Rain in the morning, sun at night."),
    ("", "but the second is not empty"),
    ("the second is empty", ""),
    ("[SEP]", "[SEP] [CLS]"),
    ("你好", "👋🏽 hello שלום"),
];

/// Words of the texts that [`of_agreement`] cuts out of the built-in pages.
const CUT: std::ops::RangeInclusive<usize> = 3..=24;

/// What answers are compared on, of which a share is told: the built-in records, and some 240 texts of the built-in pages of
/// English, so that one answer is less than half a percent.
///
/// # Errors
/// As [`builtin`].
pub fn of_agreement(saved: &Saved) -> Result<Vec<Text>> {
    let mut texts = builtin(saved)?;
    for page in crate::data::english() {
        let words: Vec<&str> = page.split_whitespace().collect();
        let mut lengths = CUT.cycle();
        let cut = (0..words.len()).step_by(2).zip(lengths.by_ref());
        texts.extend(cut.filter_map(|(at, length)| Some((words.get(at..at + length)?.join(" "), None))));
    }
    Ok(texts)
}

/// The built-in records for a model: the texts above, texts of one to twelve words, pairs where the model has
/// token types; then texts of exactly the maximum length, one token less, more than it, and far more, and very
/// long words. The long ones stand together, between short ones, so that few batches are wide.
pub fn builtin(saved: &Saved) -> Result<Vec<Text>> {
    let words = |n: usize| vec!["the"; n].join(" ");
    let length = |text: &str| -> Result<usize> { Ok(saved.tokenizer.encode(text, None, usize::MAX)?.len()) };
    let (specials, with_one) = (length("")?, length("the")?);
    let most = saved.max_length.saturating_sub(specials) / with_one.saturating_sub(specials).max(1);

    let pairs = saved.config.family.limits().pairs;
    let mut texts: Vec<Text> = TEXTS.iter().map(|&text| (text.to_owned(), None)).collect();
    texts.extend((1..=12).map(|n| (words(n), None)));
    if pairs {
        let pair = |(a, b): &(&str, &str)| ((*a).to_owned(), Some((*b).to_owned()));
        texts.extend(PAIRS.iter().map(pair));
    }
    texts.extend([
        (words(most), None),
        (words(most.saturating_sub(1)), None),
        (words(most + 1), None),
        ("word, ".repeat(saved.max_length * 4), None),
        ("x".repeat(5000), None),
        ("e\u{301}".repeat(300), None),
    ]);
    if pairs {
        texts.extend([
            (words(most), Some("short".to_owned())),
            ("short".to_owned(), Some(words(most))),
            (words(most), Some(words(most))),
        ]);
    }
    // GPT-2 adds no special tokens, so an empty text has nothing that could be computed
    let mut kept = Vec::with_capacity(texts.len());
    for (text, pair) in texts {
        if !saved.tokenizer.encode(&text, pair.as_deref(), usize::MAX)?.is_empty() {
            kept.push((text, pair));
        }
    }
    Ok(kept)
}
