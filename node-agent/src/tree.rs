//! The values of a state in short form: one line a leaf, its path and what it is.

use tierkeep::state::{
    path::{Key, join},
    value::Value,
};

/// Characters of a value that are shown.
const CHARS_MAX: usize = 60;

/// Every plain value with its path, in the order of the tree. Tensors are left out: they have a
/// table of their own.
pub(crate) fn values(tree: &Value) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    walk(tree, &mut Vec::new(), &mut lines);
    lines
}

fn walk(value: &Value, path: &mut Vec<Key>, lines: &mut Vec<(String, String)>) {
    let mut child = |key: Key, value: &Value, lines: &mut Vec<(String, String)>| {
        path.push(key);
        walk(value, path, lines);
        path.pop();
    };
    match value {
        Value::Tensor(_) => {}
        Value::Object(state) => walk(state, path, lines),
        Value::List(items) | Value::Tuple(items) | Value::Deque { items, .. }
            if !items.iter().all(is_small) =>
        {
            for (key, item) in (0..).zip(items) {
                child(Key::Index(key), item, lines);
            }
        }
        Value::Dict(entries)
        | Value::OrderedDict(entries)
        | Value::Counter(entries)
        | Value::DefaultDict { entries, .. }
            if !entries.is_empty() =>
        {
            for (key, item) in entries {
                // A checked tree has only keys that are keys.
                if let Ok(key) = key.as_key() {
                    child(key, item, lines);
                }
            }
        }
        Value::NamedTuple { fields, .. } | Value::Dataclass { fields, .. }
            if !fields.is_empty() =>
        {
            for (name, item) in fields {
                child(Key::Str(name.clone()), item, lines);
            }
        }
        leaf => lines.push((join(path), cut(&short(leaf)))),
    }
}

/// Numbers and words, which read well in one line.
fn is_small(value: &Value) -> bool {
    match value {
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => true,
        Value::Str(text) => text.len() < 20,
        _ => false,
    }
}

/// A value as Python would say it, roughly.
fn short(value: &Value) -> String {
    let list = |items: &[Value]| {
        let more = (items.len() > 16).then(|| "...".to_owned());
        items.iter().take(16).map(short).chain(more).collect::<Vec<_>>().join(", ")
    };
    match value {
        Value::None => "None".into(),
        Value::Bool(x) => if *x { "True" } else { "False" }.into(),
        Value::Int(x) => x.to_string(),
        Value::BigInt(x) => x.text().to_owned(),
        Value::Float(bits) => format!("{:?}", f64::from_bits(*bits)),
        Value::Complex(re, im) => {
            format!("({:?}, {:?}j)", f64::from_bits(*re), f64::from_bits(*im))
        }
        Value::Str(text) => format!("{text:?}"),
        Value::SurrogateStr(text) => format!("{:?}", String::from_utf8_lossy(text.bytes())),
        Value::Bytes(bytes) => format!("bytes of {}", bytes.len()),
        Value::List(items) => format!("[{}]", list(items)),
        Value::Tuple(items) => format!("({})", list(items)),
        Value::Set(items) => format!("set({})", list(items)),
        Value::FrozenSet(items) => format!("frozenset({})", list(items)),
        Value::Deque { items, .. } => format!("deque({})", list(items)),
        Value::Dict(_) => "{}".into(),
        Value::OrderedDict(_) => "OrderedDict()".into(),
        Value::DefaultDict { .. } => "defaultdict()".into(),
        Value::Counter(_) => "Counter()".into(),
        Value::NamedTuple { type_name, .. } | Value::Dataclass { type_name, .. } => {
            format!("{type_name}()")
        }
        Value::Enum { type_name, name } => format!("{type_name}.{name}"),
        Value::NumpyScalar { dtype, bytes } => format!("numpy {dtype}, bytes {bytes:02x?}"),
        Value::TorchDtype(name) => format!("torch.{name}"),
        Value::TorchSize(dims) => format!("torch.Size({dims:?})"),
        Value::TorchDevice(name) => format!("torch.device({name:?})"),
        Value::Path(path) => format!("Path({path:?})"),
        Value::Object(state) => short(state),
        Value::Tensor(tensor) => format!("tensor {}", tensor.name),
        Value::Pickle(bytes) => format!("pickle of {} bytes", bytes.len()),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.into(),
    }
}
