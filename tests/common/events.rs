//! TensorBoard's event files, read by the definition of their format and shown as TensorBoard shows them.

use std::collections::BTreeMap;
use std::path::Path;

/// The scalars of a folder by step and tag: files in the order of their names, and what stands behind the step of a start
/// is forgotten.
pub fn scalars(folder: &Path) -> BTreeMap<(u64, String), f32> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_ours = |path: &std::path::PathBuf| path.to_string_lossy().contains("tfevents");
    let mut paths: Vec<_> = paths.filter(is_ours).collect();
    paths.sort();
    let mut all = BTreeMap::new();
    for path in paths {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        while rest.len() >= 16 {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            take(&rest[12..12 + length], &mut all);
            rest = &rest[16 + length..];
        }
        assert!(rest.is_empty(), "half a record");
    }
    all
}

fn take(event: &[u8], all: &mut BTreeMap<(u64, String), f32>) {
    let fields = fields(event);
    let step = number(&fields, 2).unwrap_or(0);
    match (message(&fields, 5), message(&fields, 7)) {
        (Some(summary), _) => {
            for (_, value) in self::fields(summary) {
                let Field::Bytes(value) = value else { panic!("no value") };
                let value = self::fields(value);
                let tag = String::from_utf8(message(&value, 1).unwrap().to_vec()).unwrap();
                let Some((_, Field::Four(bits))) = value.iter().find(|(number, _)| *number == 2) else {
                    panic!("{tag} has no value")
                };
                let before = all.insert((step, tag.clone()), f32::from_bits(*bits));
                assert!(before.is_none(), "{tag} of step {step} stands there twice");
            }
        }
        (None, Some(_)) => all.retain(|(of, _), _| *of < step),
        (None, None) => {}
    }
}

enum Field<'a> {
    Number(u64),
    Four(u32),
    Bytes(&'a [u8]),
}

fn number(fields: &[(u64, Field)], wanted: u64) -> Option<u64> {
    fields.iter().find_map(|(number, field)| match field {
        Field::Number(value) if *number == wanted => Some(*value),
        _ => None,
    })
}

fn message<'a>(fields: &[(u64, Field<'a>)], wanted: u64) -> Option<&'a [u8]> {
    fields.iter().find_map(|(number, field)| match field {
        Field::Bytes(bytes) if *number == wanted => Some(*bytes),
        _ => None,
    })
}

/// The fields of a protobuf message, by their numbers.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(split(&mut bytes, 8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(split(&mut bytes, length))
            }
            5 => Field::Four(u32::from_le_bytes(split(&mut bytes, 4).try_into().unwrap())),
            other => panic!("wire type {other}"),
        };
        found.push((key >> 3, field));
    }
    found
}

fn split<'a>(bytes: &mut &'a [u8], at: usize) -> &'a [u8] {
    let (head, rest) = bytes.split_at(at);
    *bytes = rest;
    head
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = split(bytes, 1)[0];
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            break;
        }
    }
    value
}
