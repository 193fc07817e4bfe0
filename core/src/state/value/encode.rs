//! A value to JSON: one encoder, which streams. It is the [`Serialize`] of [`Value`], so a manifest
//! holds a value as a field, and [`Value::write_json`] for the bytes alone.
//!
//! The JSON is canonical: one spelling for each value, objects of several keys sorted.

use std::fmt;

use serde::ser::{Error as _, Serialize, SerializeMap as _, SerializeSeq as _, Serializer};

use super::{TensorRef, VALUE_BYTES_MAX, VALUE_DEPTH_MAX, Value};
use crate::state::path::{Key, join};

/// A value that cannot be stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct EncodeError {
    /// Its place in the tree, as in names of tensors.
    pub path: String,
    /// Why not.
    pub problem: EncodeProblem,
}

/// Why a value cannot be stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeProblem {
    /// Deeper than [`VALUE_DEPTH_MAX`].
    #[error("the state is nested deeper than {VALUE_DEPTH_MAX} levels")]
    TooDeep,
    /// A tensor has no place there.
    #[error("a tensor cannot be stored in a key of a dict or in a set")]
    TensorInKey,
    /// So many bytes of JSON, and how many there may be.
    #[error("it takes {0} bytes of the manifest, which has at most {1}: put it into an array")]
    TooLong(u64, u64),
    /// The writer failed, which a `Vec` does not.
    #[error("could not write JSON: {0}")]
    Json(String),
}

impl Value {
    /// Appends the JSON of this value to `out`; on an error, `out` is as it was.
    ///
    /// # Errors
    /// As [`check`](Value::check), and where all of it is longer than [`VALUE_BYTES_MAX`]; the error
    /// then names the longest leaf.
    pub fn write_json(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.check()?;
        self.write_at_most(out, VALUE_BYTES_MAX)
    }

    pub(super) fn write_at_most(&self, out: &mut Vec<u8>, max: u64) -> Result<(), EncodeError> {
        let start = out.len();
        let written = serde_json::to_writer(&mut *out, &Checked(self));
        let bytes = (out.len() - start) as u64;
        let error = match written {
            Err(e) => {
                let problem = EncodeProblem::Json(e.to_string());
                EncodeError { path: join(&[]), problem }
            }
            Ok(()) if bytes > max => {
                let mut longest = (0, Vec::new());
                self.longest(&mut Vec::new(), &mut longest);
                let (of_it, keys) = longest;
                EncodeError { path: join(&keys), problem: EncodeProblem::TooLong(of_it, max) }
            }
            Ok(()) => return Ok(()),
        };
        out.truncate(start);
        Err(error)
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.check().map_err(S::Error::custom)?;
        Checked(self).serialize(s)
    }
}

/// The step of a path that `key`, which is checked, makes.
pub(super) fn key(key: &Value) -> Key {
    match key {
        Value::Int(index) => Key::Index(*index),
        Value::Str(text) => Key::Str(text.clone()),
        // Nothing in a checked value can fail to be JSON, and a String takes it all.
        other => Key::Other(serde_json::to_string(&Checked(other)).unwrap_or_default()),
    }
}

/// A value whose depth is known to be bounded: below the root nobody counts again.
struct Checked<'a>(&'a Value);

impl Serialize for Checked<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::None => s.serialize_unit(),
            Value::Bool(x) => s.serialize_bool(*x),
            Value::Int(x) => Number(i128::from(*x)).serialize(s),
            Value::BigInt(x) => tagged(s, "int", x.text()),
            Value::Float(bits) => tagged(s, "float", &Float(*bits)),
            Value::Complex(re, im) => tagged(s, "complex", &(Float(*re), Float(*im))),
            Value::Str(text) => s.serialize_str(text),
            Value::SurrogateStr(text) => tagged(s, "wtf8", &Hex(text.bytes())),
            Value::Bytes(bytes) => tagged(s, "bytes", &Hex(bytes)),
            Value::List(items) => Rows(NO_HEAD, Body::Items(items)).serialize(s),
            Value::Tuple(items) => tagged(s, "tuple", &Rows(NO_HEAD, Body::Items(items))),
            Value::Dict(entries) => tagged(s, "dict", &Rows(NO_HEAD, Body::Entries(entries))),
            Value::OrderedDict(entries) => {
                tagged(s, "OrderedDict", &Rows(NO_HEAD, Body::Entries(entries)))
            }
            Value::DefaultDict { factory, entries } => {
                tagged(s, "defaultdict", &Rows(Some(factory), Body::Entries(entries)))
            }
            Value::Counter(entries) => tagged(s, "Counter", &Rows(NO_HEAD, Body::Entries(entries))),
            Value::Set(items) => tagged(s, "set", &Rows(NO_HEAD, Body::Items(items))),
            Value::FrozenSet(items) => tagged(s, "frozenset", &Rows(NO_HEAD, Body::Items(items))),
            Value::Deque { maxlen, items } => {
                let maxlen = maxlen.map(|n| Number(i128::from(n)));
                tagged(s, "deque", &Rows(Some(maxlen), Body::Items(items)))
            }
            Value::NamedTuple { type_name, fields } => {
                tagged(s, "namedtuple", &Rows(Some(type_name), Body::Fields(fields)))
            }
            Value::Dataclass { type_name, fields } => {
                tagged(s, "dataclass", &Rows(Some(type_name), Body::Fields(fields)))
            }
            Value::Enum { type_name, name } => tagged(s, "enum", &(type_name, name)),
            Value::NumpyScalar { dtype, bytes } => tagged(s, "numpy", &(dtype, Hex(bytes))),
            Value::TorchDtype(name) => tagged(s, "torch.dtype", name),
            Value::TorchSize(dims) => tagged(s, "torch.Size", &Dims(dims)),
            Value::TorchDevice(name) => tagged(s, "torch.device", name),
            Value::Path(path) => tagged(s, "path", path),
            Value::Object(state) => tagged(s, "object", &Checked(state)),
            Value::Tensor(tensor) => tagged(s, "tensor", tensor),
            Value::Pickle(bytes) => tagged(s, "pickle", &Hex(bytes)),
        }
    }
}

fn tagged<S, T>(s: S, tag: &str, body: &T) -> Result<S::Ok, S::Error>
where
    S: Serializer,
    T: Serialize + ?Sized,
{
    let mut object = s.serialize_map(Some(1))?;
    object.serialize_entry(tag, body)?;
    object.end()
}

impl Serialize for TensorRef {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let more = usize::from(self.param) + 2 * usize::from(self.whole.is_some());
        let mut object = s.serialize_map(Some(2 + more))?;
        if let Some(whole) = &self.whole {
            object.serialize_entry("dtype", whole.dtype.name())?;
        }
        object.serialize_entry("lib", self.lib.name())?;
        object.serialize_entry("name", &*self.name)?;
        if self.param {
            object.serialize_entry("param", &true)?;
        }
        if let Some(whole) = &self.whole {
            object.serialize_entry("shape", &whole.shape)?;
        }
        object.end()
    }
}

const NO_HEAD: Option<()> = None;

/// An array: the head where there is one, then the children. Flat, because a level of JSON is
/// scarce.
struct Rows<'a, H>(Option<H>, Body<'a>);

#[derive(Clone, Copy)]
enum Body<'a> {
    Items(&'a [Value]),
    Entries(&'a [(Value, Value)]),
    Fields(&'a [(String, Value)]),
}

impl<H: Serialize> Serialize for Rows<'_, H> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let rows = match self.1 {
            Body::Items(items) => items.len(),
            Body::Entries(entries) => entries.len(),
            Body::Fields(fields) => fields.len(),
        };
        let mut array = s.serialize_seq(Some(rows + usize::from(self.0.is_some())))?;
        if let Some(head) = &self.0 {
            array.serialize_element(head)?;
        }
        match self.1 {
            Body::Items(items) => {
                items.iter().try_for_each(|item| array.serialize_element(&Checked(item)))?;
            }
            Body::Entries(entries) => entries
                .iter()
                .try_for_each(|(k, v)| array.serialize_element(&(Checked(k), Checked(v))))?,
            Body::Fields(fields) => fields
                .iter()
                .try_for_each(|(name, v)| array.serialize_element(&(name, Checked(v))))?,
        }
        array.end()
    }
}

/// A JSON number below 2^53, where every reader of JSON is exact; `{"int": "..."}` from there,
/// decimal in 64 bits, hex beyond.
struct Number(i128);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match i64::try_from(self.0) {
            Ok(small) if small.unsigned_abs() < 1 << 53 => s.serialize_i64(small),
            Ok(wide) => tagged(s, "int", &wide.to_string()),
            Err(_) => {
                let sign = if self.0 < 0 { "-" } else { "" };
                tagged(s, "int", &format!("{sign}{:#x}", self.0.unsigned_abs()))
            }
        }
    }
}

struct Dims<'a>(&'a [i64]);

impl Serialize for Dims<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.0.iter().map(|dim| Number(i128::from(*dim))))
    }
}

/// The shortest decimal that reads back the same, and a NaN by its bits.
struct Float(u64);

impl fmt::Display for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let x = f64::from_bits(self.0);
        if x.is_nan() { write!(f, "nan:{:016x}", self.0) } else { write!(f, "{x:?}") }
    }
}

impl Serialize for Float {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

struct Hex<'a>(&'a [u8]);

impl Serialize for Hex<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        const DIGITS: [char; 16] =
            ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
        let mut text = String::with_capacity(self.0.len() * 2);
        for byte in self.0 {
            text.push(DIGITS[usize::from(byte >> 4)]);
            text.push(DIGITS[usize::from(byte & 15)]);
        }
        s.serialize_str(&text)
    }
}
