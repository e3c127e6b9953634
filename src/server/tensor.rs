//! Tensors of the Open Inference Protocol: in the JSON, or as binary data behind it ⇄ numbers and texts. What is written
//! here comes from clients: sizes are checked before anything is read by them.

use std::fmt;
use std::str::from_utf8;

use serde::de::{DeserializeSeed, Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ObjectBuilder, Schema, SchemaType};
use utoipa::{PartialSchema, ToSchema};

use super::refusal::Refusal;

/// An input as it stands in the JSON.
#[derive(Deserialize, ToSchema)]
pub(super) struct InputTensor {
    pub name: String,
    /// `BYTES`, `INT64` or `INT32`
    datatype: String,
    shape: Vec<usize>,
    #[serde(default)]
    parameters: InputParameters,
    /// Texts or integers, row by row, in one list or in lists of lists; without it they stand behind the JSON.
    #[schema(schema_with = Listed::schema)]
    data: Option<Listed>,
}

#[derive(Default, Deserialize, ToSchema)]
struct InputParameters {
    /// Bytes of the tensor behind the JSON, where it has no `data`: little-endian; in front of each text its length in 4.
    binary_data_size: Option<usize>,
    /// Refused: there is no shared memory.
    shared_memory_region: Option<String>,
}

/// An input: as many elements as its shape says.
#[derive(Debug, PartialEq)]
pub struct Input {
    pub name: String,
    pub shape: Vec<usize>,
    pub elements: Elements,
}

/// The elements of a tensor, row by row.
#[derive(Debug, PartialEq)]
pub enum Elements {
    Texts(Vec<String>),
    Integers(Vec<i64>),
}

impl InputTensor {
    /// The tensor, whose binary data stands in front of what is left of `binary` then.
    ///
    /// # Errors
    /// Its data is of another type, has more or fewer elements than its shape, or is not there.
    pub fn read(self, binary: &mut &[u8]) -> Result<Input, Refusal> {
        let Self { name, datatype, shape, parameters, data } = self;
        let wrong = |why: String| Refusal::invalid(format!("{name}: {why}"));
        if parameters.shared_memory_region.is_some() {
            return Err(wrong("there is no shared memory here: send the data".to_owned()));
        }
        if shape.len() > MOST_DIMENSIONS {
            return Err(wrong(format!("{} dimensions, expected {MOST_DIMENSIONS} at most", shape.len())));
        }
        let count = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
        let count = count.ok_or_else(|| wrong(format!("the shape {shape:?} has too many elements")))?;
        let elements = match (data, parameters.binary_data_size) {
            (Some(_), Some(_)) => {
                return Err(wrong("has both data and binary_data_size: one of them is meant".to_owned()));
            }
            (None, None) => return Err(wrong("there is neither data nor binary_data_size".to_owned())),
            (Some(listed), None) => listed.elements(&datatype, &shape, count),
            (None, Some(size)) => {
                let Some((own, rest)) = binary.split_at_checked(size) else {
                    let left = binary.len();
                    return Err(wrong(format!(
                        "binary_data_size is {size}, and {left} bytes are left behind the JSON, whose length the header \
                         {JSON_LENGTH} says"
                    )));
                };
                *binary = rest;
                unpacked(&datatype, own, count)
            }
        };
        Ok(Input { elements: elements.map_err(wrong)?, name, shape })
    }
}

/// Dimensions of a tensor; those that are read here have two.
const MOST_DIMENSIONS: usize = 8;

/// The header that says how many bytes of a body are JSON, where binary data stands behind it.
pub(super) const JSON_LENGTH: &str = "inference-header-content-length";

/// So many elements of this type out of bytes.
fn unpacked(datatype: &str, bytes: &[u8], count: usize) -> Result<Elements, String> {
    let whole = |size: usize| match count.checked_mul(size) == Some(bytes.len()) {
        true => Ok(()),
        false => Err(format!("{} bytes, expected {count} elements of {size}", bytes.len())),
    };
    match datatype {
        "BYTES" => unpacked_texts(bytes, count).map(Elements::Texts),
        "INT64" => {
            whole(8)?;
            Ok(Elements::Integers(
                bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
            ))
        }
        "INT32" => {
            whole(4)?;
            let integer = |&bytes| i64::from(i32::from_le_bytes(bytes));
            Ok(Elements::Integers(bytes.as_chunks().0.iter().map(integer).collect()))
        }
        other => Err(other_type(other)),
    }
}

fn other_type(datatype: &str) -> String {
    format!("datatype {datatype:?}, expected BYTES, INT64 or INT32")
}

/// So many texts, each behind its length in four bytes.
fn unpacked_texts(mut bytes: &[u8], count: usize) -> Result<Vec<String>, String> {
    let mut texts = Vec::new(); // as many as there are, whatever the shape says
    while let Some((&length, rest)) = bytes.split_first_chunk() {
        let length = u32::from_le_bytes(length) as usize;
        let Some((text, rest)) = rest.split_at_checked(length) else {
            return Err(format!("element {} is of {length} bytes, and {} are left", texts.len(), rest.len()));
        };
        let text =
            from_utf8(text).map_err(|error| format!("element {} is no UTF-8: {error}", texts.len()))?;
        texts.push(text.to_owned());
        bytes = rest;
    }
    if !bytes.is_empty() {
        return Err(format!("{} bytes behind the last element", bytes.len()));
    }
    if texts.len() != count {
        return Err(format!("{} elements, expected {count} as the shape says", texts.len()));
    }
    Ok(texts)
}

/// Texts or integers in a list, or in lists of lists.
#[derive(Default)]
struct Listed {
    texts: Vec<String>,
    integers: Vec<i64>,
    /// The length of the lists at each depth, as far as one has ended; all are of one length.
    lengths: Vec<Option<usize>>,
    /// How deep the elements stand.
    depth: Option<usize>,
}

impl Listed {
    /// Its elements, of this type and shape.
    fn elements(self, datatype: &str, shape: &[usize], count: usize) -> Result<Elements, String> {
        let found = self.texts.len() + self.integers.len();
        let lengths: Vec<usize> = self.lengths.iter().copied().map(Option::unwrap_or_default).collect();
        if found != count || (lengths.len() > 1 && lengths != shape) {
            return Err(format!(
                "data of the shape {lengths:?}, expected {shape:?}, or {count} elements in one list"
            ));
        }
        let integers =
            |least: i64, most: i64| match self.integers.iter().find(|&x| !(least..=most).contains(x)) {
                Some(x) => Err(format!("{x} is no {datatype}")),
                None if self.texts.is_empty() => Ok(()),
                None => Err(format!("data has texts, expected {datatype}")),
            };
        match datatype {
            "BYTES" if self.integers.is_empty() => Ok(Elements::Texts(self.texts)),
            "BYTES" => Err("data has integers, expected texts".to_owned()),
            "INT64" => integers(i64::MIN, i64::MAX).map(|()| Elements::Integers(self.integers)),
            "INT32" => integers(i32::MIN.into(), i32::MAX.into()).map(|()| Elements::Integers(self.integers)),
            other => Err(other_type(other)),
        }
    }

    /// Takes note of an element.
    fn stands<E: Error>(&mut self, depth: usize) -> Result<(), E> {
        match *self.depth.get_or_insert(depth) == depth {
            true => Ok(()),
            false => Err(E::custom("elements stand beside lists")),
        }
    }

    fn schema() -> Schema {
        let lists = ArrayBuilder::new().items(ObjectBuilder::new().schema_type(SchemaType::AnyValue));
        let items = AnyOfBuilder::new().item(String::schema()).item(i64::schema()).item(lists);
        ArrayBuilder::new().items(items).build().into()
    }
}

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut listed = Self::default();
        from.deserialize_seq(Gather { listed: &mut listed, depth: 0 })?;
        Ok(listed)
    }
}

/// Gathers what stands in a list at a depth. Depths are bounded as those of all JSON are here.
struct Gather<'g> {
    listed: &'g mut Listed,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Gather<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Gather<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("texts or integers, in a list or in lists of lists")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { listed, depth } = self;
        if listed.lengths.len() <= depth {
            listed.lengths.resize(depth + 1, None);
        }
        let mut length = 0;
        while list.next_element_seed(Gather { listed: &mut *listed, depth: depth + 1 })?.is_some() {
            length += 1;
        }
        let known = *listed.lengths[depth].get_or_insert(length);
        if known != length {
            return Err(Error::custom(format!("lists of {known} and of {length} at one depth")));
        }
        Ok(())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<(), E> {
        self.listed.integers.push(number);
        self.listed.stands(self.depth)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<(), E> {
        let number =
            i64::try_from(number).map_err(|_| E::custom(format!("{number} is above {}", i64::MAX)))?;
        self.visit_i64(number)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.listed.texts.push(text.to_owned());
        self.listed.stands(self.depth)
    }
}

/// A tensor that is answered.
pub struct Output {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub data: OutputData,
}

/// Its elements, row by row.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum OutputData {
    Texts(Vec<String>),
    Numbers(Vec<f32>),
}

/// The same as it stands in the JSON.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputTensor {
    name: &'static str,
    /// `BYTES` or `FP32`
    datatype: &'static str,
    shape: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    parameters: Option<OutputParameters>,
    /// Row by row; or it stands behind the JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    data: Option<OutputData>,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct OutputParameters {
    /// Bytes behind the JSON.
    binary_data_size: usize,
}

impl Output {
    /// The tensor in the JSON, whose elements stand there or are added to `behind`.
    pub fn write(self, behind: Option<&mut Vec<u8>>) -> OutputTensor {
        let Self { name, shape, data } = self;
        let datatype = match data {
            OutputData::Texts(_) => "BYTES",
            OutputData::Numbers(_) => "FP32",
        };
        let Some(bytes) = behind else {
            return OutputTensor { name, datatype, shape, parameters: None, data: Some(data) };
        };
        let before = bytes.len();
        match data {
            OutputData::Texts(texts) => {
                for text in texts {
                    // shorter than 4 GiB, as all that is held here
                    bytes.extend((text.len() as u32).to_le_bytes());
                    bytes.extend(text.into_bytes());
                }
            }
            OutputData::Numbers(numbers) => bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes())),
        }
        let parameters = Some(OutputParameters { binary_data_size: bytes.len() - before });
        OutputTensor { name, datatype, shape, parameters, data: None }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(tensor: Value, binary: &[u8]) -> Result<(Input, usize), String> {
        let tensor: InputTensor =
            serde_json::from_str(&tensor.to_string()).map_err(|error| error.to_string())?;
        let mut left = binary;
        let input = tensor.read(&mut left).map_err(|refusal| refusal.message)?;
        Ok((input, left.len()))
    }

    fn tensor(datatype: &str, shape: Value, data: Value) -> Value {
        json!({"name": "x", "datatype": datatype, "shape": shape, "data": data})
    }

    fn binary(datatype: &str, shape: Value, size: usize) -> Value {
        json!({"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}})
    }

    #[test]
    fn flat_nested_and_binary_data_are_the_same() {
        let integers = [1i64, -2, 3, 4, 5, 6];
        let long: Vec<u8> = integers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let short: Vec<u8> = integers.iter().flat_map(|&x| (x as i32).to_le_bytes()).collect();
        for (found, left) in [
            read(tensor("INT64", json!([2, 3]), json!([1, -2, 3, 4, 5, 6])), &[]).unwrap(),
            read(tensor("INT32", json!([2, 3]), json!([[1, -2, 3], [4, 5, 6]])), &[]).unwrap(),
            read(binary("INT64", json!([2, 3]), 48), &long).unwrap(),
            read(binary("INT32", json!([2, 3]), 24), &short).unwrap(),
        ] {
            let elements = Elements::Integers(integers.to_vec());
            assert_eq!((found, left), (Input { name: "x".to_owned(), shape: vec![2, 3], elements }, 0));
        }
        // what is left is the next tensor's
        assert_eq!(read(binary("INT64", json!([1]), 8), &long).unwrap().1, 40);
        let texts = Elements::Texts(vec!["a".into(), "é😀".into()]);
        let bytes = [&[1, 0, 0, 0][..], b"a", &[6, 0, 0, 0], "é😀".as_bytes()].concat();
        assert_eq!(read(tensor("BYTES", json!([2]), json!(["a", "é😀"])), &[]).unwrap().0.elements, texts);
        assert_eq!(read(binary("BYTES", json!([2, 1]), bytes.len()), &bytes).unwrap().0.elements, texts);
        assert_eq!(
            read(binary("BYTES", json!([0]), 0), &[]).unwrap().0.elements,
            Elements::Texts(Vec::new())
        );
    }

    #[test]
    fn what_does_not_fit_its_shape_or_type_is_refused() {
        let bytes = |length: u32, text: &[u8]| [&length.to_le_bytes()[..], text].concat();
        for (given, behind, says) in [
            (tensor("INT64", json!([3]), json!([1, 2])), vec![], "data of the shape [2], expected [3]"),
            (tensor("INT64", json!([2, 3]), json!([[1, 2], [3, 4], [5, 6]])), vec![], "expected [2, 3]"),
            (tensor("INT64", json!([1, 2]), json!([[1], [2, 3]])), vec![], "lists of 1 and of 2"),
            (tensor("INT64", json!([2]), json!([1, [2]])), vec![], "elements stand beside lists"),
            (tensor("INT64", json!([2]), json!([1, "2"])), vec![], "data has texts"),
            (tensor("BYTES", json!([2]), json!(["1", 2])), vec![], "data has integers"),
            (tensor("INT64", json!([1]), json!([1.5])), vec![], "invalid type: floating point"),
            (tensor("INT64", json!([1]), json!([null])), vec![], "invalid type: null"),
            (tensor("INT64", json!([1]), json!([u64::MAX])), vec![], "is above"),
            (tensor("INT32", json!([1]), json!([1i64 << 40])), vec![], "is no INT32"),
            (tensor("FP32", json!([1]), json!([1])), vec![], "expected BYTES, INT64 or INT32"),
            (tensor("INT64", json!([u64::MAX, 2]), json!([1])), vec![], "too many elements"),
            (tensor("INT64", json!([-1]), json!([1])), vec![], "invalid value"),
            (tensor("INT64", json!(vec![1; 9]), json!([1])), vec![], "9 dimensions, expected 8 at most"),
            (tensor("INT64", json!([1]), json!(1)), vec![], "invalid type"),
            (json!({"name": "x", "datatype": "INT64", "shape": [1]}), vec![], "neither data nor"),
            (binary("INT64", json!([2]), 8), vec![0; 8], "8 bytes, expected 2 elements of 8"),
            (binary("INT64", json!([1]), 8), vec![0; 7], "binary_data_size is 8, and 7 bytes are left"),
            (binary("INT64", json!([1u64 << 61]), 0), vec![], "0 bytes, expected"),
            (binary("FP32", json!([1]), 4), vec![0; 4], "expected BYTES, INT64 or INT32"),
            (binary("BYTES", json!([1]), 5), bytes(2, b"a"), "is of 2 bytes, and 1 are left"),
            (binary("BYTES", json!([1]), 4), bytes(u32::MAX, b""), "and 0 are left"),
            (
                binary("BYTES", json!([1]), 7),
                [bytes(1, b"a"), vec![0; 2]].concat(),
                "2 bytes behind the last",
            ),
            (binary("BYTES", json!([2]), 5), bytes(1, b"a"), "1 elements, expected 2"),
            (binary("BYTES", json!([u32::MAX]), 0), vec![], "0 elements, expected"),
            (binary("BYTES", json!([1]), 5), bytes(1, b"\xff"), "is no UTF-8"),
            (
                json!({"name": "x", "datatype": "INT64", "shape": [1], "data": [1], "parameters": {"binary_data_size": 8}}),
                vec![0; 8],
                "both data and binary_data_size",
            ),
            (
                json!({"name": "x", "datatype": "INT64", "shape": [1], "parameters": {"shared_memory_region": "r"}}),
                vec![],
                "no shared memory",
            ),
        ] {
            let error = read(given.clone(), &behind).unwrap_err();
            assert!(error.contains(says), "{given}: {error}");
        }
    }

    proptest! {
        #[test]
        fn texts_that_are_written_are_read_again(texts in proptest::collection::vec(".{0,20}", 0..20)) {
            let mut bytes = Vec::new();
            let output = Output { name: "x", shape: vec![texts.len()], data: OutputData::Texts(texts.clone()) };
            let written = output.write(Some(&mut bytes));
            let found = read(binary("BYTES", json!([texts.len()]), bytes.len()), &bytes).unwrap();
            prop_assert_eq!(found.0.elements, Elements::Texts(texts));
            prop_assert_eq!(written.parameters.unwrap().binary_data_size, bytes.len());
        }

        #[test]
        fn any_bytes_are_read_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..64), size in 0usize..80, count in 0usize..10,
        ) {
            for datatype in ["BYTES", "INT64", "INT32"] {
                let _ = read(binary(datatype, json!([count]), size), &bytes);
            }
        }
    }
}
