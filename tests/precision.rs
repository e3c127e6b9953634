//! `--precision bf16`, held against fp32: the fused operations of processors, on whatever unit this one has, and the
//! composite ones of GPUs, which candle computes on a processor, too, slowly.

mod common;

use std::sync::Arc;

use candle_core::{DType, Device};
use common::{gradient, json, models, records_file, relative, tk};
use tk::checkpoint::Weights;
use tk::data::batch::{Encoding, PackedBatch};
use tk::device::TrainingPrecision;
use tk::eager::kernels::gemm::bf16;
use tk::eager::{Eager, Init, Kernels, Mode, Params};
use tk::model::ModelConfig;
use tk::task::text_classification::Window;
use tk::task::{Example, Target, Task};
use tk::train::schedule::Schedule;
use tk::train::{Settings, Trainer};

/// A tiny model and its records.
struct Tiny {
    config: ModelConfig,
    task: Task,
    params: Params,
    examples: Vec<Example>,
}

impl Tiny {
    fn load() -> Self {
        let dir = models("tiny-bert-single");
        let mut config = ModelConfig::read(&dir).unwrap();
        config.set_dropout(0.1).unwrap();
        let task = Task::from_config(&config).unwrap();
        let manifest = task.params(&config.family).unwrap();
        let init = Init { seed: 0, std: 0.0 };
        let (params, _) =
            Params::load(&manifest, &Weights::open(&dir, config.family.names()).unwrap(), init, &Device::Cpu)
                .unwrap();
        let json = json(dir.join("reference.json"));
        let ids = |key: &str, i: usize| serde_json::from_value::<Vec<u32>>(json[key][i].clone()).unwrap();
        let Task::TextClassification(classification) = &task else { panic!("it classifies") };
        let records = json["records"].as_array().unwrap().iter().enumerate();
        let examples = records
            .map(|(i, record)| Example {
                encoding: Encoding { ids: ids("ids", i), type_ids: ids("type_ids", i), truncated: false },
                target: Target::TextClassification(Window::whole(
                    0,
                    classification.target(&record["label"]).unwrap(),
                )),
            })
            .collect();
        Self { config, task, params, examples }
    }

    /// The losses of `steps` steps on all the records, so many of them at once.
    fn train(&self, settings: &Settings, steps: usize, kernels: Kernels, at_once: usize) -> Vec<f64> {
        let (family, task) = (&self.config.family, &self.task);
        let trainer = Trainer::new(settings, family, task, &self.params, &Device::Cpu, steps);
        let mut trainer = trainer.and_then(|trainer| trainer.with_kernels(kernels)).unwrap();
        let examples: Vec<&Example> = self.examples.iter().collect();
        let micro_batches: Vec<Vec<&Example>> = examples.chunks(at_once).map(<[_]>::to_vec).collect();
        (0..steps).map(|_| trainer.step(&micro_batches).unwrap().loss).collect()
    }
}

fn settings(precision: TrainingPrecision, learning_rate: f64) -> Settings {
    Settings {
        precision,
        learning_rate,
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.0,
        ..Settings::default()
    }
}

#[test]
fn losses_in_bf16_follow_those_in_fp32() {
    // weights that are packed for several passes are packed anew for the next step
    for (kernels, at_once) in [(Kernels::Fused, 100), (Kernels::Fused, 3), (Kernels::Composite, 100)] {
        let losses = |precision| Tiny::load().train(&settings(precision, 1e-3), 30, kernels, at_once);
        let (fp32, bf16) = (losses(TrainingPrecision::Fp32), losses(TrainingPrecision::Bf16));
        assert!(fp32[29] < 0.7 * fp32[0], "the test needs a run that learns: {fp32:?}");
        let worst = fp32.iter().zip(&bf16).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst <= 0.02, "{kernels:?}, {worst}: {bf16:?}, {fp32:?}");
        assert!(worst > 1e-6, "nothing was computed in bf16");
    }
}

#[test]
fn auto_takes_what_the_machine_has() {
    let losses = |precision| Tiny::load().train(&settings(precision, 1e-3), 3, Kernels::Fused, 100);
    let taken = match bf16::unit() {
        Some(_) => TrainingPrecision::Bf16,
        None => TrainingPrecision::Fp32,
    };
    assert_eq!(TrainingPrecision::Auto.taken(&Device::Cpu).0, taken);
    assert_eq!(losses(TrainingPrecision::Auto), losses(taken));
}

#[test]
fn every_gradient_in_bf16_is_near_that_in_fp32() {
    let tiny = Tiny::load();
    // more rows than bf16 can count: a sum of as many in bf16 would stall
    let examples: Vec<&Example> = tiny.examples.iter().cycle().take(100).collect();
    let batch = PackedBatch::new(examples.iter().map(|example| &example.encoding));
    let gradients = |kernels, dtype| -> Vec<(String, Vec<f32>)> {
        let eager = Eager::new(&tiny.params, &batch, &Device::Cpu, Mode::Training { key: 3 });
        let eager = eager.with_kernels(kernels).with_dtype(dtype);
        let outputs = tiny.task.define(&eager, &tiny.config.family).unwrap();
        let loss = tiny.task.loss(&eager, outputs, &examples, 0.0, &[1.0]).unwrap().remove(0);
        let store = loss.backward().unwrap();
        let of = |name: &str| gradient(&tiny.params, name, &store, kernels);
        let all = tiny.params.iter().map(|(param, _)| (param.name.clone(), of(&param.name))).collect();
        tiny.params.trainable().for_each(|own| own.gradient.lock().clear());
        all
    };
    let fp32 = gradients(Kernels::Composite, DType::F32);
    let bf16 = [Kernels::Composite, Kernels::Fused].map(|kernels| gradients(kernels, DType::BF16));
    for ((name, fp32), (_, bf16)) in bf16.iter().flat_map(|bf16| fp32.iter().zip(bf16)) {
        let is = |part: &str| name.contains(part);
        // the worst by dropout's key is 0.03 to 0.04; the gradient of what a query or a key is made of is a
        // difference of nearly equal sums
        let tolerance = if is("self.query") || is("self.key") { 0.06 } else { 0.05 };
        // softmax cancels what a bias adds to every key: its gradient is rounding alone
        if !is("self.key.bias") {
            let error = relative(bf16, fp32);
            assert!(error <= tolerance, "{name}: {error}");
        }
    }
}

#[test]
fn weights_that_are_packed_once_are_those_that_are_packed_for_each_pass() {
    let tiny = Tiny::load();
    let examples: Vec<&Example> = tiny.examples.iter().collect();
    let batch = PackedBatch::new(examples.iter().map(|example| &example.encoding));
    let weights = Arc::default();
    let gradients = |packed: bool| -> Vec<Vec<f32>> {
        let eager = Eager::new(&tiny.params, &batch, &Device::Cpu, Mode::Training { key: 3 });
        let eager = eager.with_dtype(DType::BF16);
        let eager = if packed { eager.with_packed(&weights) } else { eager };
        let outputs = tiny.task.define(&eager, &tiny.config.family).unwrap();
        let loss = tiny.task.loss(&eager, outputs, &examples, 0.0, &[1.0]).unwrap().remove(0);
        loss.backward().unwrap();
        let all = tiny.params.trainable().map(|own| own.gradient.lock().dense().unwrap()).collect();
        tiny.params.trainable().for_each(|own| own.gradient.lock().clear());
        all
    };
    let plain = gradients(false);
    assert!(gradients(true) == plain && gradients(true) == plain);
}

#[test]
fn updates_that_bf16_could_not_hold_are_kept() {
    [Kernels::Fused, Kernels::Composite].into_iter().for_each(updates_are_kept);
}

fn updates_are_kept(kernels: Kernels) {
    let (rate, steps) = (1e-6, 20);
    let run = |precision| {
        let tiny = Tiny::load();
        let before = tiny.params.values().unwrap().concat();
        tiny.train(&settings(precision, rate), steps, kernels, 100);
        for (param, var) in tiny.params.iter() {
            assert_eq!(var.dtype(), DType::F32, "{}", param.name);
        }
        (before, tiny.params.values().unwrap().concat())
    };
    let ((before, fp32), (_, bf16)) = (run(TrainingPrecision::Fp32), run(TrainingPrecision::Bf16));
    // weights whose neighbours in bf16 are further away than all the steps together, and that are learnt
    let is_far = |i: usize| before[i].abs() > 0.02 && f64::from((fp32[i] - before[i]).abs()) > rate;
    let far: Vec<usize> = (0..before.len()).filter(|&i| is_far(i)).collect();
    assert!(far.len() > 10_000, "{}", far.len());
    let share = |is: &dyn Fn(usize) -> bool| far.iter().filter(|&&i| is(i)).count() as f64 / far.len() as f64;
    let in_bf16 = |x: f32| half::bf16::from_f32(x).to_bits();
    let same = share(&|i| in_bf16(bf16[i]) == in_bf16(before[i]));
    assert!(same > 0.95, "in bf16, {same} of the weights would have stayed as they were");
    let changes = |now: &[f32]| far.iter().map(|&i| now[i] - before[i]).collect::<Vec<f32>>();
    let error = relative(&changes(&bf16), &changes(&fp32));
    assert!(error < 0.2, "the changes are {error} off those in fp32");
}

#[test]
fn a_processor_without_bf16_refuses_it_before_anything_is_written_and_one_that_has_it_trains() {
    let dir = tempfile::tempdir().unwrap();
    let (records, output, file) =
        (dir.path().join("train.jsonl"), dir.path().join("out"), dir.path().join("run.toml"));
    records_file("tiny-bert-single", 1, &records);
    std::fs::write(&file, "precision = \"bf16\"\n").unwrap();
    let train = |more: &[&str]| {
        let mut tk = tk();
        tk.args(["train", "--task", "text-classification", "--max-length", "48", "--model"]);
        tk.arg(models("tiny-bert-single")).arg("--train").arg(&records).arg("--output").arg(&output);
        tk.args(more).assert()
    };
    let said = |assert: assert_cmd::assert::Assert| {
        String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
    };
    let saved = || std::fs::read_to_string(output.join("training/settings.toml")).unwrap();
    for more in [["--precision", "bf16"], ["--config", file.to_str().unwrap()]] {
        if bf16::unit().is_some() {
            train(&[&more[..], &["--max-steps", "1", "--overwrite"]].concat()).success();
            assert!(saved().contains("precision = \"bf16\""), "{}", saved());
            continue;
        }
        let text = said(train(&more).code(2));
        assert!(text.contains("this processor has neither AMX-BF16 nor AVX512-BF16"), "{text}");
        assert!(!output.exists());
    }
    let text = said(train(&["--precision", "fp16"]).code(2));
    assert!(text.contains("fp32, bf16"), "{text}");

    let text = said(train(&["--max-steps", "1", "--overwrite", "--precision", "auto"]).success());
    let taken = if bf16::unit().is_some() { "bf16" } else { "fp32" };
    assert!(text.contains("--precision auto: ") && text.contains(taken), "{text}");
    assert!(saved().contains(&format!("precision = \"{taken}\"")), "{}", saved());
    train(&["--resume", "--max-steps", "1", "--precision", "auto"]).success();

    train(&["--max-steps", "1", "--overwrite", "--quiet"]).success();
    assert!(saved().contains("precision = \"fp32\""), "{}", saved());
    if bf16::unit().is_some() {
        let text = said(train(&["--resume", "--max-steps", "1", "--precision", "bf16"]).code(2));
        assert!(text.contains("precision (\"bf16\", was \"fp32\")"), "{text}");
    }
}
