//! The promises of `value.rs`, on values of every kind and on JSON that nobody encoded.

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;
use crate::state::path::{Key, join};

fn encode(value: &Value) -> Json {
    let mut out = Vec::new();
    value.write_json(&mut out).unwrap();
    serde_json::from_slice(&out).unwrap()
}

fn tensor(name: &str) -> Value {
    Value::Tensor(TensorRef { name: name.into(), lib: Lib::Torch, param: false, whole: None })
}

fn str(text: &str) -> Value {
    Value::Str(text.into())
}

fn leaf() -> impl Strategy<Value = Value> {
    let bits = || {
        prop_oneof![
            any::<u64>(),
            any::<f64>().prop_map(f64::to_bits),
            (0x7ff0_0000_0000_0001_u64..=0x7fff_ffff_ffff_ffff),
            prop::sample::select(vec![0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, 0.1, 5e-324])
                .prop_map(f64::to_bits),
        ]
    };
    let ints = || prop_oneof![-9_i64..9, any::<i64>(), (1_i64 << 53) - 2..(1 << 53) + 2];
    let bytes = || prop::collection::vec(any::<u8>(), 0..9);
    let surrogates = prop::collection::vec(any::<u16>(), 0..9).prop_filter_map("wtf8", |units| {
        let encode = |unit: u16| {
            let (a, b, c) = (unit >> 12, unit >> 6 & 63, unit & 63);
            [0xE0 | a as u8, 0x80 | b as u8, 0x80 | c as u8]
        };
        let wide = units.into_iter().map(|unit| unit | 0x800);
        Value::str(wide.chain([0xD800]).flat_map(encode).collect())
    });
    let shapes = prop::option::of(prop::collection::vec(0_u64..1 << 20, 0..3));
    let tensors = (any::<String>(), 0_usize..3, any::<bool>(), shapes).prop_map(
        |(name, lib, param, shape)| {
            let whole = shape.map(|shape| Arc::new(Whole { dtype: Dtype::BF16, shape }));
            let lib = [Lib::Torch, Lib::Numpy, Lib::Jax][lib];
            Value::Tensor(TensorRef { name: name.into(), lib, param, whole })
        },
    );
    prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        ints().prop_map(Value::Int),
        "-?0x[1-9a-f][0-9a-f]{16,60}".prop_map(|text| Value::int(&text).unwrap()),
        "-?0x[8-9a-f][0-9a-f]{15}".prop_filter_map("i64::MIN has 64 bits", |t| Value::int(&t)),
        bits().prop_map(Value::Float),
        (bits(), bits()).prop_map(|(re, im)| Value::Complex(re, im)),
        any::<String>().prop_map(Value::Str),
        surrogates,
        bytes().prop_map(Value::Bytes),
        bytes().prop_map(Value::Pickle),
        any::<(String, String)>().prop_map(|(type_name, name)| Value::Enum { type_name, name }),
        (any::<String>(), bytes()).prop_map(|(dtype, bytes)| Value::NumpyScalar { dtype, bytes }),
        any::<String>().prop_map(Value::TorchDtype),
        any::<String>().prop_map(Value::TorchDevice),
        any::<String>().prop_map(Value::Path),
        prop::collection::vec(ints(), 0..4).prop_map(Value::TorchSize),
        tensors,
    ]
}

fn containers(inner: impl Strategy<Value = Value> + Clone + 'static) -> BoxedStrategy<Value> {
    let items = || prop::collection::vec(inner.clone(), 0..4);
    let hashed =
        inner.clone().prop_filter("tensors have no place there", |value| value.as_key().is_ok());
    let members = || prop::collection::vec(hashed.clone(), 0..4);
    let entries = || prop::collection::vec((hashed.clone(), inner.clone()), 0..4);
    let fields = || prop::collection::vec((any::<String>(), inner.clone()), 0..4);
    prop_oneof![
        items().prop_map(Value::List),
        items().prop_map(Value::Tuple),
        members().prop_map(Value::Set),
        members().prop_map(Value::FrozenSet),
        entries().prop_map(Value::Dict),
        entries().prop_map(Value::OrderedDict),
        entries().prop_map(Value::Counter),
        (any::<Option<String>>(), entries())
            .prop_map(|(factory, entries)| Value::DefaultDict { factory, entries }),
        (any::<Option<u64>>(), items()).prop_map(|(maxlen, items)| Value::Deque { maxlen, items }),
        (any::<String>(), fields())
            .prop_map(|(type_name, fields)| Value::NamedTuple { type_name, fields }),
        (any::<String>(), fields())
            .prop_map(|(type_name, fields)| Value::Dataclass { type_name, fields }),
        inner.prop_map(|state| Value::Object(Box::new(state))),
    ]
    .boxed()
}

fn value() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(5, 40, 4, containers)
}

/// JSON that is nearly right: the real tags over bodies of every shape.
fn garbage() -> impl Strategy<Value = Json> {
    const TAGS: [&str; 24] = [
        "int",
        "float",
        "complex",
        "wtf8",
        "bytes",
        "pickle",
        "tuple",
        "set",
        "frozenset",
        "dict",
        "OrderedDict",
        "Counter",
        "defaultdict",
        "deque",
        "namedtuple",
        "dataclass",
        "enum",
        "numpy",
        "torch.dtype",
        "torch.device",
        "torch.Size",
        "path",
        "object",
        "tensor",
    ];
    let tag = || {
        prop_oneof![
            9 => prop::sample::select(&TAGS[..]).prop_map(str::to_owned),
            1 => "lib|name|param|unheard of",
        ]
    };
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        "torch|nan:7ff8000000000000|nan:0{16}|inf|-?[0-9]{0,30}|-?0x[0-9a-f]{0,20}|([0-9a-f]{2}){0,6}|eda080"
            .prop_map(Json::from),
        any::<String>().prop_map(Json::from),
    ];
    leaf.prop_recursive(6, 60, 4, move |inner| {
        prop_oneof![
            2 => prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            4 => (tag(), inner.clone()).prop_map(|(tag, body)| json!({ tag: body })),
            1 => prop::collection::btree_map(tag(), inner, 0..4)
                .prop_map(|object| Json::Object(object.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn what_was_encoded_decodes_to_the_same_value(value in value()) {
        let json = encode(&value);
        prop_assert_eq!(&Value::decode(&json), &Ok(value.clone()));
        // The tree form and the stream are one encoding, and it is canonical: parsing and printing
        // changes no byte.
        prop_assert_eq!(serde_json::to_value(&value).unwrap(), json.clone());
        prop_assert_eq!(serde_json::to_string(&value).unwrap(), json.to_string());
        let text = serde_json::to_string(&value).unwrap();
        prop_assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn no_json_makes_decode_panic(json in garbage()) {
        if let Ok(value) = Value::decode(&json) {
            // What is understood means the same when it is written again.
            prop_assert_eq!(Value::decode(&encode(&value)), Ok(value));
        }
    }

    #[test]
    fn every_tensor_is_found_at_its_place(value in value()) {
        let mut renamed = value.clone();
        let mut count = 0;
        renamed.for_each_tensor_mut(|tensor| {
            tensor.name = "same".into();
            count += 1;
        });
        let found = value.tensors().unwrap();
        prop_assert_eq!(found.len(), count);
        prop_assert!(renamed.tensors().unwrap().iter().all(|(_, tensor)| &*tensor.name == "same"));
        for (path, tensor) in found {
            prop_assert_eq!(follow(&value, &path, tensor), Some(tensor));
        }
    }
}

/// Another way to the tensor at `path`: by the keys. Where keys repeat, any that leads to it will
/// do.
fn follow<'a>(value: &'a Value, path: &[Key], tensor: &TensorRef) -> Option<&'a TensorRef> {
    if let (Value::Tensor(found), []) = (value, path) {
        return (found == tensor).then_some(found);
    }
    if let Value::Object(state) = value {
        return follow(state, path, tensor);
    }
    let (first, rest) = path.split_first()?;
    match (value, first) {
        (
            Value::List(items) | Value::Tuple(items) | Value::Deque { items, .. },
            Key::Index(index),
        ) => follow(items.get(*index as usize)?, rest, tensor),
        (
            Value::Dict(entries)
            | Value::OrderedDict(entries)
            | Value::Counter(entries)
            | Value::DefaultDict { entries, .. },
            key,
        ) => entries
            .iter()
            .filter(|(k, _)| k.as_key().as_ref() == Ok(key))
            .find_map(|(_, v)| follow(v, rest, tensor)),
        (Value::NamedTuple { fields, .. } | Value::Dataclass { fields, .. }, Key::Str(name)) => {
            fields.iter().filter(|(n, _)| n == name).find_map(|(_, v)| follow(v, rest, tensor))
        }
        _ => None,
    }
}

/// Every way to put a value one level deeper. Keys too: they nest where they are tuples.
fn wrappers() -> Vec<fn(Value) -> Value> {
    vec![
        |v| Value::List(vec![v]),
        |v| Value::Tuple(vec![v]),
        |v| Value::Set(vec![v]),
        |v| Value::FrozenSet(vec![v]),
        |v| Value::Dict(vec![(Value::None, v)]),
        |v| Value::Dict(vec![(v, Value::None)]),
        |v| Value::OrderedDict(vec![(Value::None, v)]),
        |v| Value::Counter(vec![(Value::None, v)]),
        |v| Value::DefaultDict { factory: None, entries: vec![(Value::None, v)] },
        |v| Value::Deque { maxlen: None, items: vec![v] },
        |v| Value::NamedTuple { type_name: "m:N".into(), fields: vec![("f".into(), v)] },
        |v| Value::Dataclass { type_name: "m:D".into(), fields: vec![("f".into(), v)] },
        |v| Value::Object(Box::new(v)),
    ]
}

fn nested(wrap: fn(Value) -> Value, levels: usize) -> Value {
    (1..levels).fold(Value::TorchSize(vec![i64::MIN]), |value, _| wrap(value))
}

#[test]
fn a_value_deeper_than_the_limit_is_refused() {
    for wrap in wrappers() {
        let deep = nested(wrap, VALUE_DEPTH_MAX + 1);
        assert_eq!(deep.check().unwrap_err().problem, EncodeProblem::TooDeep);
        let mut out = b"before".to_vec();
        assert_eq!(deep.write_json(&mut out).unwrap_err().problem, EncodeProblem::TooDeep);
        assert_eq!(out, b"before");
        assert!(serde_json::to_value(&deep).is_err());
        assert!(deep.tensors().is_err() && deep.as_key().is_err());

        // One level of JSON more than encode makes, by hand: the same container once around.
        let json = encode(&nested(wrap, VALUE_DEPTH_MAX));
        let inner = encode(&Value::TorchSize(vec![i64::MIN])).to_string();
        let outer = encode(&wrap(Value::TorchSize(vec![i64::MIN]))).to_string();
        let json = outer.replacen(&inner, &json.to_string(), 1);
        let json: Json = serde_json::from_str(&json).unwrap();
        assert_eq!(Value::decode(&json).unwrap_err().problem, DecodeProblem::TooDeep);
    }
}

#[test]
fn at_the_limit_the_json_can_be_parsed_with_the_manifest_around_it() {
    for wrap in wrappers() {
        let value = nested(wrap, VALUE_DEPTH_MAX);
        let mut text = serde_json::to_string(&value).unwrap();
        for _ in 0..JSON_LEVELS_AROUND_MAX {
            text = format!("[{text}]");
        }
        let mut json: Json = serde_json::from_str(&text).unwrap();
        for _ in 0..JSON_LEVELS_AROUND_MAX {
            json = json[0].take();
        }
        assert_eq!(Value::decode(&json), Ok(value));
    }
    // And the limit is tight: a dict with the worst leaf, one level more around it, is too much.
    let worst = serde_json::to_string(&nested(wrappers()[4], VALUE_DEPTH_MAX)).unwrap();
    let around = JSON_LEVELS_AROUND_MAX + 1;
    let text = format!("{}{worst}{}", "[".repeat(around), "]".repeat(around));
    assert!(serde_json::from_str::<Json>(&text).is_err());
}

#[test]
fn a_hundred_thousand_arrays_are_an_error_and_not_a_stack_overflow() {
    let text = "[".repeat(100_000) + &"]".repeat(100_000);
    assert!(serde_json::from_str::<Value>(&text).is_err());
    let json = (0..100_000).fold(Json::Null, |json, _| Json::Array(vec![json]));
    let value = (0..100_000).fold(Value::None, |value, _| Value::List(vec![value]));
    assert_eq!(Value::decode(&json).unwrap_err().problem, DecodeProblem::TooDeep);
    assert_eq!(value.check().unwrap_err().problem, EncodeProblem::TooDeep);
    assert!(serde_json::to_string(&value).is_err());
    assert!(value.as_key().is_err() && value.tensors().is_err());
    // Dropping them would recurse.
    std::mem::forget((json, value));
}

#[test]
fn no_tensor_lies_in_a_key_or_in_a_set() {
    let t = || Value::Tuple(vec![tensor("t")]);
    for value in [
        Value::Set(vec![t()]),
        Value::FrozenSet(vec![Value::None, t()]),
        Value::Dict(vec![(t(), Value::None)]),
        Value::Counter(vec![(Value::Object(Box::new(t())), Value::None)]),
    ] {
        let state = Value::Dict(vec![(str("a"), Value::List(vec![value]))]);
        let error = state.check().unwrap_err();
        assert_eq!(
            error.to_string(),
            "a/0: a tensor cannot be stored in a key of a dict or in a set"
        );
        assert_eq!(state.write_json(&mut Vec::new()), Err(error));
    }
    let inner = json!({"tuple": [{"tensor": {"lib": "jax", "name": "t"}}]});
    assert!(Value::decode(&inner).is_ok());
    for tag in ["set", "frozenset"] {
        let error = Value::decode(&json!({ tag: [inner.clone()] })).unwrap_err();
        assert_eq!(error.problem, DecodeProblem::TensorInKey);
    }
    let error = Value::decode(&json!({ "dict": [[inner, 1]] })).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"at .["dict"][0][0]["tuple"][0]["tensor"]: a tensor in a key of a dict or in a set"#
    );
}

#[test]
fn json_is_as_a_person_reads_it() {
    let entries = || vec![(str("a"), Value::Int(1)), (Value::Int(2), Value::None)];
    let items = || vec![Value::Int(1), str("a")];
    let fields = || vec![("x".into(), Value::Int(1))];
    let (type_name, float) = ("m:T".to_owned(), Value::float);
    for (value, json) in [
        (Value::None, "null"),
        (Value::Bool(true), "true"),
        (Value::Int((1 << 53) - 1), "9007199254740991"),
        (Value::Int(-(1 << 53)), r#"{"int":"-9007199254740992"}"#),
        (Value::Int(i64::MIN), r#"{"int":"-9223372036854775808"}"#),
        (Value::int("0x8000000000000000").unwrap(), r#"{"int":"0x8000000000000000"}"#),
        (Value::int("-0x8000000000000001").unwrap(), r#"{"int":"-0x8000000000000001"}"#),
        (float(0.1), r#"{"float":"0.1"}"#),
        (float(3.0), r#"{"float":"3.0"}"#),
        (float(1e300), r#"{"float":"1e300"}"#),
        (float(-0.0), r#"{"float":"-0.0"}"#),
        (float(f64::NEG_INFINITY), r#"{"float":"-inf"}"#),
        (Value::Float(0x7ff8 << 48), r#"{"float":"nan:7ff8000000000000"}"#),
        (Value::Complex(0, 1.5_f64.to_bits()), r#"{"complex":["0.0","1.5"]}"#),
        (str("ä\n\"\0🦀"), r#""ä\n\"\u0000🦀""#),
        (Value::str(b"a\xed\xa0\x80".to_vec()).unwrap(), r#"{"wtf8":"61eda080"}"#),
        (Value::Bytes(vec![0, 255]), r#"{"bytes":"00ff"}"#),
        (Value::List(items()), r#"[1,"a"]"#),
        (Value::Tuple(items()), r#"{"tuple":[1,"a"]}"#),
        (Value::Set(items()), r#"{"set":[1,"a"]}"#),
        (Value::FrozenSet(items()), r#"{"frozenset":[1,"a"]}"#),
        (Value::Dict(entries()), r#"{"dict":[["a",1],[2,null]]}"#),
        (Value::OrderedDict(entries()), r#"{"OrderedDict":[["a",1],[2,null]]}"#),
        (Value::Counter(entries()), r#"{"Counter":[["a",1],[2,null]]}"#),
        (
            Value::DefaultDict { factory: Some("builtins:list".into()), entries: entries() },
            r#"{"defaultdict":["builtins:list",["a",1],[2,null]]}"#,
        ),
        (Value::DefaultDict { factory: None, entries: vec![] }, r#"{"defaultdict":[null]}"#),
        (Value::Deque { maxlen: Some(9), items: items() }, r#"{"deque":[9,1,"a"]}"#),
        (Value::Deque { maxlen: None, items: items() }, r#"{"deque":[null,1,"a"]}"#),
        (
            Value::Deque { maxlen: Some(u64::MAX), items: vec![] },
            r#"{"deque":[{"int":"0xffffffffffffffff"}]}"#,
        ),
        (
            Value::NamedTuple { type_name: type_name.clone(), fields: fields() },
            r#"{"namedtuple":["m:T",["x",1]]}"#,
        ),
        (
            Value::Dataclass { type_name: type_name.clone(), fields: fields() },
            r#"{"dataclass":["m:T",["x",1]]}"#,
        ),
        (Value::Enum { type_name, name: "RED".into() }, r#"{"enum":["m:T","RED"]}"#),
        (
            Value::NumpyScalar { dtype: "<f4".into(), bytes: vec![0, 0, 128, 63] },
            r#"{"numpy":["<f4","0000803f"]}"#,
        ),
        (Value::TorchDtype("bfloat16".into()), r#"{"torch.dtype":"bfloat16"}"#),
        (Value::TorchSize(vec![2, 3]), r#"{"torch.Size":[2,3]}"#),
        (Value::TorchDevice("cuda:0".into()), r#"{"torch.device":"cuda:0"}"#),
        (Value::Path("/a".into()), r#"{"path":"/a"}"#),
        (Value::Object(Box::new(Value::Int(1))), r#"{"object":1}"#),
        (tensor("a/b"), r#"{"tensor":{"lib":"torch","name":"a/b"}}"#),
        (
            Value::Tensor(TensorRef { name: "w".into(), lib: Lib::Jax, param: true, whole: None }),
            r#"{"tensor":{"lib":"jax","name":"w","param":true}}"#,
        ),
        (
            Value::Tensor(TensorRef {
                name: "w#".into(),
                lib: Lib::Torch,
                param: false,
                whole: Some(Arc::new(Whole { dtype: Dtype::BF16, shape: vec![8, 4] })),
            }),
            r#"{"tensor":{"dtype":"BF16","lib":"torch","name":"w#","shape":[8,4]}}"#,
        ),
        (Value::Pickle(vec![128, 4]), r#"{"pickle":"8004"}"#),
    ] {
        assert_eq!(serde_json::to_string(&value).unwrap(), json);
        assert_eq!(serde_json::from_str::<Value>(json).unwrap(), value, "{json}");
    }
}

#[test]
fn errors_say_where_and_what() {
    for (json, message) in [
        (
            json!({"dict": [["a", {"tuple": [1, {"tensr": 1}]}]]}),
            concat!(
                r#"at .["dict"][0][1]["tuple"][1]["tensr"]: "#,
                r#"unknown type "tensr": a newer tierkeep may know it"#
            ),
        ),
        (json!({}), "at .: not an object with one key, which is a type"),
        (json!({"int": "1", "float": "1"}), "at .: not an object with one key, which is a type"),
        (json!([1.5]), r#"at .[0]: not an integer below 2^53: larger ones are {"int": "..."}"#),
        (json!(1_u64 << 53), r#"at .: not an integer below 2^53: larger ones are {"int": "..."}"#),
        (json!({"int": "007"}), r#"at .["int"]: not the digits of an int"#),
        (json!({"float": "nan"}), r#"at .["float"]: not a float"#),
        (json!({"float": "nan:3ff0000000000000"}), r#"at .["float"]: not a float"#),
        (json!({"bytes": "0F"}), r#"at .["bytes"]: not bytes as lower-case hex"#),
        (json!({"bytes": "000"}), r#"at .["bytes"]: not bytes as lower-case hex"#),
        (json!({"wtf8": "61"}), r#"at .["wtf8"]: not a str with a lone surrogate"#),
        (json!({"dict": [["a"]]}), r#"at .["dict"][0]: not a key and a value"#),
        (json!({"deque": [-1]}), r#"at .["deque"][0]: not a length"#),
        (
            json!({"deque": []}),
            r#"at .["deque"][0]: not an array that begins with a type, a factory or a length"#,
        ),
        (
            json!({"torch.Size": [2, "3"]}),
            r#"at .["torch.Size"][1]: not an integer below 2^53: larger ones are {"int": "..."}"#,
        ),
        (
            json!({"tensor": {"lib": "torch", "name": "a", "x": 1}}),
            concat!(
                r#"at .["tensor"]: not a tensor: lib, name, param where it is true, "#,
                "dtype and shape where it is cut"
            ),
        ),
        (
            json!({"tensor": {"lib": "tf", "name": "a"}}),
            r#"at .["tensor"]["lib"]: not torch, numpy or jax"#,
        ),
    ] {
        assert_eq!(Value::decode(&json).unwrap_err().to_string(), message);
    }
    let long = "x".repeat(1 << 20);
    assert!(Value::decode(&json!({ long: 1 })).unwrap_err().to_string().len() < 300);
}

#[test]
fn ints_and_strs_have_one_form() {
    assert_eq!(Value::int("-9223372036854775808"), Some(Value::Int(i64::MIN)));
    assert_eq!(Value::int("9223372036854775807"), Some(Value::Int(i64::MAX)));
    assert_eq!(Value::int("0"), Some(Value::Int(0)));
    for big in ["0x8000000000000000", "-0x8000000000000001", "-0xffffffffffffffff0"] {
        assert!(matches!(Value::int(big), Some(Value::BigInt(x)) if x.text() == big), "{big}");
    }
    for wrong in ["", "-", "-0", "+1", "01", "-01", "1 ", "1_0", "١"] {
        assert_eq!(Value::int(wrong), None, "{wrong}");
    }
    // Each number has one spelling: hex from where decimal ends, and no other hex.
    for wrong in [
        "9223372036854775808",
        "-9223372036854775809",
        "0x7fffffffffffffff",
        "-0x8000000000000000",
        "0x08000000000000000",
        "0xFFFFFFFFFFFFFFFF",
        "0x",
        "-0x",
        "0x1",
        "0x0",
        "0x-ffffffffffffffff",
        "0x+ffffffffffffffff",
        "+0xffffffffffffffff",
        "0xfffffffffffffffg",
    ] {
        assert_eq!(Value::int(wrong), None, "{wrong}");
    }

    assert_eq!(Value::str("a🦀".into()), Some(str("a🦀")));
    // Two surrogates that would be one character are still two surrogates in Python.
    let pair = b"\xed\xa0\xbd\xed\xb8\x80".to_vec();
    assert!(matches!(Value::str(pair), Some(Value::SurrogateStr(_))));
    for wrong in [&b"\xff"[..], b"\xed\xa0", b"\xed\xa0\x80\xff", b"\xc0\x80", b"\xa0\x80"] {
        assert_eq!(Value::str(wrong.to_vec()), None, "{wrong:?}");
    }
}

#[test]
fn an_int_of_millions_of_digits_is_a_value_like_any_other() {
    // As decimal digits it would take minutes.
    let big = Value::int(&format!("-0x{}", "9".repeat(20_000_000))).unwrap();
    assert_eq!(Value::decode(&encode(&big)), Ok(big));
}

#[test]
fn what_is_too_long_for_a_manifest_is_refused_by_name() {
    let size = usize::try_from(VALUE_BYTES_MAX / 2 + 1).unwrap();
    let state = |leaf| Value::Dict(vec![(str("a"), Value::List(vec![Value::None, leaf]))]);
    // Untouched zeros take no memory, and nothing is written of them.
    let error = state(Value::Bytes(vec![0; size])).write_json(&mut Vec::new()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a/1: it takes 1073741826 bytes of the manifest, which has at most 1073741824: put it into \
         an array"
    );

    // Together too long: the longest is named.
    let mut out = b"before".to_vec();
    let long = state(Value::int(&format!("0x1{}", "0".repeat(90))).unwrap());
    let both = Value::List(vec![Value::Str("x".repeat(80)), long]);
    assert_eq!(both.write_at_most(&mut out, 250), Ok(()));
    out.truncate(6);
    let error = both.write_at_most(&mut out, 200).unwrap_err();
    assert_eq!((error.path.as_str(), error.problem), ("1/a/1", EncodeProblem::TooLong(93, 200)));
    assert_eq!(out, b"before");
}

#[test]
fn keys_and_places_are_as_a_person_names_them() {
    let key = |value: Value| value.as_key().unwrap();
    assert_eq!(key(str("a")), Key::Str("a".into()));
    assert_eq!(key(Value::Int(-3)), Key::Index(-3));
    assert_eq!(key(Value::Bool(true)), Key::Other("true".into()));
    assert_eq!(
        key(Value::Tuple(vec![Value::Int(1), str("/")])),
        Key::Other(r#"{"tuple":[1,"/"]}"#.into())
    );
    let state = Value::Dict(vec![
        (
            str("model"),
            Value::Object(Box::new(Value::OrderedDict(vec![
                (str("layers.0.weight"), tensor("w")),
                (str("lr"), Value::float(0.1)),
            ]))),
        ),
        (
            Value::Int(0),
            Value::NamedTuple { type_name: "m:N".into(), fields: vec![("mu".into(), tensor("m"))] },
        ),
        (str("0"), Value::List(vec![Value::None, tensor("x")])),
    ]);
    let names: Vec<_> = state.tensors().unwrap().iter().map(|(path, _)| join(path)).collect();
    assert_eq!(names, ["model/layers.0.weight", "0/mu", "~s0/1"]);
    assert_eq!(tensor("t").tensors().unwrap()[0].0, []);
}
