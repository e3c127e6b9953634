use serde_json::{Value, json};

use super::*;

fn config(more: Value) -> ModelConfig {
    let mut raw = json!({
        "model_type": "bert", "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16,
    });
    raw.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ModelConfig::parse(&raw.to_string()).unwrap()
}

fn found(labels: Value, more: Value) -> Result<TextClassification> {
    let labels: Vec<&Value> = labels.as_array().unwrap().iter().collect();
    TextClassification::from_labels(&labels, None, TextClassification::known(&config(more))?)
}

fn targets(task: &TextClassification, labels: Value) -> Vec<Result<Wanted, String>> {
    let labels: Vec<&Value> = labels.as_array().unwrap().iter().collect();
    task.targets(&labels).into_iter().map(|target| target.map_err(|error| error.to_string())).collect()
}

fn task(problem: ProblemType, labels: &[&str]) -> TextClassification {
    TextClassification::new(problem, labels.iter().map(|&name| name.to_owned()).collect())
}

#[test]
fn the_problem_is_found_in_the_labels() {
    use ProblemType::*;
    for (labels, problem, names) in [
        (json!(["b", "a", "b"]), SingleLabelClassification, vec!["a", "b"]),
        (json!([10, 9, 10]), SingleLabelClassification, vec!["9", "10"]),
        (json!(["10", "9"]), SingleLabelClassification, vec!["9", "10"]),
        (json!([true, false]), SingleLabelClassification, vec!["0", "1"]),
        (json!([["b"], [], ["a", "c"]]), MultiLabelClassification, vec!["a", "b", "c"]),
        (json!([1, 0.5]), Regression, vec!["LABEL_0"]),
        (json!([1.0, 0.0]), Regression, vec!["LABEL_0"]), // a column of floats, as transformers' scripts
        (json!([0, u64::MAX]), SingleLabelClassification, vec!["0", "18446744073709551615"]),
        (json!(["1", "1", "01"]), SingleLabelClassification, vec!["01", "1"]),
        (json!(["-1", "+1", "0", "1"]), SingleLabelClassification, vec!["-1", "0", "+1", "1"]),
        (
            json!(["100000000000000000000000", "3"]),
            SingleLabelClassification,
            vec!["3", "100000000000000000000000"],
        ),
        (json!(["LABEL_10", "LABEL_9"]), SingleLabelClassification, vec!["LABEL_9", "LABEL_10"]),
        (json!(["3.5", "GPT-4", "Claude"]), SingleLabelClassification, vec!["3.5", "Claude", "GPT-4"]),
        (json!(["1", "0.5"]), Regression, vec!["LABEL_0"]),
    ] {
        let task = found(labels.clone(), json!({})).unwrap();
        assert_eq!(
            (task.problem, task.labels),
            (problem, names.into_iter().map(str::to_owned).collect()),
            "{labels}"
        );
    }
    for labels in [
        json!(["a", "a"]),
        json!(["a", {"b": 1}]),
        json!([0.5, "a"]),
        json!(["a", "b", ""]),
        json!(["a", "b", " "]),
        json!(["0.5", "0.25", ""]),
        json!(["0.5", "0.25", "NA"]),
        json!([0.5, 0.25, "NaN"]),
        json!([0.5, 1e300]),
        json!([1e22, 3]),
    ] {
        assert!(found(labels.clone(), json!({})).is_err(), "{labels}");
    }
}

#[test]
fn labels_that_the_model_knows_keep_its_order() {
    let known = json!({"id2label": {"0": "z", "1": "a"}});
    for labels in [json!(["a", "z"]), json!(["a"]), json!([1, 0])] {
        assert_eq!(found(labels, known.clone()).unwrap().labels, ["z", "a"]);
    }
    assert_eq!(found(json!(["a", "new"]), known).unwrap().labels, ["a", "new"]);
}

#[test]
fn ids_of_labels_do_not_depend_on_the_order_of_the_rows() {
    let mut names: Vec<String> = (0..40).map(|i| [format!("{i}"), format!("{i}a")][i % 2].clone()).collect();
    names.extend(["1a".to_owned(), "007".to_owned(), "7".to_owned(), "-0".to_owned(), "0".to_owned()]);
    let expected = found(json!(names), json!({})).unwrap().labels;
    assert_eq!(expected.len(), 43); // 1a and 0 stand there twice
    for turn in 0..names.len() {
        names.rotate_left(turn);
        names.reverse();
        assert_eq!(found(json!([&names[..], &names[..]].concat()), json!({})).unwrap().labels, expected);
    }
    let mixed = found(json!(["2", "1a", "10", "2"]), json!({})).unwrap();
    assert_eq!(mixed.labels, ["10", "1a", "2"]); // as text, for one of them is no integer
}

#[test]
fn an_integer_is_an_id_only_where_no_label_is_an_integer() {
    let single = |labels| task(ProblemType::SingleLabelClassification, labels);
    for labels in
        [&["1", "2", "3"][..], &["-1", "1"], &["2", "4"], &["a", "7"], &["10000000000000000000000", "1"]]
    {
        let read = targets(&single(labels), json!([0, "0", false]));
        assert!(
            read.iter().all(|target| target.as_ref().is_err_and(|e| e.contains("is not one of"))),
            "{labels:?}"
        );
    }
    assert_eq!(
        targets(&single(&["1", "2"]), json!([1, "2", 2.0])),
        [0, 1, 1].map(|id| Ok(Wanted::Class(id)))
    );
    assert_eq!(
        targets(&single(&["b", "a"]), json!([1, "b", "1"])),
        [1, 0, 1].map(|id| Ok(Wanted::Class(id)))
    );
    assert!(targets(&single(&["b", "a"]), json!(["01", "+1", 2])).iter().all(Result::is_err));
    let several = task(ProblemType::MultiLabelClassification, &["1", "2", "3"]);
    assert!(targets(&several, json!([[0], []]))[0].is_err());

    let of_stars = json!({"id2label": {"0": "1", "1": "2", "2": "3"}});
    assert_eq!(found(json!([0, 1, 2]), of_stars.clone()).unwrap().labels, ["0", "1", "2"]);
    assert_eq!(found(json!([3, 1]), of_stars).unwrap().labels, ["1", "2", "3"]);
}

#[test]
fn labels_of_a_base_of_another_task_are_not_taken_over() {
    let base = |architecture: &str, more: Value| {
        let mut base = json!({"id2label": {"0": "O", "1": "B-LOC"}, "architectures": [architecture]});
        base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        base
    };
    for name in ["BertForTokenClassification", "BertForMultipleChoice", "BertForMaskedLM", "BertModel"] {
        assert_eq!(found(json!([0, 1]), base(name, json!({}))).unwrap().labels, ["0", "1"], "{name}");
    }
    let same = "BertForSequenceClassification";
    assert_eq!(found(json!([0, 1]), base(same, json!({}))).unwrap().labels, ["O", "B-LOC"]);
    // an odd id2label is that of the base: what another task wrote is not even looked at
    let odd = json!({"id2label": {"1": "a", "2": "b"}});
    assert!(found(json!([0, 1]), base(same, odd.clone())).is_err());
    assert!(found(json!([0, 1]), base("BertForTokenClassification", odd)).is_ok());
    let regression = json!({"id2label": {"0": "LABEL_0"}});
    assert_eq!(found(json!([["0"], []]), base(same, regression)).unwrap().labels, ["0"]);
}

#[test]
fn lists_of_0_and_1_of_one_length_are_multi_hot() {
    for labels in [json!([[1, 0, 0], [0, 1, 1]]), json!([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])] {
        let task = found(labels.clone(), json!({})).unwrap();
        assert_eq!(task.labels, ["LABEL_0", "LABEL_1", "LABEL_2"]);
        let read = targets(&task, labels);
        assert_eq!(read, [Ok(Wanted::Classes(vec![0])), Ok(Wanted::Classes(vec![1, 2]))]);
        assert_eq!(targets(&task, json!([["LABEL_1"], [2]]))[0], Ok(Wanted::Classes(vec![1])));
    }
    let named = json!({"id2label": {"0": "x", "1": "y"}});
    assert_eq!(found(json!([[1, 0], [1, 1]]), named).unwrap().labels, ["x", "y"]);
    // ids and names stay what they are
    assert_eq!(found(json!([[0], [1], [1]]), json!({})).unwrap().labels, ["0", "1"]);
    assert_eq!(found(json!([[0, 1], [2]]), json!({})).unwrap().labels, ["0", "1", "2"]);
    let by_name = task(ProblemType::MultiLabelClassification, &["0", "1"]);
    assert_eq!(targets(&by_name, json!([[1, 0]])), [Ok(Wanted::Classes(vec![0, 1]))]);
    assert_eq!(targets(&by_name, json!([[1, 1]])), [Ok(Wanted::Classes(vec![0, 1]))]);
    // neither the one nor the other
    for labels in
        [json!([[1, 0, 0], [1, 0]]), json!([[1, 0, 0], []]), json!([[1, 0, 0], "a"]), json!([[1.0, 2.0]])]
    {
        assert!(found(labels.clone(), json!({})).is_err(), "{labels}");
    }
    let four = task(ProblemType::MultiLabelClassification, &["a", "b", "c", "d"]);
    assert!(targets(&four, json!([[1, 0, 0]]))[0].as_ref().is_err_and(|e| e.contains("multi-hot")));
    assert!(targets(&four, json!([[1.0, 0.0]]))[0].is_err());
}

#[test]
fn an_odd_id2label_is_refused_by_name() {
    for (odd, says) in [
        (json!({"0": "same", "1": "same"}), "names the ids 0 and 1 both \"same\""),
        (json!(["a", "b"]), "id2label is [\"a\",\"b\"], expected an object"),
        (json!({}), "id2label is {}"),
        (json!({"1": "a", "2": "b"}), "id2label has \"2\""),
        (json!({"0": 0, "1": 1}), "id2label has \"0\": 0"),
        (json!({"1": "a", "01": "b"}), "id2label repeats an id"),
    ] {
        let error = TextClassification::from_config(&config(json!({"id2label": odd}))).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(TextClassification::from_config(&config(json!({"num_labels": 1_u64 << 60}))).is_err());
}

#[test]
fn what_is_measured_is_what_is_served() {
    // logits that a softmax or a sigmoid of 32 bits can't tell apart
    let near = [90.0, 90.000_01, -20.0];
    let single = task(ProblemType::SingleLabelClassification, &["a", "b", "c"]);
    assert_eq!(single.prediction(&near, false)["label"], json!("b"));
    assert_eq!(single.predicted(&near), [1]);
    let several = task(ProblemType::MultiLabelClassification, &["a", "b", "c"]);
    let small = [1e-9, 0.0, -1e-9];
    assert_eq!(several.prediction(&small, false)["labels"], json!(["a"]));
    assert_eq!(several.predicted(&small), [0]);
}

#[test]
fn what_is_written_reads_back() {
    for problem in [ProblemType::SingleLabelClassification, ProblemType::MultiLabelClassification] {
        let task = TextClassification::new(problem, vec!["b".to_owned(), "a".to_owned()]);
        let mut config = config(json!({}));
        task.write_config(&mut config);
        assert_eq!(TextClassification::from_config(&config).unwrap(), task);
    }
}

#[test]
fn one_label_without_a_problem_type_is_a_regression_as_in_transformers() {
    let task = TextClassification::from_config(&config(json!({"id2label": {"0": "LABEL_0"}}))).unwrap();
    assert_eq!(task.problem, ProblemType::Regression);
    assert_eq!(TextClassification::from_config(&config(json!({}))).unwrap().labels, ["LABEL_0", "LABEL_1"]);
}

#[test]
fn predictions_say_what_the_problem_asks_for() {
    let labels = vec!["a".to_owned(), "b".to_owned()];
    let task = |problem| TextClassification::new(problem, labels.clone());
    let single = task(ProblemType::SingleLabelClassification).prediction(&[0.0, 3.0f32.ln()], true);
    assert_eq!((&single["label"], &single["logits"][0]), (&json!("b"), &json!(0.0)));
    assert!((single["score"].as_f64().unwrap() - 0.75).abs() < 1e-6);
    let multi = task(ProblemType::MultiLabelClassification).prediction(&[0.0, 2.0], false);
    assert_eq!(multi["labels"], json!(["b"]));
    assert_eq!(multi["scores"]["a"], json!(0.5));
    // large logits overflow nothing
    let large = task(ProblemType::SingleLabelClassification).prediction(&[1e4, -1e4], false);
    assert_eq!(large["score"], json!(1.0));
}
