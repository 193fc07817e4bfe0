//! JSON back to a value. The JSON may come from anybody: nothing here panics, recurses without a
//! bound or guesses.
//!
//! | tag | body |
//! |---|---|
//! | `int` | `"-?digits"`, beyond 64 bits `"-?0x` hex digits`"`; below 2^53 it is a plain number |
//! | `float` | `"0.1"`, `"inf"`, `"-inf"`, `"nan:` 16 hex digits`"` |
//! | `complex` | `[float's body, float's body]` |
//! | `wtf8`, `bytes`, `pickle` | `"hex"` |
//! | `tuple`, `set`, `frozenset` | `[item, ...]` |
//! | `dict`, `OrderedDict`, `Counter` | `[[key, value], ...]` |
//! | `defaultdict` | `[factory or null, [key, value], ...]` |
//! | `deque` | `[maxlen or null, item, ...]` |
//! | `namedtuple`, `dataclass` | `["module:QualName", ["field", value], ...]` |
//! | `enum` | `["module:QualName", "NAME"]` |
//! | `numpy` | `["<f4", "hex"]` |
//! | `torch.dtype`, `torch.device`, `path` | `"text"` |
//! | `torch.Size` | `[int, ...]` |
//! | `object` | value |
//! | `tensor` | `{"lib": "torch", "name": "...", "param": true or absent}`; cut: also `"dtype"`, `"shape"` |

use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error as _};
use serde_json::Value as Json;

use super::{Lib, TensorRef, VALUE_DEPTH_MAX, Value, Whole, is_hex_digit};
use crate::state::dtype::Dtype;

/// JSON that is not an encoded value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at .{at}: {problem}")]
pub struct DecodeError {
    /// Where: after a dot, a path that `jq` takes. Empty at the root.
    pub at: String,
    /// What is wrong there.
    pub problem: DecodeProblem,
}

/// What is wrong with the JSON.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeProblem {
    /// Deeper than [`VALUE_DEPTH_MAX`].
    #[error("nested deeper than {VALUE_DEPTH_MAX} levels")]
    TooDeep,
    /// A tag that this tierkeep does not know; at most its first 64 characters.
    #[error("unknown type {0:?}: a newer tierkeep may know it")]
    UnknownTag(String),
    /// Something else than what must stand there.
    #[error("not {0}")]
    Not(&'static str),
    /// A tensor where it has no place.
    #[error("a tensor in a key of a dict or in a set")]
    TensorInKey,
}

impl Value {
    /// The value that `json` encodes.
    ///
    /// # Errors
    /// It does not encode one; the error says where.
    pub fn decode(json: &Json) -> Result<Self, DecodeError> {
        Level { depth: 1, hashed: false }.value(json)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::decode(&Json::deserialize(d)?).map_err(D::Error::custom)
    }
}

type Result<T, E = DecodeError> = std::result::Result<T, E>;

fn fail<T>(problem: DecodeProblem) -> Result<T> {
    Err(DecodeError { at: String::new(), problem })
}

/// The error that `what` should have stood here.
fn not(what: &'static str) -> DecodeError {
    DecodeError { at: String::new(), problem: DecodeProblem::Not(what) }
}

/// Puts `step` before the error's place while it travels up. At most three for each level.
fn under<T>(result: Result<T>, step: impl FnOnce() -> String) -> Result<T> {
    result.map_err(|error| DecodeError { at: step() + &error.at, ..error })
}

#[derive(Clone, Copy)]
struct Level {
    depth: usize,
    /// In a key or a set.
    hashed: bool,
}

impl Level {
    fn below(self) -> Self {
        Self { depth: self.depth + 1, ..self }
    }

    fn key(self) -> Self {
        Self { hashed: true, ..self }
    }

    fn value(self, json: &Json) -> Result<Value> {
        if self.depth > VALUE_DEPTH_MAX {
            return fail(DecodeProblem::TooDeep);
        }
        match json {
            Json::Null => Ok(Value::None),
            Json::Bool(x) => Ok(Value::Bool(*x)),
            Json::Number(_) => small_int(json).map(Value::Int),
            Json::String(text) => Ok(Value::Str(text.clone())),
            Json::Array(_) => self.items(json, 0).map(Value::List),
            Json::Object(object) => {
                let mut tags = object.iter();
                let (Some((tag, body)), None) = (tags.next(), tags.next()) else {
                    return Err(not("an object with one key, which is a type"));
                };
                under(self.tagged(tag, body), || format!("[{}]", quoted(tag)))
            }
        }
    }

    fn tagged(self, tag: &str, body: &Json) -> Result<Value> {
        Ok(match tag {
            "int" => Value::int(text(body)?).ok_or_else(|| not("the digits of an int"))?,
            "float" => Value::Float(float(body)?),
            "complex" => {
                let [re, im] = pair(body, "two floats")?;
                Value::Complex(
                    under(float(re), || "[0]".into())?,
                    under(float(im), || "[1]".into())?,
                )
            }
            "wtf8" => match Value::str(hex(body)?) {
                Some(value @ Value::SurrogateStr(_)) => value,
                _ => return Err(not("a str with a lone surrogate")),
            },
            "bytes" => Value::Bytes(hex(body)?),
            "pickle" => Value::Pickle(hex(body)?),
            "tuple" => Value::Tuple(self.items(body, 0)?),
            "set" => Value::Set(self.key().items(body, 0)?),
            "frozenset" => Value::FrozenSet(self.key().items(body, 0)?),
            "dict" => Value::Dict(self.entries(body, 0)?),
            "OrderedDict" => Value::OrderedDict(self.entries(body, 0)?),
            "Counter" => Value::Counter(self.entries(body, 0)?),
            "defaultdict" => Value::DefaultDict {
                factory: under(head(body).and_then(|name| maybe(name, text)), || "[0]".into())?
                    .map(str::to_owned),
                entries: self.entries(body, 1)?,
            },
            "deque" => Value::Deque {
                maxlen: under(head(body).and_then(|n| maybe(n, length)), || "[0]".into())?,
                items: self.items(body, 1)?,
            },
            "namedtuple" => {
                let (type_name, fields) = self.fields(body)?;
                Value::NamedTuple { type_name, fields }
            }
            "dataclass" => {
                let (type_name, fields) = self.fields(body)?;
                Value::Dataclass { type_name, fields }
            }
            "enum" => {
                let [type_name, name] = pair(body, "a type and a name")?;
                Value::Enum { type_name: text(type_name)?.into(), name: text(name)?.into() }
            }
            "numpy" => {
                let [dtype, bytes] = pair(body, "a dtype and its bytes")?;
                Value::NumpyScalar { dtype: text(dtype)?.into(), bytes: hex(bytes)? }
            }
            "torch.dtype" => Value::TorchDtype(text(body)?.into()),
            "torch.device" => Value::TorchDevice(text(body)?.into()),
            "torch.Size" => {
                let dims = array(body)?.iter().enumerate();
                let dims = dims.map(|(i, dim)| under(int64(dim), || format!("[{i}]")));
                Value::TorchSize(dims.collect::<Result<_>>()?)
            }
            "path" => Value::Path(text(body)?.into()),
            "object" => Value::Object(Box::new(self.below().value(body)?)),
            "tensor" if self.hashed => return fail(DecodeProblem::TensorInKey),
            "tensor" => Value::Tensor(tensor(body)?),
            unknown => return fail(DecodeProblem::UnknownTag(head_of(unknown))),
        })
    }

    /// The array's elements from `first` on.
    fn items(self, json: &Json, first: usize) -> Result<Vec<Value>> {
        let rows = array(json)?.iter().enumerate().skip(first);
        rows.map(|(i, row)| under(self.below().value(row), || format!("[{i}]"))).collect()
    }

    fn entries(self, json: &Json, first: usize) -> Result<Vec<(Value, Value)>> {
        let rows = array(json)?.iter().enumerate().skip(first);
        let entry = |row| {
            let [key, value] = pair(row, "a key and a value")?;
            let key = under(self.below().key().value(key), || "[0]".into())?;
            Ok((key, under(self.below().value(value), || "[1]".into())?))
        };
        rows.map(|(i, row)| under(entry(row), || format!("[{i}]"))).collect()
    }

    fn fields(self, json: &Json) -> Result<(String, Vec<(String, Value)>)> {
        let type_name = under(head(json).and_then(text), || "[0]".into())?.to_owned();
        let rows = array(json)?.iter().enumerate().skip(1);
        let field = |row| {
            let [name, value] = pair(row, "a field and its value")?;
            let name = under(text(name), || "[0]".into())?.to_owned();
            Ok((name, under(self.below().value(value), || "[1]".into())?))
        };
        let fields = rows.map(|(i, row)| under(field(row), || format!("[{i}]")));
        Ok((type_name, fields.collect::<Result<_>>()?))
    }
}

fn tensor(json: &Json) -> Result<TensorRef> {
    let shape =
        || not("a tensor: lib, name, param where it is true, dtype and shape where it is cut");
    let object = json.as_object().ok_or_else(shape)?;
    let (Some(lib), Some(name)) = (object.get("lib"), object.get("name")) else {
        return Err(shape());
    };
    let param = match object.get("param") {
        None => false,
        Some(Json::Bool(true)) => true,
        Some(_) => return Err(shape()),
    };
    let whole = match (object.get("dtype"), object.get("shape")) {
        (None, None) => None,
        (Some(dtype), Some(dims)) => Some(Arc::new(whole(dtype, dims)?)),
        _ => return Err(shape()),
    };
    if object.len() != 2 + usize::from(param) + 2 * usize::from(whole.is_some()) {
        return Err(shape());
    }
    let lib = Lib::parse(text(lib)?).ok_or_else(|| not("torch, numpy or jax"));
    let lib = under(lib, || "[\"lib\"]".into())?;
    Ok(TensorRef { name: text(name)?.into(), lib, param, whole })
}

fn whole(dtype: &Json, dims: &Json) -> Result<Whole> {
    let known = text(dtype).and_then(|name| Dtype::parse(name).ok_or_else(|| not("a dtype")));
    let dtype = under(known, || "[\"dtype\"]".into())?;
    let dim = |dim: &Json| dim.as_u64().ok_or_else(|| not("a size"));
    let shape = array(dims).and_then(|dims| dims.iter().map(dim).collect());
    let shape: Vec<u64> = under(shape, || "[\"shape\"]".into())?;
    if dtype.bytes_of(&shape).is_none() {
        return Err(not("a shape below 2^64 bytes"));
    }
    Ok(Whole { dtype, shape })
}

fn array(json: &Json) -> Result<&Vec<Json>> {
    json.as_array().ok_or_else(|| not("an array"))
}

fn head(json: &Json) -> Result<&Json> {
    array(json)?
        .first()
        .ok_or_else(|| not("an array that begins with a type, a factory or a length"))
}

fn maybe<'a, T>(json: &'a Json, some: fn(&'a Json) -> Result<T>) -> Result<Option<T>> {
    if json.is_null() { Ok(None) } else { some(json).map(Some) }
}

fn pair<'a>(json: &'a Json, what: &'static str) -> Result<&'a [Json; 2]> {
    json.as_array().and_then(|row| row.as_slice().try_into().ok()).ok_or_else(|| not(what))
}

fn text(json: &Json) -> Result<&str> {
    json.as_str().ok_or_else(|| not("a string"))
}

/// A larger number may have been rounded by whatever wrote it, so it is refused.
fn small_int(json: &Json) -> Result<i64> {
    json.as_i64()
        .filter(|x| x.unsigned_abs() < 1 << 53)
        .ok_or_else(|| not("an integer below 2^53: larger ones are {\"int\": \"...\"}"))
}

/// An int of any size where no other value may stand.
fn int(json: &Json) -> Result<Value> {
    let wide = json.as_object().filter(|object| object.len() == 1).and_then(|o| o.get("int"));
    match wide {
        Some(digits) => Value::int(text(digits)?).ok_or_else(|| not("the digits of an int")),
        None => small_int(json).map(Value::Int),
    }
}

fn int64(json: &Json) -> Result<i64> {
    match int(json)? {
        Value::Int(x) => Ok(x),
        _ => Err(not("an int of 64 bits")),
    }
}

fn length(json: &Json) -> Result<u64> {
    let length = match int(json)? {
        Value::Int(x) => u64::try_from(x).ok(),
        Value::BigInt(x) => x.as_u64(),
        _ => None,
    };
    length.ok_or_else(|| not("a length"))
}

/// Any decimal is taken, not only the shortest: how to print a float may change, how to read one
/// does not.
fn float(json: &Json) -> Result<u64> {
    let text = text(json)?;
    let bits = if let Some(digits) = text.strip_prefix("nan:") {
        let digits = Some(digits).filter(|d| d.len() == 16 && d.bytes().all(is_hex_digit));
        let bits = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        bits.filter(|bits| f64::from_bits(*bits).is_nan())
    } else {
        text.parse::<f64>().ok().filter(|x| !x.is_nan()).map(f64::to_bits)
    };
    bits.ok_or_else(|| not("a float"))
}

fn hex(json: &Json) -> Result<Vec<u8>> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text(json)?.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
    let bytes = bytes.collect::<Option<Vec<u8>>>().filter(|_| rest.is_empty());
    bytes.ok_or_else(|| not("bytes as lower-case hex"))
}

/// A tag as `jq` wants it, and not all of one that somebody made long.
fn quoted(tag: &str) -> String {
    Json::from(head_of(tag)).to_string()
}

fn head_of(tag: &str) -> String {
    tag.chars().take(64).collect()
}
