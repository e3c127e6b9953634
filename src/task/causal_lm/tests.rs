use super::*;
use crate::data::tokens::{Tokenizer, Vocabulary};

/// The end in a vocabulary that is trained below.
const END: u32 = 0;

fn lm() -> CausalLm {
    CausalLm { vocabulary: 300, ends: vec![END, 299], start: Some(END), begins: true }
}

/// Every byte is a token, so ids are easy to read.
fn tokenizer() -> Tokenizer {
    let tokenizer = Tokenizer::train(Vocabulary::Gpt2, &["x"], 257).unwrap();
    assert_eq!(tokenizer.inner().token_to_id("<|endoftext|>"), Some(END));
    tokenizer
}

/// The same with tokens of its own around a text.
fn template(single: &str) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    tokenizer().save(dir.path(), dir.path()).unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let part = |part: &str| match part {
        "A" => json!({"Sequence": {"id": "A", "type_id": 0}}),
        special => json!({"SpecialToken": {"id": special, "type_id": 0}}),
    };
    let single: Vec<Value> = single.split(' ').map(part).collect();
    json["post_processor"] = json!({
        "type": "TemplateProcessing", "single": single, "pair": single,
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [END], "tokens": ["<|endoftext|>"]},
            "#": {"id": "#", "ids": [tokenizer().inner().token_to_id("#").unwrap()], "tokens": ["#"]},
        },
    });
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::open(dir.path()).unwrap()
}

fn document(prompt: Option<&str>, text: &str) -> Document {
    Document { place: Default::default(), prompt: prompt.map(str::to_owned), text: text.to_owned() }
}

/// Each example's text, with `|` for the end and a capital for a token that is predicted, the end's `!`.
fn shown(examples: &[Example<NextTokens>], tokenizer: &Tokenizer) -> Vec<String> {
    let token = |(&id, &predicted): (&u32, &bool)| match (id == END, predicted) {
        (true, true) => "!".to_owned(),
        (true, false) => "|".to_owned(),
        (false, true) => tokenizer.inner().id_to_token(id).unwrap().to_uppercase(),
        (false, false) => tokenizer.inner().id_to_token(id).unwrap(),
    };
    examples
        .iter()
        .map(|example| example.encoding.ids.iter().zip(&example.target.predicted).map(token).collect())
        .collect()
}

fn bytes(examples: &[Example<NextTokens>]) -> Vec<usize> {
    examples.iter().map(|example| example.target.bytes).collect()
}

#[test]
fn every_token_but_a_texts_first_is_predicted_once() {
    let tokenizer = tokenizer();
    let documents =
        [document(None, "abcdefg"), document(None, ""), document(None, "xyz"), document(None, "q")];
    let examples = lm().examples_of(&documents, &tokenizer, 4, Cutting::Training).unwrap();
    assert_eq!(shown(&examples, &tokenizer), ["aBCD", "dEFG", "g!", "xYZ!", "q!"]);
    assert_eq!(bytes(&examples), [3, 3, 0, 2, 0], "the end of a text is no byte of it");
    let joined = lm().examples_of(&documents, &tokenizer, 6, Cutting::Concatenated).unwrap();
    assert_eq!(shown(&joined, &tokenizer), ["aBCDEF", "fG!!XY", "yZ!Q!"]);
}

#[test]
fn tokens_of_the_tokenizers_own_stand_around_a_text_once_and_are_not_doubled() {
    let documents = [
        document(None, "abcdefg"),
        document(None, "xy<|endoftext|>"),
        document(Some("a"), "cd"),
        document(None, ""),
    ];
    for (single, expected, joined) in [
        ("A", ["aBCDE", "eFG!", "xY!", "aCD!"].as_slice(), "aBCDEFG!XY!aCD!!"),
        ("<|endoftext|> A", &["|ABCD", "dEFG!", "|XY!", "|aCD!"], "|ABCDEFG!XY!aCD!!"),
        ("<|endoftext|> A <|endoftext|>", &["|ABCD", "dEFG!", "|XY!!", "|aCD!"], "|ABCDEFG!XY!!aCD!!"),
        ("# A <|endoftext|>", &["#ABCD", "dEFG!", "#XY!!", "#aCD!"], "#ABCDEFG!#XY!!#aCD!#!"),
        ("A #", &["aBCDE", "eFG#!", "xY!#!", "aCD#!"], "aBCDEFG#!XY!#!aCD#!#!"),
    ] {
        let tokenizer = template(single);
        let examples = lm().examples_of(&documents, &tokenizer, 5, Cutting::Evaluation).unwrap();
        assert_eq!(shown(&examples, &tokenizer), expected, "{single}");
        assert!(examples.iter().all(|example| !example.encoding.truncated));
        let all = lm().examples_of(&documents, &tokenizer, 99, Cutting::Concatenated).unwrap();
        assert_eq!(shown(&all, &tokenizer), [joined], "{single}");
    }
}

#[test]
fn of_a_prompt_nothing_is_predicted_and_its_front_makes_room() {
    let tokenizer = tokenizer();
    let documents =
        [document(Some("abc"), "xy"), document(Some("abcdef"), "xy"), document(Some("abc"), "uvwxyz")];
    let examples = lm().examples_of(&documents, &tokenizer, 6, Cutting::Training).unwrap();
    assert_eq!(shown(&examples, &tokenizer), ["abcXY!", "defXY!", "cUVWXY"]);
    assert_eq!(examples.iter().map(|e| e.encoding.truncated).collect::<Vec<_>>(), [false, true, true]);
    let joined = lm().examples_of(&documents, &tokenizer, 99, Cutting::Concatenated).unwrap();
    assert_eq!(shown(&joined, &tokenizer), ["abcXY!abcdefXY!abcUVWXYZ!"]);
    // what the tokenizer puts in front stays there
    let begun = tokenizer.starting_with(END).unwrap();
    let examples = lm().examples_of(&documents, &begun, 6, Cutting::Training).unwrap();
    assert_eq!(shown(&examples, &begun), ["|bcXY!", "|efXY!", "|cUVWX"]);
}

#[test]
fn a_long_completion_is_measured_whole() {
    let tokenizer = tokenizer();
    let documents = [document(Some("abc"), "uvwxyz"), document(Some("abcdefgh"), "uvwxyz")];
    let examples = lm().examples_of(&documents, &tokenizer, 6, Cutting::Evaluation).unwrap();
    assert_eq!(shown(&examples, &tokenizer), ["abcUVW", "wXYZ!", "fghUVW", "wXYZ!"]);
    let cut = examples.iter().map(|e| e.encoding.truncated).collect::<Vec<_>>();
    assert_eq!(cut, [false, false, true, false], "a prompt that does not fit is cut, and that is said");
    assert_eq!(bytes(&examples), [3, 3, 3, 3]);
}

#[test]
fn behind_an_empty_prompt_the_first_token_is_learnt() {
    let tokenizer = tokenizer();
    let documents = [document(Some(""), "xy"), document(Some(""), "")];
    let examples = lm().examples_of(&documents, &tokenizer, 6, Cutting::Training).unwrap();
    assert_eq!(shown(&examples, &tokenizer), ["|XY!", "|!"]);
    let shows = |documents: &[Document], tokenizer: &Tokenizer, cutting| {
        CausalLm::shows_beginnings(documents, tokenizer, cutting).unwrap()
    };
    let texts = Document::of_texts(["a", "b"]);
    assert!(shows(&documents, &tokenizer, Cutting::Training));
    assert!(!shows(&texts, &tokenizer, Cutting::Training));
    assert!(shows(&texts, &tokenizer, Cutting::Concatenated));
    let begun = tokenizer.starting_with(END).unwrap();
    assert!(shows(&texts, &begun, Cutting::Training));
    let examples = lm().examples_of(&texts, &begun, 6, Cutting::Training).unwrap();
    assert_eq!(shown(&examples, &begun), ["|A!", "|B!"]);
}

#[test]
fn a_length_without_room_for_a_token_to_predict_is_refused() {
    let documents = [document(None, "abc"), document(Some("abc"), "xyz")];
    for cutting in [Cutting::Training, Cutting::Evaluation, Cutting::Concatenated] {
        for (tokenizer, least) in [(tokenizer(), 2), (template("# # # A"), 4)] {
            for length in 0..least {
                let error = lm().examples_of(&documents, &tokenizer, length, cutting).unwrap_err();
                assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
                assert!(error.to_string().contains(&format!("{least} at least")), "{error:#}");
            }
            let examples = lm().examples_of(&documents, &tokenizer, least, cutting).unwrap();
            assert!(examples.iter().all(|example| example.encoding.len() <= least));
        }
    }
}

#[test]
fn the_ends_are_a_number_a_list_or_none_and_are_kept() {
    let of = |fields: Value| -> Result<(CausalLm, ModelConfig)> {
        let mut config = json!({
            "model_type": "gpt2", "vocab_size": 300, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1,
        });
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let mut config = ModelConfig::parse(&config.to_string())?;
        let lm = CausalLm::from_config(&config)?;
        lm.write_config(&mut config);
        Ok((lm, config))
    };
    for (value, ends, start) in [
        (json!(7), vec![7], Some(7)),
        (json!([7, 299]), vec![7, 299], Some(7)),
        (json!([299]), vec![299], Some(299)),
        (json!(null), vec![], None),
    ] {
        let (lm, config) = of(json!({"eos_token_id": value})).unwrap();
        assert_eq!((lm.ends, lm.start), (ends, start));
        assert_eq!(config.raw["eos_token_id"], value);
    }
    assert_eq!(of(json!({"eos_token_id": 7, "bos_token_id": 5})).unwrap().0.start, Some(5));
    let (lm, config) = of(json!({"vocab_size": 50_257})).unwrap();
    assert_eq!((lm.ends, &config.raw["eos_token_id"]), (vec![50_256], &json!(50_256)));
    for (fields, said) in [
        (json!({}), "eos_token_id is missing"),
        (json!({"eos_token_id": [7, 300]}), "eos_token_id is [7,300]"),
        (json!({"eos_token_id": 7, "pad_token_id": 50_256}), "pad_token_id is 50256"),
        (json!({"eos_token_id": 7, "bos_token_id": -1}), "bos_token_id is -1"),
    ] {
        let error = of(fields).unwrap_err();
        assert!(error.to_string().starts_with(said), "{error:#}");
    }
}

#[test]
fn a_tokens_target_is_the_one_behind_it() {
    let tokenizer = tokenizer();
    let documents = [document(Some("ab"), "x"), document(None, "yz")];
    let examples = lm().examples_of(&documents, &tokenizer, 9, Cutting::Training).unwrap();
    let pairs: Vec<_> = examples.iter().map(|example| (&example.encoding, &example.target)).collect();
    let id = |text: &str| tokenizer.inner().token_to_id(text);
    let expected = [None, id("x"), Some(END), None, id("z"), Some(END), None];
    assert_eq!(CausalLm::targets(&pairs), expected);
}
