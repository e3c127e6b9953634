use candle_core::Var;
use serde_json::Value;

use super::*;

/// A text with no tokens: losses look at embeddings alone.
fn related(others: usize, score: Option<f32>) -> Related {
    Related { others: vec![Encoding::default(); others], score }
}

#[test]
fn losses_and_their_gradients_are_those_of_sentence_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/embedding.json");
    let reference: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let width = reference["width"].as_u64().unwrap() as usize;
    let cases = reference["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let numbers = |key: &str| serde_json::from_value::<Vec<f32>>(case[key].clone()).unwrap();
        let texts = case["texts"].as_u64().unwrap() as usize;
        let rows = numbers("rows");
        let count = rows.len() / width / texts;
        let scores = numbers("scores");
        let examples: Vec<Related> = (0..count).map(|i| related(texts - 1, scores.get(i).copied())).collect();
        let examples: Vec<&Related> = examples.iter().collect();
        let regime = Regime {
            scored: if case["loss"] == "cosine" { ScoredLoss::Cosine } else { ScoredLoss::Cosent },
            dims: serde_json::from_value(case["dims"].clone()).unwrap(),
            ..Regime::default()
        };
        let rows = Tensor::from_vec(rows, (count * texts, width), &Device::Cpu).unwrap();
        let rows = Var::from_tensor(&rows).unwrap();
        let loss = (regime.sum(rows.as_tensor(), &examples).unwrap() / count as f64).unwrap();
        let value = f64::from(loss.to_scalar::<f32>().unwrap());
        let due = case["value"].as_f64().unwrap();
        assert!((value - due).abs() <= 2e-6 * due.abs().max(1.0), "{}: {value}, {due}", case["loss"]);
        let gradients = loss.backward().unwrap();
        let found: Vec<f32> =
            gradients.get(rows.as_tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for (found, due) in found.iter().zip(numbers("gradient")) {
            assert!((found - due).abs() <= 1e-5 * due.abs().max(1.0), "{}: {found}, {due}", case["loss"]);
        }
    }
}
