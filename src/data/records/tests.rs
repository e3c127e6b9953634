use std::io::Write;

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A file of the given name and bytes, in a directory that lives as long as the result.
fn file(name: &str, bytes: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// What reading the bytes gives: (line, the fields or the message).
fn items(name: &str, bytes: impl AsRef<[u8]>) -> Vec<(usize, Result<Value, String>)> {
    items_of(name, bytes, How::default())
}

fn items_of(name: &str, bytes: impl AsRef<[u8]>, how: How) -> Vec<(usize, Result<Value, String>)> {
    let (_dir, path) = file(name, bytes);
    let rows = read(&Source::Path(path.clone()), &how).unwrap();
    let items: Vec<_> = rows
        .map(|item| match item.unwrap() {
            Ok(row) => (row.line, Ok(Value::Object(row.fields))),
            Err(bad) => (bad.line, Err(bad.message)),
        })
        .collect();
    assert_eq!(count(&path, &how).unwrap(), items.len(), "records that were counted and not read");
    items
}

/// The error of opening or reading whole.
fn refused(name: &str, bytes: impl AsRef<[u8]>) -> String {
    refused_of(name, bytes, How::default())
}

fn refused_of(name: &str, bytes: impl AsRef<[u8]>, how: How) -> String {
    let (_dir, path) = file(name, bytes);
    let error = read_examples(&(&path).into(), &how, Ok).unwrap_err();
    assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
    format!("{error:#}").replace(&format!("{}/", path.parent().unwrap().display()), "")
}

#[test]
fn a_jsonl_line_is_a_row_or_says_what_is_wrong_with_it() {
    let bytes = b"\xef\xbb\xbf{\"text\": \"a\\nb\", \"label\": [1, 2.5]}\r\n\n[1]\n{\"text\": \"\xff\"}\n{\"text\": }\n{}";
    assert_eq!(
        items("a.jsonl", bytes),
        [
            (1, Ok(json!({"text": "a\nb", "label": [1, 2.5]}))),
            (2, Err("empty line".into())),
            (3, Err("a list; a JSON object was expected".into())),
            (4, Err("not UTF-8: byte 11 of the line; --encoding names another encoding".into())),
            (5, Err("not JSON: expected value, at column 10".into())),
            (6, Ok(json!({}))),
        ]
    );
}

#[test]
fn txt_keeps_empty_lines_and_refuses_what_is_not_utf8() {
    assert_eq!(
        items("a.txt", b"\xef\xbb\xbfone\r\n\ntw\xffo\ntwo\rx\n"),
        [
            (1, Ok(json!({"text": "one"}))),
            (2, Ok(json!({"text": ""}))),
            (3, Err("not UTF-8: byte 3 of the line; --encoding names another encoding".into())),
            (4, Ok(json!({"text": "two\rx"}))),
        ]
    );
    assert_eq!(items("a.txt", ""), []);
    assert_eq!(items("a.txt", "\u{feff}"), []);
}

#[test]
fn csv_fields_may_hold_commas_quotes_and_lines() {
    let text = "\u{feff}text,label\r\n\"a, \"\"b\"\"\r\nc\",1\r\n\r\n\"\",\r\nonly\r\nx,y,z\r\nlast,2";
    assert_eq!(
        items("a.csv", text),
        [
            (2, Ok(json!({"text": "a, \"b\"\r\nc", "label": "1"}))),
            (5, Ok(json!({"text": "", "label": ""}))),
            (6, Err("1 fields; the header has 2: text, label".into())),
            (7, Err("3 fields; the header has 2: text, label".into())),
            (8, Ok(json!({"text": "last", "label": "2"}))),
        ]
    );
    assert_eq!(items("a.csv", ""), []);
    assert_eq!(
        items("a.csv", "text,label\na,1\n\"b,2\nc,3\n"),
        [
            (2, Ok(json!({"text": "a", "label": "1"}))),
            (3, Err("a quote is opened in this record and never closed".into())),
        ]
    );
}

#[test]
fn a_quote_in_tsv_is_text() {
    assert_eq!(
        items("a.TSV", "text\tlabel\r\n\"a\t1\r\n\nb \"c\"\r d\t\n"),
        [
            (2, Ok(json!({"text": "\"a", "label": "1"}))),
            (3, Err("1 fields; the header has 2: text, label".into())),
            (4, Ok(json!({"text": "b \"c\"\r d", "label": ""}))),
        ]
    );
}

#[test]
fn a_json_document_is_an_array_or_has_one_under_data_or_is_lines() {
    let rows = [(1, Ok(json!({"a": 1}))), (2, Err("a number (2); a JSON object was expected".into()))];
    assert_eq!(items("a.json", "\u{feff}[{\"a\": 1}, 2]"), rows);
    assert_eq!(items("a.json", r#"{"version": "1.1", "data": [{"a": 1}, 2]}"#), rows);
    assert_eq!(items("a.json", "{\"a\": 1}\n2\n"), rows);
    assert_eq!(items("a.json", " \n"), []);
    let pretty = refused("a.json", "{\n \"a\": 1\n}");
    assert_eq!(
        pretty,
        r#"a.json is an object; an array of objects was expected, or an object whose "data" is one"#
    );
    assert!(
        refused("a.json", "[{\"a\": 1},\n 2")
            .contains("a.json is not JSON: EOF while parsing a list at line 2")
    );
}

#[test]
fn parquet_columns_become_json() {
    use ::parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
    use ::parquet::file::writer::SerializedFileWriter;

    let schema = "message rows {
        optional binary text (UTF8);
        required int64 label;
        required double score;
        required boolean ok;
        required group tags (LIST) { repeated group list { required binary element (UTF8); } }
    }";
    let schema = ::parquet::schema::parser::parse_message_type(schema).unwrap().into();
    let (dir, path) = file("a.parquet", "");
    let mut writer =
        SerializedFileWriter::new(File::create(&path).unwrap(), schema, Default::default()).unwrap();
    // two row groups, so that numbering must go through both
    for round in 0..2 {
        let mut group = writer.next_row_group().unwrap();
        let text = |text: &str| ByteArray::from(text.as_bytes().to_vec());
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[text("é")], Some(&[1, 0]), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[round, -7], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<DoubleType>().write_batch(&[0.5, f64::NAN], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<BoolType>().write_batch(&[true, false], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let tags = [text("x"), text("y")];
        column.typed::<ByteArrayType>().write_batch(&tags, Some(&[1, 1, 0]), Some(&[0, 1, 0])).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();

    let rows = read_examples(&(&path).into(), &How::default(), Ok).unwrap();
    drop(dir);
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let second = json!({"text": null, "label": -7, "score": "NaN", "ok": false, "tags": []});
    for (i, row) in rows.into_iter().enumerate() {
        let first = json!({"text": "é", "label": i / 2, "score": 0.5, "ok": true, "tags": ["x", "y"]});
        assert_eq!(Value::Object(row.fields), if i % 2 == 0 { first } else { second.clone() });
    }
    assert!(refused("b.parquet", "PAR1 no").starts_with("b.parquet can't be read as Parquet: "));
}

/// A Parquet file of the schema's columns, each a row long.
fn parquet_of(
    schema: &str,
    write: impl Fn(usize, &mut ::parquet::file::writer::SerializedColumnWriter),
) -> Vec<u8> {
    let schema = ::parquet::schema::parser::parse_message_type(schema).unwrap().into();
    let mut bytes = Vec::new();
    let mut writer =
        ::parquet::file::writer::SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut at = 0;
    while let Some(mut column) = group.next_column().unwrap() {
        write(at, &mut column);
        column.close().unwrap();
        at += 1;
    }
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn a_parquet_column_of_an_odd_type_is_no_fault_before_it_is_used() {
    use ::parquet::data_type::{ByteArray, ByteArrayType, FixedLenByteArrayType, Int32Type, Int64Type};
    let schema = "message rows {
        required binary text (UTF8);
        required fixed_len_byte_array(12) span (INTERVAL);
        required int32 day (DATE);
        required int64 time (TIMESTAMP_MILLIS);
        required binary raw;
    }";
    let bytes = parquet_of(schema, |i, column| {
        let text = |text: &[u8]| vec![ByteArray::from(text.to_vec())];
        match i {
            0 => column.typed::<ByteArrayType>().write_batch(&text(b"good"), None, None),
            1 => column.typed::<FixedLenByteArrayType>().write_batch(
                &[text(&[0; 12])[0].clone().into()],
                None,
                None,
            ),
            2 => column.typed::<Int32Type>().write_batch(&[i32::MAX], None, None),
            3 => column.typed::<Int64Type>().write_batch(&[i64::MIN], None, None),
            _ => column.typed::<ByteArrayType>().write_batch(&text("é".as_bytes()), None, None),
        }
        .unwrap();
    });
    let rows = items("a.parquet", &bytes);
    let fields = rows[0].1.as_ref().unwrap();
    assert_eq!(
        (&fields["text"], &fields["day"], &fields["raw"]),
        (&json!("good"), &json!(i32::MAX), &json!("é"))
    );
    let row = Row::new(1, fields.as_object().unwrap().clone());
    let columns = Columns::default().with("text", Some("span".into()));
    assert_eq!(
        row.text(&columns, "text").unwrap_err().message,
        "field \"span\" is of a type of Parquet that can't be read (FIXED_LEN_BYTE_ARRAY INTERVAL); a string was expected"
    );
    assert!(fields["span"].to_string().contains("FIXED_LEN_BYTE_ARRAY INTERVAL"), "{fields}");
}

#[test]
fn bytes_in_parquet_that_are_not_utf8_are_refused_or_decoded() {
    use ::parquet::data_type::{ByteArray, ByteArrayType};
    let bytes = parquet_of("message rows { required binary text; }", |_, column| {
        let rows = [b"caf\xe9".to_vec(), b"tea".to_vec()].map(ByteArray::from);
        column.typed::<ByteArrayType>().write_batch(&rows, None, None).unwrap();
    });
    assert_eq!(
        items("a.parquet", &bytes),
        [
            (1, Err("field \"text\" is not UTF-8: byte 4; --encoding names another encoding".into())),
            (2, Ok(json!({"text": "tea"}))),
        ]
    );
    let how = How { encoding: Some("latin-1".parse().unwrap()), ..How::default() };
    assert_eq!(items_of("a.parquet", &bytes, how)[0], (1, Ok(json!({"text": "café"}))));
}

#[test]
fn parquet_columns_of_one_name_are_refused() {
    use ::parquet::data_type::Int32Type;
    let bytes = parquet_of("message rows { required int32 label; required int32 label; }", |_, column| {
        column.typed::<Int32Type>().write_batch(&[1], None, None).unwrap();
    });
    assert_eq!(refused("a.parquet", bytes), "a.parquet: columns 1 and 2 are both named \"label\"");
}

#[test]
fn text_that_is_not_utf8_is_refused_where_it_stands() {
    let not = |byte| format!("not UTF-8: byte {byte} of the line; --encoding names another encoding");
    let rows = items("a.csv", b"t,l\ngen\xe9,1\n\"a\nb\xff,\",2\nc,3\n");
    assert_eq!(rows[0], (2, Err(not(4))));
    assert_eq!(rows[1], (4, Err(not(2)))); // the line of the byte; the record ends where its quotes do
    assert_eq!(rows[2], (5, Ok(json!({"t": "c", "l": "3"}))));
    let rows = items("a.tsv", b"t\tl\na\tgen\xe8\nb\t1\n");
    assert_eq!(rows, [(2, Err(not(6))), (3, Ok(json!({"t": "b", "l": "1"})))]);
    for name in ["a.csv", "a.tsv"] {
        assert_eq!(refused(name, b"caf\xe9\nx\n"), format!("{name}:1: {}", not(4)));
    }
    assert_eq!(
        refused("a.json", b"[{\"text\": \"a\"},\n {\"text\": \"\xe9\"}]"),
        format!("a.json:2: {}", not(12))
    );
    for (bytes, says) in [
        (&b"\xff\xfet\0\n\0"[..], "UTF-16: give --encoding utf-16"),
        (b"\xfe\xff\0t\0\n", "UTF-16: give --encoding utf-16"),
        (b"t\0e\0x\0t\0\n\0a\0", "every second byte is 0"),
        (b"\0t\0e\0x\0t\0\n\0a", "every second byte is 0"),
        (b"\xff\xfe\0\0t\0\0\0", "UTF-32"),
    ] {
        for name in ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json"] {
            let message = refused(name, bytes);
            assert!(message.contains(name) && message.contains(says), "{message}");
        }
    }
}

#[test]
fn an_encoding_is_decoded_before_anything_is_read() {
    let how = |name: &str| How { encoding: Some(name.parse().unwrap()), ..How::default() };
    let csv = "text,label\r\n\"a,\u{20ac}\r\nb\",né\r\n";
    let wide: Vec<u8> = csv.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let marked = [b"\xff\xfe", &wide[..]].concat();
    let big: Vec<u8> =
        "\u{feff}".encode_utf16().chain(csv.encode_utf16()).flat_map(u16::to_be_bytes).collect();
    let single = csv.chars().map(|c| if c == '\u{20ac}' { 0x80 } else { u32::from(c) as u8 }).collect();
    let read = [(2, Ok(json!({"text": "a,€\r\nb", "label": "né"})))];
    for (name, bytes) in [
        ("utf-16", &wide),
        ("utf-16", &marked),
        ("UTF-16", &big),
        ("utf-16le", &wide),
        ("windows-1252", &single),
        ("latin-1", &single),
        ("iso-8859-1", &single),
        ("utf-8", &csv.as_bytes().to_vec()),
    ] {
        assert_eq!(items_of("a.csv", bytes, how(name)), read, "{name}");
    }
    // longer than any buffer
    let long = "é€😀\n".repeat(100_000);
    let bytes: Vec<u8> = long.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let rows = items_of("a.txt", bytes, how("utf-16"));
    assert_eq!(rows.len(), 100_000);
    assert!(rows.iter().all(|(_, row)| *row == Ok(json!({"text": "é€😀"}))));
    // half of a pair
    let bytes: Vec<u8> = [0x61, 0xd83d, 0x0a, 0x62].into_iter().flat_map(u16::to_le_bytes).collect();
    let undecoded = "not UTF-16LE: what stands at character 2 of the line can't be decoded";
    let rows = items_of("a.txt", bytes, how("utf-16"));
    assert_eq!(rows, [(1, Err(undecoded.into())), (2, Ok(json!({"text": "b"})))]);
    for unknown in ["klingon", "", "replacement", "iso-2022-kr"] {
        assert!(unknown.parse::<TextEncoding>().is_err(), "{unknown}");
    }
    // as Python spells them
    for (spelt, label) in [
        ("latin-1", "windows-1252"),
        ("latin9", "iso-8859-15"),
        ("utf_8", "utf-8"),
        ("utf_8_sig", "utf-8"),
        ("utf-16-le", "utf-16le"),
        ("utf_16_be", "utf-16be"),
        ("cp932", "shift_jis"),
        ("shift_jis", "shift_jis"),
        ("cp949", "euc-kr"),
        ("EUC_JP", "euc-jp"),
        ("koi8_r", "koi8-r"),
    ] {
        let parse = |name: &str| name.parse::<TextEncoding>().unwrap();
        assert_eq!(parse(spelt), parse(label), "{spelt}");
    }
}

#[test]
fn utf16_without_its_mark_is_never_taken_for_other_text() {
    let text = "日 a, good\nbad\n日\n\nok\n";
    let little: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let big: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
    let late: Vec<u8> = [b"text\nfine\n", &little[..]].concat();
    for bytes in [&little, &big] {
        assert!(refused("a.txt", bytes).contains("every second byte is 0"));
    }
    let rows = items("a.txt", &late);
    assert!(rows[2..].iter().all(|(_, row)| row.is_err()) && rows[1].1.is_ok(), "{rows:?}");
    for (name, bytes) in [("utf-16be", &little), ("utf-16le", &big), ("utf-16", &big)] {
        for file in ["a.txt", "a.csv", "a.json"] {
            let how = How { encoding: Some(name.parse().unwrap()), ..How::default() };
            let message = refused_of(file, bytes, how);
            assert!(message.contains("the other way round"), "{name} {file}: {message}");
        }
    }
}

#[test]
fn a_txt_is_lines_or_documents_or_one_text() {
    let how = |unit| How { unit: Some(unit), ..How::default() };
    let text = "\n \none\n\ttwo\n\n\nthree\r\n\r\nfo\u{e9}ur\n";
    let rows: Vec<_> = [(3, "one\n\ttwo"), (7, "three"), (9, "fo\u{e9}ur")]
        .map(|(line, text)| (line, Ok(json!({"text": text}))))
        .into();
    assert_eq!(items_of("a.txt", text, how(TextUnit::Document)), rows);
    assert_eq!(items_of("a.txt", "a\r\nb", how(TextUnit::Document)), [(1, Ok(json!({"text": "a\r\nb"})))]);
    assert_eq!(items_of("a.txt", text, how(TextUnit::File)), [(1, Ok(json!({"text": text})))]);
    assert_eq!(items_of("a.txt", text, how(TextUnit::Line)).len(), 9);
    let rows = items_of("a.txt", b"a\nb\xff\nc\n\nd", how(TextUnit::Document));
    assert!(rows[0].1.is_err() && rows[0].0 == 2, "{rows:?}");
    assert_eq!(rows[1..], [(5, Ok(json!({"text": "d"})))]);
    for unit in [TextUnit::Document, TextUnit::File] {
        assert_eq!(items_of("a.txt", "", how(unit)), []);
    }
}

#[test]
fn lines_that_end_with_a_carriage_return_alone_are_refused() {
    for (name, text) in [("a.csv", "a,b\r1,2\r"), ("a.tsv", "a\tb\r1\t2\r"), ("a.txt", "one\rtwo\r")] {
        let message = refused(name, text);
        assert!(
            message.contains(&format!("{name}:1: the lines end with a carriage return alone")),
            "{message}"
        );
    }
}

#[test]
fn empty_lines_at_the_end_are_no_records_of_training_data() {
    let (_dir, path) = file("a.jsonl", "{\"a\": 1}\n\n \n");
    assert_eq!(read_examples(&(&path).into(), &How::default(), Ok).unwrap().len(), 1);
    assert_eq!(refused("b.jsonl", "\n\n"), "b.jsonl has no records");
    assert!(refused("c.jsonl", "{}\n\n{}\n").contains("c.jsonl:2: empty line"));
}

#[test]
fn numbers_that_no_double_holds_are_kept_as_they_are_written() {
    let record =
        r#"{ "id" : 12345678901234567890123 , "a": [1.50, {"b": "x\n] }"}], "b": 0.5, "c\"d": -0.10,"e":7}"#;
    let lines = [
        ("a.jsonl", record.to_owned()),
        ("a.json", format!("[{{\"x\": 1.0}}, {record}]")),
        ("a.json", format!("{{\"n\": [2.50], \"data\": [0, {record}], \"m\": {{}}}}")),
    ];
    for (name, text) in lines {
        let (_dir, path) = file(name, &text);
        let row = read(&Source::Path(path), &How::default()).unwrap().last().unwrap().unwrap().unwrap();
        let expected =
            [("a", r#"[1.50, {"b": "x\n] }"}]"#), ("c\"d", "-0.10"), ("id", "12345678901234567890123")];
        let exact: Vec<_> = row.exact.iter().map(|(key, raw)| (key.as_str(), raw.as_str())).collect();
        assert_eq!(exact, expected, "{text}");
    }
}

#[test]
fn a_column_that_two_fields_stand_in_is_not_taken_away() {
    let fields = json!({"text": "good", "id": 1}).as_object().unwrap().clone();
    let mut row = Row::new(1, fields);
    let columns = Columns::default().with("text", None).with("id", Some("text".into()));
    assert_eq!(row.take(&columns, "id"), Some(json!("good")));
    assert_eq!(row.text(&columns, "text"), Ok("good"));
}

#[test]
fn headers_must_tell_the_columns_apart() {
    assert_eq!(refused("a.csv", "text,,label\n"), "a.csv:1: column 2 has no name in the header");
    assert_eq!(refused("a.tsv", "text\tlabel\ttext\n"), "a.tsv:1: columns 1 and 3 are both named \"text\"");
}

#[test]
fn whole_files_are_refused_with_all_that_is_wrong() {
    assert_eq!(refused("tweets.jsonl", ""), "tweets.jsonl has no records");
    assert_eq!(refused("tweets.csv", "text,label\n"), "tweets.csv has no records");
    let message = refused("tweets.jsonl", "{}\n".to_owned() + &"x\n".repeat(12));
    let lines: Vec<_> = message.lines().collect();
    assert_eq!(lines[0], "tweets.jsonl: 12 of 13 records can't be used:");
    assert_eq!(lines[1], "  tweets.jsonl:2: not JSON: expected value, at column 1");
    assert_eq!(lines[11], "  and 2 more");
    assert_eq!(lines.len(), 12);
}

#[test]
fn examples_and_lines_are_refused_together() {
    let (_dir, path) = file("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": 3}\n");
    let columns = Columns::default();
    let example = |row: Row| row.text(&columns, "text").map(str::to_owned);
    let error = read_examples(&(&path).into(), &How::default(), example).unwrap_err().to_string();
    assert!(error.contains("a.jsonl:2: empty line\n"), "{error}");
    assert!(error.ends_with("a.jsonl:3: field \"text\" is a number (3); a string was expected"), "{error}");
}

#[test]
fn formats_are_known_by_extension() {
    assert_eq!(Format::of(Path::new("x/A.JSONL")).unwrap(), Format::Jsonl);
    let message = |path| Format::of(Path::new(path)).unwrap_err().to_string();
    let known = "jsonl, json, csv, tsv, parquet, txt, conll";
    assert_eq!(message("a.xml"), format!("a.xml: the format is not known: \"xml\" is none of {known}"));
    assert_eq!(message("a"), format!("a: the format is not known: no extension; the known ones are {known}"));
    assert_eq!(Format::of(Path::new("ner.conll")).unwrap(), Format::Conll);
    assert!(
        read(&Source::of("no/such.csv"), &How::default())
            .is_err_and(|e| e.to_string().contains("No such file"))
    );
    assert_eq!(Source::of("-"), Source::Stdin);
}

#[test]
fn a_missing_column_is_named_beside_those_that_stand_there() {
    let fields = json!({"sentence": "good", "label": 1, "note": null}).as_object().unwrap().clone();
    let mut row = Row::new(7, fields);
    let plain = Columns::default().with("text", None).with("text_pair", None);
    assert_eq!(
        row.text(&plain, "text").unwrap_err().to_string(),
        r#"line 7: no field "text"; the line has "sentence", "label", "note" (--text-column names another)"#
    );
    assert_eq!(row.optional_text(&plain, "text_pair"), Ok(None));
    let mapped =
        Columns::default().with("text", Some("sentence".into())).with("text_pair", Some("second".into()));
    assert_eq!(row.text(&mapped, "text"), Ok("good"));
    // a column that was asked for is not optional
    let message = row.optional_text(&mapped, "text_pair").unwrap_err().message;
    assert!(
        message.starts_with("no field \"second\";") && message.ends_with("(--text-pair-column asks for it)")
    );
    assert_eq!(
        row.text(&plain, "label").unwrap_err().message,
        "field \"label\" is a number (1); a string was expected"
    );
    assert_eq!(row.value(&plain, "note").unwrap_err().message, "field \"note\" is null");
    assert_eq!(row.take(&mapped, "text"), Some(json!("good")));
    assert_eq!(row.fields.keys().collect::<Vec<_>>(), ["label", "note"]);
}

/// A reader that gives one record and then fails for good.
struct Failing(bool);

impl std::io::Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match std::mem::replace(&mut self.0, true) {
            false => (&mut &mut *buffer).write(b"{}\n{"),
            true => Err(std::io::Error::other("the disk is gone")),
        }
    }
}

#[test]
fn after_an_error_the_rows_end() {
    let input: Input = Box::new(BufReader::new(Failing(false)));
    let rows = readers::rows(input, Format::Jsonl, &How::default(), "x").unwrap();
    let mut rows = Rows { name: "x".into(), rows: Some(rows) };
    assert!(rows.next().unwrap().unwrap().is_ok());
    let error = rows.next().unwrap().unwrap_err();
    assert_eq!(format!("{error:#}"), "reading x: the disk is gone");
    assert!(rows.next().is_none());
}

/// Bytes in which lines, marks, quotes and broken UTF-8 are likely.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec!["\n", "\r\n", "\r", "\t", ",", "\"", "\u{feff}", "{}", "{\"a\": 1}", "[", "é"])
            .prop_map(|piece| piece.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// Whether bytes begin as UTF-16 or UTF-32 does.
fn is_wide(bytes: &[u8]) -> bool {
    let line = bytes.split_inclusive(|&byte| byte == b'\n').next().unwrap_or_default();
    line.starts_with(&[0xff, 0xfe]) || line.starts_with(&[0xfe, 0xff]) || line.contains(&0)
}

/// How many lines bytes have: a final end begins none.
fn lines(bytes: &[u8]) -> usize {
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    bytes.split(|&byte| byte == b'\n').count() - usize::from(bytes.is_empty() || bytes.ends_with(b"\n"))
}

proptest! {
    #[test]
    fn every_line_gives_one_item_in_order(bytes in bytes()) {
        // beginnings that are refused: lines that end with \r alone, UTF-16
        prop_assume!(bytes.contains(&b'\n') || !bytes.contains(&b'\r'));
        prop_assume!(!is_wide(&bytes));
        for name in ["a.jsonl", "a.txt"] {
            let numbers: Vec<_> = items(name, &bytes).into_iter().map(|(line, _)| line).collect();
            prop_assert_eq!(numbers, (1..=lines(&bytes)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_line_below_a_tsv_header_gives_one_item(bytes in bytes()) {
        let bytes = [b"text\tlabel\n", &bytes[..]].concat();
        let numbers: Vec<_> = items("a.tsv", &bytes).into_iter().map(|(line, _)| line).collect();
        prop_assert_eq!(numbers, (2..=lines(&bytes)).collect::<Vec<_>>());
    }

    #[test]
    fn csv_is_read_as_the_csv_crate_reads_it(bytes in bytes()) {
        // a lone \r ends a record there and is text here
        let lone = |i: usize| bytes[i] == b'\r' && bytes.get(i + 1) != Some(&b'\n');
        let text: Vec<_> = (0..bytes.len()).filter(|&i| !lone(i)).map(|i| bytes[i]).collect();
        let bytes = [b"a,b\n", &text[..]].concat();
        let mut theirs = ::csv::ReaderBuilder::new().flexible(true).from_reader(&bytes[..]);
        let theirs: Vec<_> = theirs.byte_records().map(Result::unwrap).collect();
        let ours = items("a.csv", &bytes);
        prop_assert_eq!(ours.len(), theirs.len());
        for ((_, ours), theirs) in ours.into_iter().zip(theirs) {
            let texts: Result<Vec<_>, _> = theirs.iter().map(str::from_utf8).collect();
            match (ours, texts) {
                (Ok(fields), Ok(theirs)) => {
                    prop_assert_eq!(fields, json!({"a": theirs[0], "b": theirs[1]}));
                }
                (Ok(_), Err(error)) => prop_assert!(false, "{error}"),
                (Err(message), Ok(_)) => {
                    // a record may look like UTF-16, too
                    let known = message.contains("never closed") || message.contains("as in UTF-16");
                    prop_assert!(theirs.len() != 2 || known, "{message}");
                }
                (Err(_), Err(_)) => {}
            }
        }
    }

    #[test]
    fn csv_and_json_of_any_bytes_end_without_panic(bytes in bytes()) {
        for name in ["a.csv", "a.json", "a.parquet"] {
            let (_dir, path) = file(name, &bytes);
            if let Ok(rows) = read(&Source::Path(path), &How::default()) {
                prop_assert!(rows.count() <= bytes.len());
            }
        }
    }
}

const SENTENCES: &str = "\u{feff}-DOCSTART- -X- O O\r\n\r\nEU NNP I-NP B-ORG\r\nrejects VBZ I-VP O\r\n\r\n \r\n\
                         caf\u{e9} NN I-NP O\r\nbare\r\n\r\nPeter NNP I-NP B-PER";

#[test]
fn a_sentence_of_conll_is_a_row_of_tokens_and_tags() {
    let peter = (10, Ok(json!({"tokens": ["Peter"], "tags": ["B-PER"]})));
    let bad = r#""bare" has no tag: a token and a tag were expected, with a tab or a space between"#;
    assert_eq!(
        items("a.conll", SENTENCES),
        [
            (3, Ok(json!({"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}))),
            (8, Err(bad.to_owned())),
            peter.clone(),
        ]
    );
    let message = refused("a.conll", SENTENCES);
    assert!(message.contains(&format!("1 of 3 records can't be used:\n  a.conll:8: {bad}")), "{message}");
    assert_eq!(
        items("a.conll", "New York\tB-LOC\n!\tO\n"),
        [(1, Ok(json!({"tokens": ["New York", "!"], "tags": ["B-LOC", "O"]})),)]
    );
    let column = How { tag_column: Some("2".parse().unwrap()), ..How::default() };
    let pos = items_of("a.conll", SENTENCES, column);
    assert_eq!(pos[0], (3, Ok(json!({"tokens": ["EU", "rejects"], "tags": ["NNP", "VBZ"]}))));
    let untagged = items_of("a.conll", "EU\nrejects\n\nPeter\n", How { untagged: true, ..How::default() });
    assert_eq!(
        untagged,
        [(1, Ok(json!({"tokens": ["EU", "rejects"]}))), (4, Ok(json!({"tokens": ["Peter"]})))]
    );
    assert!(refused("a.conll", "-DOCSTART-\n\n").contains("has no records"));
    assert!(items("a.conll", "a O\rb O\r")[0].1.as_ref().unwrap_err().contains("carriage return alone"));
}

#[test]
fn conll_is_read_in_the_asked_encoding() {
    let (text, _, _) = encoding_rs::WINDOWS_1252.encode("caf\u{e9} O\n\nb O\n");
    let error = items("a.conll", &text);
    assert_eq!(
        error[0].1,
        Err("not UTF-8: byte 4 of the line; --encoding names another encoding".to_owned())
    );
    assert_eq!(error[1], (3, Ok(json!({"tokens": ["b"], "tags": ["O"]}))));
    let how = How { encoding: Some("latin-1".parse().unwrap()), ..How::default() };
    assert_eq!(items_of("a.conll", &text, how)[0].1, Ok(json!({"tokens": ["caf\u{e9}"], "tags": ["O"]})));
    let wide: Vec<u8> = "EU O\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(refused("a.conll", wide).contains("give --encoding utf-16le"));
}

#[test]
fn a_file_of_conll_has_no_text() {
    let (_dir, path) = file("a.conll", "EU B-ORG\n");
    let columns = Columns::default().with("text", None);
    let text = |row: Row| row.text(&columns, "text").map(str::to_owned);
    let message = read_examples(&(&path).into(), &How::default(), text).unwrap_err().to_string();
    assert!(
        message
            .ends_with(r#"1: no field "text"; the line has "tokens", "tags" (--text-column names another)"#),
        "{message}"
    );
}

#[test]
fn a_tag_column_is_written_as_it_is_read() {
    for (text, column) in
        [("last", TagColumn::Last), ("4", TagColumn::Number(4)), ("UPOS", TagColumn::Name("UPOS".to_owned()))]
    {
        assert_eq!(text.parse::<TagColumn>().unwrap(), column);
        assert_eq!(serde_json::to_value(&column).unwrap(), text);
        assert_eq!(serde_json::from_value::<TagColumn>(json!(text)).unwrap(), column);
    }
    assert!(serde_json::from_value::<TagColumn>(json!("0")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Cut into files at any line, packed or not, the records are the same in the same order, each with its place.
    #[test]
    fn records_are_the_same_in_one_file_or_in_several(
        texts in proptest::collection::vec("[a-zé ]{0,9}", 1..30),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 4),
        packings in proptest::collection::vec(0..3, 5),
        crlf in any::<bool>(),
    ) {
        let end = if crlf { "\r\n" } else { "\n" };
        let line = |text: &String| format!("{}{end}", json!({"text": text}));
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join("whole.jsonl");
        std::fs::write(&whole, texts.iter().map(line).collect::<String>()).unwrap();
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(texts.len() + 1)).collect();
        ends.push(texts.len());
        ends.sort_unstable();
        let (mut start, mut places, parts) = (0, Vec::new(), dir.path().join("parts"));
        std::fs::create_dir(&parts).unwrap();
        for (i, (&end, packing)) in ends.iter().zip(packings).enumerate() {
            let bytes = texts[start..end].iter().map(line).collect::<String>().into_bytes();
            let (ending, bytes) = match packing {
                0 => ("", bytes),
                1 => {
                    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                    encoder.write_all(&bytes).unwrap();
                    (".gz", encoder.finish().unwrap())
                }
                _ => (".zst", zstd::encode_all(&bytes[..], 1).unwrap()),
            };
            std::fs::write(parts.join(format!("{i}.jsonl{ending}")), bytes).unwrap();
            places.extend((0..end - start).map(|at| Place { file: i, line: at + 1 }));
            start = end;
        }
        let row = |row: Row| Ok((row.place(), row.fields["text"].as_str().unwrap().to_owned()));
        let of = |names: &[PathBuf]| read_examples(&Files::named(names, None).unwrap(), &How::default(), row).unwrap();
        let read = of(&[parts]);
        prop_assert_eq!(read.iter().map(|(place, _)| *place).collect::<Vec<_>>(), places);
        prop_assert_eq!(read.iter().map(|(_, text)| text).collect::<Vec<_>>(), texts.iter().collect::<Vec<_>>());
        prop_assert_eq!(of(&[whole]).into_iter().map(|(_, text)| text).collect::<Vec<_>>(), texts);
    }
}

#[test]
fn what_is_wrong_in_several_files_is_told_with_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("a.jsonl", "{\"text\": \"a\"}\n\n\n");
    write("b.csv", "");
    write("c.csv", "text,label\n");
    write("d.jsonl", "{\"text\": \"b\"}\n\n[1]\n");
    write("e.txt", "c\n");
    let read = || {
        let files = Files::named(&[dir.path().to_owned()], None).unwrap();
        let text = |row: Row| row.text(&Columns::default(), "text").map(str::to_owned);
        read_examples(&files, &How::default(), text)
    };
    let said = format!("{:#}", read().unwrap_err()).replace(&format!("{}/", dir.path().display()), "");
    assert_eq!(
        said,
        "a.jsonl and 4 other files: 2 of 5 records can't be used:\n  d.jsonl:2: empty line\n  \
         d.jsonl:3: a list; a JSON object was expected"
    );
    write("d.jsonl", "{\"text\": \"b\"}\n\n");
    assert_eq!(read().unwrap(), ["a", "b", "c"]);
    for name in ["a.jsonl", "d.jsonl", "e.txt"] {
        write(name, "");
    }
    assert!(read().unwrap_err().to_string().ends_with("a.jsonl and 4 other files has no records"));
}
