//! What a model's graph takes and gives over the Open Inference Protocol: tensors of tokens → the sequences of a batch →
//! the graph's outputs, as tensors. A sequence does not depend on those beside it: padding is taken off it before it waits
//! for a batch, and put behind its numbers, as 0, in the answer.

use super::refusal::Refusal;
use super::tensor::{self, Elements, Input, OutputData};
use crate::data::batch::Encoding;
use crate::task::{Dim, Output, Outputs};

/// The tensors that a graph may take here, (rows, tokens) each.
pub const TOKENS: &str = "input_ids";
const MASK: &str = "attention_mask";
const TYPES: &str = "token_type_ids";

/// Numbers of the outputs of a request (64 MiB): what a vocabulary's scores of many tokens would go beyond.
const MOST_NUMBERS: usize = 16 << 20;

/// What a model's graph takes and gives.
#[derive(Clone, Debug)]
pub struct Signature {
    /// The inputs' names, in the graph's order.
    pub inputs: Vec<String>,
    pub outputs: Vec<Output>,
    /// Tokens that there are.
    pub vocabulary: usize,
    /// Types of tokens that there are.
    pub token_types: usize,
    /// Tokens of the longest sequence.
    pub max_length: usize,
}

/// Sequences that a request asks with.
#[derive(Debug, PartialEq)]
pub struct Rows {
    /// Each without its padding.
    pub sequences: Vec<Encoding>,
    /// Tokens of a row, with padding.
    pub width: usize,
}

impl Signature {
    /// The sequences that tensors have. All ones stand for a mask that is not there, zeros for types.
    ///
    /// # Errors
    /// A tensor is unknown, of another shape or type; an id is none of the model's; a row has no token or too many; or
    /// its mask has a hole.
    pub fn rows(&self, inputs: Vec<Input>) -> Result<Rows, Refusal> {
        let mut given: Vec<(String, Vec<i64>)> = Vec::new();
        let mut shape = None;
        for Input { name, shape: own, elements } in inputs {
            if !self.inputs.contains(&name) {
                return Err(Refusal::invalid(format!(
                    "the graph takes no {name:?}, but {}",
                    self.inputs.join(", ")
                )));
            }
            if given.iter().any(|(known, _)| *known == name) {
                return Err(Refusal::invalid(format!("two inputs are named {name}")));
            }
            let (&[rows, width], Elements::Integers(numbers)) = (&own[..], elements) else {
                return Err(Refusal::invalid(format!(
                    "{name} has the shape {own:?}, expected integers of the shape [rows, tokens]"
                )));
            };
            if *shape.get_or_insert((rows, width)) != (rows, width) {
                return Err(Refusal::invalid(format!(
                    "{name} has the shape {own:?}, and another input another one"
                )));
            }
            given.push((name, numbers));
        }
        let mut take =
            |name: &str| given.extract_if(.., |(known, _)| known == name).next().map(|(_, numbers)| numbers);
        let (Some((rows, width)), Some(ids)) = (shape, take(TOKENS)) else {
            return Err(Refusal::invalid(format!("there is no {TOKENS}")));
        };
        if rows == 0 {
            return Err(Refusal::empty("there is no row in it"));
        }
        let (mask, types) = (take(MASK), take(TYPES));
        let row = |numbers: &Option<Vec<i64>>, row: usize| {
            numbers.as_ref().map(|all| all[row * width..][..width].to_vec())
        };
        let ids = Some(ids);
        let sequences = (0..rows).map(|at| {
            let sequence = self.sequence(row(&ids, at).unwrap_or_default(), row(&mask, at), row(&types, at));
            sequence.map_err(|why| Refusal::invalid(format!("row {at}: {why}")))
        });
        Ok(Rows { sequences: sequences.collect::<Result<_, _>>()?, width })
    }

    /// One row without its padding.
    fn sequence(
        &self,
        ids: Vec<i64>,
        mask: Option<Vec<i64>>,
        types: Option<Vec<i64>>,
    ) -> Result<Encoding, String> {
        let length = match &mask {
            None => ids.len(),
            Some(mask) => {
                if let Some(other) = mask.iter().find(|&&one| one != 0 && one != 1) {
                    return Err(format!("{MASK} has {other}, expected 0 and 1"));
                }
                let length = mask.iter().take_while(|&&one| one == 1).count();
                if mask[length..].contains(&1) {
                    return Err(format!(
                        "{MASK} is 0 at {length} and 1 behind it: padding stands at the end"
                    ));
                }
                length
            }
        };
        if length == 0 || length > self.max_length {
            return Err(format!("{length} tokens, expected 1 to {}", self.max_length));
        }
        let of = |name: &str, numbers: Vec<i64>, below: usize| {
            let number = |x: i64| match u32::try_from(x) {
                Ok(id) if (id as usize) < below => Ok(id),
                _ => Err(format!("{name} has {x}, expected 0 to {}", below.saturating_sub(1))),
            };
            numbers.into_iter().take(length).map(number).collect::<Result<Vec<u32>, String>>()
        };
        let ids = of(TOKENS, ids, self.vocabulary)?;
        let type_ids =
            types.map_or_else(|| Ok(vec![0; length]), |types| of(TYPES, types, self.token_types))?;
        Ok(Encoding { ids, type_ids, truncated: false })
    }

    /// Which of the outputs these names are; all where there is no name.
    ///
    /// # Errors
    /// The graph has no such output, or it is named twice.
    pub fn chosen<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<Vec<usize>, Refusal> {
        let mut chosen = Vec::new();
        for name in names {
            let Some(at) = self.outputs.iter().position(|output| output.name == name) else {
                let known: Vec<&str> = self.outputs.iter().map(|output| output.name).collect();
                return Err(Refusal::invalid(format!(
                    "the graph gives no {name:?}, but {}",
                    known.join(", ")
                )));
            };
            if chosen.contains(&at) {
                return Err(Refusal::invalid(format!("the output {name} is asked for twice")));
            }
            chosen.push(at);
        }
        Ok(if chosen.is_empty() { (0..self.outputs.len()).collect() } else { chosen })
    }

    /// Refuses outputs that would have too many numbers.
    ///
    /// # Errors
    /// Says how many.
    pub fn check_size(&self, chosen: &[usize], rows: &Rows) -> Result<(), Refusal> {
        let shapes = chosen.iter().map(|&at| shape(&self.outputs[at], rows.sequences.len(), rows.width));
        let numbers = shapes.map(|shape| shape.into_iter().fold(1, usize::saturating_mul));
        let numbers = numbers.fold(0, usize::saturating_add);
        if numbers > MOST_NUMBERS {
            return Err(Refusal::too_large(format!(
                "the outputs would have {numbers} numbers, and {MOST_NUMBERS} are allowed: ask for fewer rows, or name other \
                 outputs"
            )));
        }
        Ok(())
    }

    /// The chosen outputs of all rows, of which each has its own, in the order of `chosen`.
    pub fn tensors(&self, chosen: &[usize], rows: &[Outputs], width: usize) -> Vec<tensor::Output> {
        let tensor = |(place, &at): (usize, &usize)| {
            let output = &self.outputs[at];
            let shape = shape(output, rows.len(), width);
            let of_row = shape.iter().skip(1).product();
            let mut numbers = Vec::with_capacity(rows.len() * of_row);
            for (i, row) in rows.iter().enumerate() {
                numbers.extend(row.get(place).into_iter().flatten().take(of_row));
                numbers.resize((i + 1) * of_row, 0.0);
            }
            tensor::Output { name: output.name, shape, data: OutputData::Numbers(numbers) }
        };
        chosen.iter().enumerate().map(tensor).collect()
    }
}

/// The shape of an output of so many rows of so many tokens.
fn shape(output: &Output, rows: usize, width: usize) -> Vec<usize> {
    let size = |dim: &Dim| match *dim {
        Dim::Of(size) => size,
        Dim::Batch => rows,
        _ => width,
    };
    output.dims.iter().map(size).collect()
}

/// The shape of an output as metadata tell it: −1 is any size.
pub fn any_shape(output: &Output) -> Vec<i64> {
    let size = |dim: &Dim| match *dim {
        Dim::Of(size) => size as i64,
        _ => -1,
    };
    output.dims.iter().map(size).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    fn signature() -> Signature {
        let output = |name, dims: &[Dim]| Output { name, dims: dims.to_vec() };
        Signature {
            inputs: [TOKENS, MASK, TYPES].map(str::to_owned).to_vec(),
            outputs: vec![
                output("hidden", &[Dim::Batch, Dim::Sequence, Dim::Of(2)]),
                output("logits", &[Dim::Batch, Dim::Of(3)]),
                output("start", &[Dim::Batch, Dim::Sequence]),
            ],
            vocabulary: 10,
            token_types: 2,
            max_length: 4,
        }
    }

    fn input(name: &str, shape: &[usize], numbers: &[i64]) -> Input {
        Input { name: name.to_owned(), shape: shape.to_vec(), elements: Elements::Integers(numbers.to_vec()) }
    }

    #[test]
    fn padding_is_taken_off_and_what_is_not_given_is_plain() {
        let shape = [2, 3];
        let ids = || input(TOKENS, &shape, &[5, 6, 0, 7, 8, 9]);
        let found = signature().rows(vec![
            input(TYPES, &shape, &[0, 1, 1, 0, 0, 0]),
            input(MASK, &shape, &[1, 1, 0, 1, 1, 1]),
            ids(),
        ]);
        let found = found.unwrap();
        assert_eq!(found.width, 3);
        assert_eq!((&found.sequences[0].ids, &found.sequences[0].type_ids), (&vec![5, 6], &vec![0, 1]));
        assert_eq!(found.sequences[1].ids, [7, 8, 9]);
        let plain = signature().rows(vec![ids()]).unwrap();
        assert_eq!((&plain.sequences[0].ids, &plain.sequences[0].type_ids), (&vec![5, 6, 0], &vec![0; 3]));
        // as long as the model takes, whatever padding stands behind
        let wide = signature()
            .rows(vec![input(TOKENS, &[1, 6], &[1; 6]), input(MASK, &[1, 6], &[1, 1, 1, 1, 0, 0])]);
        assert_eq!(wide.unwrap().sequences[0].ids.len(), 4);
    }

    #[test]
    fn rows_that_are_none_of_the_models_are_refused() {
        let shape = [1, 3];
        let ids = || input(TOKENS, &shape, &[5, 6, 7]);
        let text =
            Input { name: TOKENS.into(), shape: vec![1, 1], elements: Elements::Texts(vec!["a".into()]) };
        for (inputs, says) in [
            (vec![], "there is no input_ids"),
            (vec![input(MASK, &shape, &[1; 3])], "there is no input_ids"),
            (vec![input(TOKENS, &[3], &[1; 3])], "has the shape [3], expected"),
            (vec![input(TOKENS, &[0, 3], &[])], "there is no row"),
            (vec![input(TOKENS, &[1, 0], &[])], "row 0: 0 tokens, expected 1 to 4"),
            (vec![input(TOKENS, &[1, 5], &[1; 5])], "row 0: 5 tokens, expected 1 to 4"),
            (vec![input(TOKENS, &shape, &[5, -1, 7])], "input_ids has -1, expected 0 to 9"),
            (vec![input(TOKENS, &shape, &[5, 10, 7])], "input_ids has 10, expected 0 to 9"),
            (vec![input(TOKENS, &shape, &[5, 1 << 32, 7])], "expected 0 to 9"),
            (vec![ids(), input(MASK, &shape, &[1, 0, 1])], "is 0 at 1 and 1 behind it"),
            (vec![ids(), input(MASK, &shape, &[0, 1, 1])], "is 0 at 0 and 1 behind it"),
            (vec![ids(), input(MASK, &shape, &[0, 0, 0])], "0 tokens"),
            (vec![ids(), input(MASK, &shape, &[1, 2, 0])], "attention_mask has 2"),
            (vec![ids(), input(MASK, &[3, 1], &[1; 3])], "and another input another one"),
            (vec![ids(), input(TYPES, &shape, &[0, 2, 0])], "token_type_ids has 2, expected 0 to 1"),
            (vec![ids(), ids()], "two inputs are named input_ids"),
            (vec![ids(), input("position_ids", &shape, &[1; 3])], "takes no \"position_ids\", but input_ids"),
            (vec![text], "expected integers"),
        ] {
            let error = signature().rows(inputs).unwrap_err().message;
            assert!(error.contains(says), "{error}, expected {says}");
        }
    }

    #[test]
    fn outputs_are_chosen_by_name_bounded_and_padded() {
        let signature = signature();
        assert_eq!(signature.chosen([].into_iter()).unwrap(), [0, 1, 2]);
        let chosen = signature.chosen(["start", "hidden"].into_iter()).unwrap();
        assert_eq!(chosen, [2, 0]);
        assert!(
            signature.chosen(["answer"].into_iter()).unwrap_err().message.contains("hidden, logits, start")
        );
        assert!(signature.chosen(["start", "start"].into_iter()).is_err());
        let rows = [
            vec![array![[1.0], [2.0]], array![[1.0, 2.0], [3.0, 4.0]]],
            vec![array![[5.0], [6.0], [7.0]], array![[5.0, 6.0], [7.0, 8.0], [9.0, 10.0]]],
        ];
        let tensors = signature.tensors(&chosen, &rows, 3);
        assert_eq!((&tensors[0].shape[..], &tensors[1].shape[..]), (&[2, 3][..], &[2, 3, 2][..]));
        let numbers = |i: usize| match &tensors[i].data {
            OutputData::Numbers(numbers) => numbers.clone(),
            OutputData::Texts(_) => unreachable!(),
        };
        assert_eq!(numbers(0), [1.0, 2.0, 0.0, 5.0, 6.0, 7.0]);
        assert_eq!(numbers(1), [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]);
        let wide = |width| Rows { sequences: vec![Encoding::default()], width };
        assert!(signature.check_size(&[0], &wide(MOST_NUMBERS / 2)).is_ok());
        let error = signature.check_size(&[0, 1], &wide(MOST_NUMBERS / 2)).unwrap_err();
        assert_eq!(error.status.as_u16(), 413, "{}", error.message);
        assert!(signature.check_size(&[0], &wide(usize::MAX)).is_err());
    }
}
