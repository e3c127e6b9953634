//! A step by candle's own operations, which are what GPUs run: as many for a large batch as for a small one. Alone in its
//! file, because candle counts the tensors of a whole process.

mod common;

use candle_core::{DType, Device, Tensor};
use tk::checkpoint::Weights;
use tk::data::batch::Encoding;
use tk::eager::{Init, Kernels, Params};
use tk::model::ModelConfig;
use tk::task::causal_lm::NextTokens;
use tk::task::text_classification::Window;
use tk::task::{Example, Target, Task};
use tk::train::{Settings, Trainer};

/// The tensors that candle has made so far, views among them: it gives each a number.
fn tensors() -> usize {
    let next = Tensor::zeros(1, DType::U8, &Device::Cpu).unwrap().id();
    let digits: String = format!("{next:?}").chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// The tensors of one step over sequences of these lengths.
fn of_step(model: &str, lengths: &[usize]) -> usize {
    let dir = common::models(model);
    let mut config = ModelConfig::read(&dir).unwrap();
    config.set_dropout(0.1).unwrap();
    let task = Task::open(&dir, &config).unwrap();
    let weights = Weights::open(&dir, config.family.names()).unwrap();
    let manifest = task.params(&config.family).unwrap();
    let (params, _) = Params::load(&manifest, &weights, Init { seed: 0, std: 0.0 }, &Device::Cpu).unwrap();
    let label = common::json(dir.join("reference.json"))["records"][0]["label"].clone();
    let example = |(i, &n): (usize, &usize)| Example {
        encoding: Encoding { ids: vec![7; n], type_ids: vec![0; n], truncated: false },
        target: match &task {
            Task::TextClassification(task) => {
                Target::TextClassification(Window::whole(i, task.target(&label).unwrap()))
            }
            _ => Target::CausalLm(NextTokens { predicted: (0..n).map(|at| at > 0).collect(), bytes: 0 }),
        },
    };
    let examples: Vec<Example> = lengths.iter().enumerate().map(example).collect();
    let settings = Settings { dropout: Some(0.1), ..Settings::default() };
    let mut trainer = Trainer::new(&settings, &config.family, &task, &params, &Device::Cpu, 10)
        .and_then(|trainer| trainer.with_kernels(Kernels::Composite))
        .unwrap();
    let before = tensors();
    trainer.step(&[examples.iter().collect()]).unwrap();
    tensors() - before
}

#[test]
fn a_step_is_as_many_operations_of_candles_for_a_large_batch_as_for_a_small_one() {
    let ragged: Vec<usize> = (0..64).map(|i| 5 + 7 * i % 12).collect();
    for model in [
        "tiny-bert-single",
        "tiny-distilbert-single",
        "tiny-roberta-single",
        "tiny-mpnet-single",
        "tiny-deberta-v2-single",
        "tiny-modernbert-single",
        "tiny-gpt2-lm",
    ] {
        let counts = [2, 4, 32, 64].map(|sequences| of_step(model, &ragged[..sequences]));
        assert!(counts.iter().all(|&count| count == counts[0]), "{model}: {counts:?}");
    }
}
