//! `tk sweep`, the real binary on a tiny model: every run, the table, the best model; what is gone on with and what is
//! refused.

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::assert::Assert;
use common::{change_weights, copy_dir, models, records_file, tk};
use serde_json::Value;

/// A directory with a model, data and a sweep's file.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(top: &str, train: &str, space: &str) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        copy_dir(&models("tiny-bert-single"), &bench.path("model"));
        records_file("tiny-bert-single", 1, &bench.path("records.jsonl"));
        bench.write(top, train, space);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `DIR` stands for the directory.
    fn write(&self, top: &str, train: &str, space: &str) {
        let model = if space.contains("model = ") { "" } else { "model = 'DIR/model'" };
        let text = format!(
            "output = 'DIR/out'\n{top}\n[train]\ntask = 'text-classification'\n{model}\ntrain = 'DIR/records.jsonl'\n\
             eval = 'DIR/records.jsonl'\nmax-length = 48\nbatch-size = 4\n{train}\n{space}\n",
        );
        let text = text.replace("DIR", &self.dir.path().display().to_string());
        std::fs::write(self.path("sweep.toml"), text).unwrap();
    }

    fn sweep(&self) -> Assert {
        tk().args(["sweep", "--json"]).arg(self.path("sweep.toml")).assert()
    }

    /// Starts a sweep, and waits until its run has logged so many steps and evaluations.
    #[cfg(unix)]
    fn start(&self, run: &str, lines: usize) -> std::process::Child {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("tk"));
        command.args(["sweep", "--quiet"]).arg(self.path("sweep.toml")).stdout(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let log = self.path("out/runs").join(run).join("training/log.jsonl");
        while std::fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < lines {
            assert!(child.try_wait().unwrap().is_none(), "the sweep is over before it could be ended");
            std::thread::yield_now();
        }
        child
    }

    fn model(&self) -> Vec<u8> {
        std::fs::read(self.path("out/best/model.safetensors")).unwrap()
    }

    fn log(&self, run: &str) -> String {
        text(&self.path("out/runs").join(run).join("training/log.jsonl"))
    }

    /// All files of weights in the output.
    fn weights(&self) -> Vec<String> {
        fn below(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in folder.read_dir().unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { below(&path, found) } else { found.push(path) }
            }
        }
        let (out, mut found) = (self.path("out"), Vec::new());
        below(&out, &mut found);
        let weights = found.iter().filter(|path| path.extension().is_some_and(|own| own == "safetensors"));
        weights.map(|path| path.strip_prefix(&out).unwrap().display().to_string()).collect()
    }
}

fn result(assert: &Assert) -> Value {
    serde_json::from_slice(&assert.get_output().stdout).unwrap()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn row<'r>(result: &'r Value, name: &str) -> &'r Value {
    result["runs"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap()
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

const STEPS: &str = "max-steps = 6\neval-every = 3\nbest-metric = 'loss'";
const GRID: &str = "[grid]\nlearning-rate = [0.0, 2e-3]\nweight_decay = [0.0, 0.1]";

#[test]
fn every_combination_is_trained_and_the_best_model_kept() {
    let bench = Bench::new("", STEPS, GRID);
    let told = result(&bench.sweep().success());
    assert_eq!((&told["metric"], &told["more_is_better"]), (&"loss".into(), &false.into()));
    let rows = told["runs"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        assert_eq!((&row["status"], &row["evaluations"]), (&"finished".into(), &2.into()), "{row}");
        assert_eq!(row["steps"], 6);
    }
    let values: Vec<f64> = rows.iter().map(|row| row["value"].as_f64().unwrap()).collect();
    assert!(values.is_sorted() && values[0] < values[3], "{values:?}");
    let best = told["best"].as_str().unwrap();
    assert_eq!(row(&told, best)["settings"]["learning-rate"], 2e-3);
    let measured = tk()
        .args(["eval", "--json", "--max-length", "48", "--input"])
        .arg(bench.path("records.jsonl"))
        .arg(bench.path("out/best"))
        .assert()
        .success();
    let measured = result(&measured)["metrics"]["loss"].as_f64().unwrap();
    assert!((measured - values[0]).abs() < 1e-5, "{measured} and {values:?}");
    // of the others no weights are left, but what was logged
    assert_eq!(bench.weights(), ["best/model.safetensors"]);
    assert_eq!(bench.log(best), text(&bench.path("out/best/training/log.jsonl")));
    let logs = ["001", "004"].map(|name| bench.log(name));

    // the same run by itself has the same weights
    let settings = bench.path("out/runs").join(format!("{best}.toml"));
    let alone = bench.path("alone");
    tk().arg("train").arg("--config").arg(settings).arg("--output").arg(&alone).assert().success();
    assert!(std::fs::read(alone.join("model.safetensors")).unwrap() == bench.model());

    // once more, nothing is trained and what stands beside the best model stays
    std::fs::write(bench.path("out/best/mine.txt"), "kept").unwrap();
    assert_eq!(result(&bench.sweep().success()), told);
    assert_eq!(["001", "004"].map(|name| bench.log(name)), logs);
    assert_eq!(text(&bench.path("out/best/mine.txt")), "kept");
    let table = tk().arg("sweep").arg(bench.path("sweep.toml")).assert().success();
    let table = String::from_utf8_lossy(&table.get_output().stdout).into_owned();
    assert!(table.lines().count() == 6 && table.contains("learning-rate 2e-3, weight-decay 0.1"), "{table}");

    // other settings or other data are another sweep
    bench.write("", &STEPS.replace("loss", "accuracy"), GRID);
    let said = stderr(&bench.sweep().code(2));
    assert!(said.contains("other settings: train.best-metric (\"accuracy\", was \"loss\")"), "{said}");
    bench.write("", STEPS, GRID);
    records_file("tiny-bert-single", 3, &bench.path("records.jsonl"));
    assert!(stderr(&bench.sweep().code(2)).contains("what is in "));
}

/// A model of finite weights, of which nothing finite can be computed.
fn break_model(dir: &Path) {
    change_weights(dir, |name| name.ends_with("intermediate.dense.weight"), |value| 3e38 * value.signum());
}

#[test]
fn a_failed_run_is_told_and_made_again_when_the_sweep_is() {
    let space = "[grid]\nmodel = ['DIR/broken', 'DIR/model', 'DIR/absent']";
    let bench = Bench::new("", "max-steps = 2", space);
    copy_dir(&bench.path("model"), &bench.path("broken"));
    break_model(&bench.path("broken"));
    let done = bench.sweep().success();
    let told = result(&done);
    assert_eq!((&told["best"], &told["metric"]), (&"002".into(), &"accuracy".into()));
    let statuses: Vec<(&Value, &Value)> =
        told["runs"].as_array().unwrap().iter().map(|row| (&row["name"], &row["status"])).collect();
    let [finished, failed] = ["finished", "failed"].map(Value::from);
    let names = ["002", "001", "003"].map(Value::from);
    assert_eq!(statuses, [(&names[0], &finished), (&names[1], &failed), (&names[2], &failed)]);
    for (name, says) in [("001", "step 1"), ("003", "absent")] {
        let error = row(&told, name)["error"].as_str().unwrap();
        assert!(error.contains(says), "{error}");
        assert!(stderr(&done).contains(&format!("run {name}: failed: ")));
        assert!(text(&bench.path("out/runs").join(format!("{name}.log"))).contains(says));
    }
    assert_eq!(bench.weights(), ["best/model.safetensors"]);

    // what was at fault is mended
    let log = bench.log("002");
    copy_dir(&bench.path("model"), &bench.path("broken"));
    std::fs::remove_dir_all(bench.path("model")).unwrap();
    let done = bench.sweep().success();
    let told = result(&done);
    assert_eq!((&row(&told, "001")["status"], &row(&told, "003")["status"]), (&finished, &failed));
    // the two are equals, of which the first is the best
    assert_eq!((&told["best"], bench.log("002")), (&"001".into(), log));
    assert!(text(&bench.path("out/best/training/settings.toml")).contains("broken"));
}

#[test]
fn where_all_runs_fail_so_does_the_sweep() {
    let bench = Bench::new("", "max-steps = 2", "[grid]\nlearning-rate = [1e-3, 2e-3]");
    break_model(&bench.path("model"));
    let done = bench.sweep().code(1);
    assert!(stderr(&done).contains("what each said stands in"));
    let told = result(&done);
    assert!(told["runs"].as_array().unwrap().len() == 2 && told["best"].is_null(), "{told}");
    assert!(!bench.path("out/best").exists());
}

#[test]
fn a_hopeless_run_ends_early_by_the_metrics_own_direction() {
    let space = "[grid]\nlearning-rate = [1e-4, 2e-4, 0.0, 2.2e-4]";
    let long = "dropout = 0.0\nwarmup-ratio = 0.0\nmax-steps = 20\neval-every = 1\nsave-every = 20\nbest-metric = 'loss'";
    let bench = Bench::new("grace-runs = 2\ngrace_evaluations = 2", long, space);
    let told = result(&bench.sweep().success());
    let stopped = row(&told, "003");
    assert_eq!(stopped["status"], "stopped", "{stopped}");
    let evaluations = stopped["evaluations"].as_u64().unwrap();
    assert!((2..20).contains(&evaluations), "{evaluations}");
    for name in ["001", "002"] {
        assert_eq!(
            (&row(&told, name)["status"], &row(&told, name)["evaluations"]),
            (&"finished".into(), &20.into())
        );
    }
    assert_eq!(row(&told, "004")["status"], "finished", "the lowest loss is the best: {told}");
    assert_eq!(
        (&told["runs"][3]["name"], bench.weights()),
        (&"003".into(), vec!["best/model.safetensors".to_owned()])
    );
    // it is over, too
    assert_eq!(result(&bench.sweep().success()), told);
}

#[test]
#[cfg(unix)]
fn a_sweep_that_was_ended_goes_on_to_the_same_models() {
    use std::os::unix::process::ExitStatusExt;

    let space = "[random]\nruns = 2\nseed = 3\nlearning-rate = { min = 1e-4, max = 1e-2 }";
    let train = "max-steps = 40\neval-every = 20\nsave-every = 4\nbest-metric = 'loss'";
    let [whole, broken] = [(), ()].map(|()| Bench::new("stop = 'none'", train, space));
    let told = result(&whole.sweep().success());

    // a second sweep at the same time is refused
    std::fs::create_dir(broken.path("out")).unwrap();
    let held = std::fs::File::open(broken.path("out")).unwrap();
    held.lock().unwrap();
    assert!(stderr(&broken.sweep().code(2)).contains("is being written by another run of tk"));
    drop(held);

    // asked to end in the first run, killed in the second
    let mut child = broken.start("001", 7);
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    let status = child.wait().unwrap();
    assert!(status.code() == Some(143) && status.signal().is_none(), "{status}");
    assert!(!broken.path("out/best").exists() && broken.path("out/runs/001/training/settings.toml").exists());
    let mut child = broken.start("002", 7);
    child.kill().unwrap();
    child.wait().unwrap();
    let again = result(&broken.sweep().success());
    assert!(
        text(&broken.path("out/runs/002.log")).lines().count()
            > text(&whole.path("out/runs/002.log")).lines().count(),
        "what was said before the kill is kept"
    );

    assert_eq!(again["best"], told["best"]);
    for (a, b) in told["runs"].as_array().unwrap().iter().zip(again["runs"].as_array().unwrap()) {
        assert_eq!((&a["name"], &a["settings"], &a["value"]), (&b["name"], &b["settings"], &b["value"]));
    }
    assert!(whole.model() == broken.model());
}

#[test]
fn what_no_run_would_take_is_refused_by_name_and_nothing_is_written() {
    for (top, train, space, says) in [
        ("", "", "[grid]\nlearning-rat = [1e-3]", "did you mean \"learning-rate\"?"),
        ("", "lerning-rate = 1e-3", "[grid]\nepochs = [1]", "did you mean \"learning-rate\"?"),
        ("stpo = 'none'", "", "[grid]\nepochs = [1]", "did you mean \"stop\"?"),
        ("", "", "[grid]\nlearning-rate = [1e-3, 11.0]", "run 002 (learning-rate 11): --learning-rate is 11"),
        ("", "", "[grid]\nepochs = ['many']", "invalid value 'many' for '--epochs <N>'"),
        ("", "schedule = 'line'", "[grid]\nepochs = [1]", "possible values: linear"),
        ("", "", "[grid]\nfocal-gamma = [-1.0]", "--focal-gamma"),
        ("", "", "[grid]\nepochs = [{ a = 1 }]", "epochs is { a = 1 }"),
        ("", "", "", "neither [grid] nor [random]"),
    ] {
        let bench = Bench::new(top, train, space);
        let said = stderr(&bench.sweep().code(2));
        assert!(said.contains(says) && said.contains("sweep.toml"), "{said}");
        // perhaps an empty directory
        assert!(bench.path("out").read_dir().map_or(0, Iterator::count) == 0, "{says}");
    }
    let bench = Bench::new("", STEPS, GRID);
    std::fs::write(bench.path("sweep.toml"), "output = 'a'\noutput = 'b'\n").unwrap();
    assert!(stderr(&bench.sweep().code(2)).contains("duplicate key"));
    bench.write("", STEPS, GRID);
    std::fs::create_dir(bench.path("out")).unwrap();
    std::fs::write(bench.path("out/thesis.txt"), "years").unwrap();
    assert!(stderr(&bench.sweep().code(2)).contains("did not write"));
    assert_eq!(bench.path("out").read_dir().unwrap().count(), 1);
}

/// What only a look into model and records tells.
#[test]
fn where_the_first_run_is_refused_nothing_is_trained_and_the_file_can_be_mended() {
    let bench =
        Bench::new("", "max-steps = 2\nbest-metric = 'acuracy'", "[grid]\nlearning-rate = [1e-3, 2e-3]");
    let said = stderr(&bench.sweep().code(2));
    assert!(
        said.contains("sweep.toml: run 001 (learning-rate 1e-3) is refused: --best-metric acuracy"),
        "{said}"
    );
    assert!(said.contains("did you mean \"accuracy\"?"), "{said}");
    assert_eq!(bench.path("out").read_dir().unwrap().count(), 0);
    bench.write("", "max-steps = 2", "[grid]\nlearning-rate = [1e-3, 2e-3]");
    assert_eq!(result(&bench.sweep().success())["runs"].as_array().unwrap().len(), 2);
}
