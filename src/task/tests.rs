use clap::{Args, CommandFactory, Parser};

use super::*;

#[derive(Parser)]
struct Cli<F: Args> {
    #[command(flatten)]
    flags: F,
}

/// Every flag of a group, with a value that it takes.
fn every<F: Args + Default>() -> Vec<Vec<String>> {
    let command = Cli::<F>::command();
    let flags = command.get_arguments().filter_map(|arg| Some((arg, arg.get_long()?)));
    flags
        .map(|(arg, long)| {
            let values = arg.get_possible_values();
            let value = match values.first() {
                Some(first) => first.get_name().to_owned(),
                None if long == "format" => "csv".to_owned(),
                None if long == "encoding" => "utf-16".to_owned(),
                None => "1".to_owned(),
            };
            let flag = format!("--{long}");
            if arg.get_action().takes_values() { vec![flag, value] } else { vec![flag] }
        })
        .collect()
}

/// The tasks that take a flag, by what `check` says of it.
fn takers<F: Args + Default>(given: &[String], check: impl Fn(&F, &str) -> Result<()>) -> Vec<&'static str> {
    let args = ["tk".to_owned()].into_iter().chain(given.iter().cloned());
    let flags = Cli::<F>::parse_from(args).flags;
    let takes = |task: &&str| match check(&flags, task) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(crate::error::exit_code(&error), 2);
            assert!(error.to_string().starts_with(&given[0]), "{given:?}: {error}");
            false
        }
    };
    Task::NAMES.iter().copied().filter(takes).collect()
}

#[test]
fn a_flag_is_taken_by_its_own_task_alone_and_refused_by_name_elsewhere() {
    let files = [Path::new("a.txt"), Path::new("b.conll")];
    let all = Task::NAMES.len();
    for given in every::<RecordFlags>() {
        let tasks = takers(&given, |flags: &RecordFlags, task| flags.check(task, &files));
        match given[0].as_str() {
            "--format" | "--encoding" => assert_eq!(tasks.len(), all),
            "--text-column" => assert_eq!(
                tasks,
                [
                    TextClassification::NAME,
                    MaskedLm::NAME,
                    NextSentence::NAME,
                    PreTraining::NAME,
                    CausalLm::NAME
                ]
            ),
            "--text-unit" => {
                assert_eq!(tasks, [MaskedLm::NAME, NextSentence::NAME, PreTraining::NAME, CausalLm::NAME]);
            }
            flag => assert_eq!(tasks.len(), 1, "{flag}: {tasks:?}"),
        }
    }
    for given in every::<TrainingFlags>() {
        let tasks = takers(&given, TrainingFlags::check);
        match given[0].as_str() {
            "--mask-probability" | "--whole-words" => assert_eq!(tasks, [MaskedLm::NAME, PreTraining::NAME]),
            flag if flags::LABEL_FLAGS.contains(&flag) => {
                assert_eq!(tasks, [TextClassification::NAME, TokenClassification::NAME]);
            }
            flag => assert_eq!(tasks.len(), 1, "{flag}: {tasks:?}"),
        }
    }
    for given in every::<AnswerFlags>() {
        let tasks = takers(&given, AnswerFlags::check);
        match given[0].as_str() {
            "--format" | "--encoding" => assert_eq!(tasks.len(), all),
            "--text-column" => assert_eq!(
                tasks,
                [
                    TextClassification::NAME,
                    TokenClassification::NAME,
                    MaskedLm::NAME,
                    NextSentence::NAME,
                    PreTraining::NAME,
                    Embedding::NAME
                ]
            ),
            "--text-pair-column" => assert_eq!(
                tasks,
                [TextClassification::NAME, NextSentence::NAME, PreTraining::NAME, Embedding::NAME]
            ),
            "--offset-unit" => assert_eq!(tasks, [TokenClassification::NAME, QuestionAnswering::NAME]),
            "--top-k" => assert_eq!(
                tasks,
                [QuestionAnswering::NAME, MaskedLm::NAME, PreTraining::NAME, CausalLm::NAME]
            ),
            flag => assert_eq!(tasks.len(), 1, "{flag}: {tasks:?}"),
        }
    }
}

#[test]
fn a_flag_that_says_nothing_of_the_files_is_refused() {
    let csv = [Path::new("a.csv")];
    for (flag, value, task) in
        [("--text-unit", "file", CausalLm::NAME), ("--tag-column", "2", TokenClassification::NAME)]
    {
        let parse = |args: &[&str]| Cli::<RecordFlags>::parse_from(args).flags;
        let error = parse(&["tk", flag, value]).check(task, &csv).unwrap_err();
        assert!(error.to_string().starts_with(flag), "{error}");
    }
    let named = Cli::<RecordFlags>::parse_from(["tk", "--tag-column", "2", "--format", "conll"]).flags;
    named.check(TokenClassification::NAME, &csv).unwrap();
}

#[test]
fn an_example_of_another_task_is_an_error() {
    let scheme = token_classification::scheme::Scheme::None;
    let task = Task::from(TokenClassification::new(vec!["O".to_owned()], scheme));
    let target = Target::TextClassification(text_classification::Window::whole(
        0,
        text_classification::Wanted::Class(0),
    ));
    let example = Example { encoding: Encoding::default(), target };
    let error = task.measure_outputs(&[Outputs::new()], &[example]).unwrap_err();
    assert!(error.to_string().contains("another task than token-classification"), "{error}");
}
