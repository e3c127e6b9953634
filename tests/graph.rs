//! The exported graph of each tiny model as text: an unintended change shows in the diff.

use std::path::{Path, PathBuf};

use tk::checkpoint::Weights;
use tk::model::ModelConfig;
use tk::onnx::{dump, model, proto::ModelProto, write};
use tk::task::Task;

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

fn exported(name: &str, opset: i64) -> ModelProto {
    let dir = tiny(name);
    let config = ModelConfig::read(&dir).unwrap();
    let task = Task::from_config(&config).unwrap();
    model::build(&config, &task, &Weights::open(&dir).unwrap(), "tokenizer", opset).unwrap()
}

#[test]
fn graphs_stay_as_they_are() {
    for name in ["tiny-bert-single", "tiny-bert-multi", "tiny-bert-regression"] {
        for opset in [14, 18] {
            insta::assert_snapshot!(format!("{name}-{opset}"), dump::dump(&exported(name, opset)));
        }
    }
}

#[test]
fn tmp_write() {
    let Ok(dir) = std::env::var("TK_TMP") else { return };
    for name in ["tiny-bert-single", "tiny-bert-multi", "tiny-bert-regression"] {
        for opset in tk::onnx::OPSETS {
            let path = Path::new(&dir).join(format!("{name}-{opset}.onnx"));
            write::save(exported(name, opset), &path, false).unwrap();
        }
        write::save(exported(name, 18), &Path::new(&dir).join(format!("{name}-ext.onnx")), true).unwrap();
    }
}
