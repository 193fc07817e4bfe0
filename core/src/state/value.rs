//! What is not a tensor, with its types: the tree that the manifest stores as JSON and that comes
//! back as it went in.
//!
//! `null`, booleans, strs, lists and small ints are themselves in JSON; everything else is an
//! object with one key, its type (`{"tuple": [1, "a"]}`, `{"float": "0.1"}`), so that `jq` and a
//! person can read it. The table of tags is in [`decode`](Value::decode)'s file.
//!
//! It does not own:
//! - walking Python objects, and refusing those it cannot store
//! - importing the types that it names: whoever rebuilds them decides which may be imported
//! - the tensors' bytes, shapes and dtypes: a [`TensorRef`] is a key of the manifest's table
//!
//! # Invariants
//!
//! - What was encoded decodes to the same value, to the last bit of a NaN.
//! - A value deeper than [`VALUE_DEPTH_MAX`] is refused, both ways; one that is longer than
//!   [`VALUE_BYTES_MAX`] is refused by name.
//! - At the limit, the JSON can be parsed with the manifest around it.
//! - No tensor lies in a key or in a set: it would have no place with a name that is the same in
//!   every process.
//! - No JSON makes decode panic.
//!
//! Clone, comparison and drop recurse: whoever builds a value from something hostile counts its
//! depth while building.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

use std::{convert::Infallible, sync::Arc};

pub use self::decode::{DecodeError, DecodeProblem};
pub use self::encode::{EncodeError, EncodeProblem};
use super::{dtype::Dtype, path::Key};

/// Levels of a value; a leaf is one level.
///
/// `serde_json` parses 127 levels of JSON. A dict is the worst container with three (object, rows,
/// row) for each of ours, `torch.Size` with a huge dimension the worst leaf with three:
/// 39 * 3 + 3 = 120, and [`JSON_LEVELS_AROUND_MAX`] are left to the manifest.
pub const VALUE_DEPTH_MAX: usize = 40;

/// Levels of JSON that may lie around an encoded value.
pub const JSON_LEVELS_AROUND_MAX: usize = 7;

const _: () = assert!((VALUE_DEPTH_MAX - 1) * 3 + 3 + JSON_LEVELS_AROUND_MAX == 127);

/// Bytes of JSON that a tree may have: those of the manifest that it is a part of.
pub const VALUE_BYTES_MAX: u64 = crate::record::RECORD_BYTES_MAX;

/// A value of the state tree.
///
/// Names of types are `module:QualName`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// `None`
    None,
    /// `True` or `False`
    Bool(bool),
    /// An int of 64 bits. [`Value::int`] picks between this and [`Value::BigInt`].
    Int(i64),
    /// An int beyond 64 bits.
    BigInt(BigInt),
    /// The bits of a float.
    Float(u64),
    /// The bits of a complex: real part, imaginary part.
    Complex(u64, u64),
    /// A str. [`Value::str`] picks between this and [`Value::SurrogateStr`].
    Str(String),
    /// A str with lone surrogates, as file names of other encodings have them.
    SurrogateStr(SurrogateStr),
    /// `bytes`
    Bytes(Vec<u8>),
    /// `list`
    List(Vec<Value>),
    /// `tuple`
    Tuple(Vec<Value>),
    /// `dict`, in its order, with keys of any kind.
    Dict(Vec<(Value, Value)>),
    /// `collections.OrderedDict`
    OrderedDict(Vec<(Value, Value)>),
    /// `collections.defaultdict`
    DefaultDict {
        /// The name of what makes missing values.
        factory: Option<String>,
        /// As in a dict.
        entries: Vec<(Value, Value)>,
    },
    /// `collections.Counter`
    Counter(Vec<(Value, Value)>),
    /// `set`
    Set(Vec<Value>),
    /// `frozenset`
    FrozenSet(Vec<Value>),
    /// `collections.deque`
    Deque {
        /// How many it holds before it drops from the other end.
        maxlen: Option<u64>,
        /// From left to right.
        items: Vec<Value>,
    },
    /// An instance of a `NamedTuple`.
    NamedTuple {
        /// Its type.
        type_name: String,
        /// In the order of the tuple.
        fields: Vec<(String, Value)>,
    },
    /// An instance of a dataclass.
    Dataclass {
        /// Its type.
        type_name: String,
        /// In the order of the class.
        fields: Vec<(String, Value)>,
    },
    /// A member of an enum.
    Enum {
        /// Its type.
        type_name: String,
        /// The member's name.
        name: String,
    },
    /// A numpy scalar.
    NumpyScalar {
        /// numpy's own spelling, byte order included: `<f4`.
        dtype: String,
        /// Its bytes in that order.
        bytes: Vec<u8>,
    },
    /// `torch.dtype`, as in `bfloat16`.
    TorchDtype(String),
    /// `torch.Size`
    TorchSize(Vec<i64>),
    /// `torch.device`, as in `cuda:0`.
    TorchDevice(String),
    /// A `pathlib` path.
    Path(String),
    /// The `state_dict()` of an object. It has the place of its object: no component of its own.
    Object(Box<Value>),
    /// A tensor.
    Tensor(TensorRef),
    /// A pickle. Made and opened only where the user allowed it by name.
    Pickle(Vec<u8>),
}

/// Where a tensor of the tree is found.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorRef {
    /// Key of the manifest's tensor table. Two places may name one tensor (tied weights). Where it is cut,
    /// `path#`, all the boxes that the ranks hold of it (`state::boxes`).
    pub name: Arc<str>,
    /// What to make of it.
    pub lib: Lib,
    /// It was a `Parameter`.
    pub param: bool,
    /// What the whole is, where it is cut.
    pub whole: Option<Arc<Whole>>,
}

/// The tensor that boxes are cut from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Whole {
    /// Element type.
    pub dtype: Dtype,
    /// In elements.
    pub shape: Vec<u64>,
}

/// The library whose tensor it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lib {
    /// `torch.Tensor`
    Torch,
    /// `numpy.ndarray`
    Numpy,
    /// `jax.Array`
    Jax,
}

impl Lib {
    /// The name in manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Torch => "torch",
            Self::Numpy => "numpy",
            Self::Jax => "jax",
        }
    }

    /// The inverse of [`name`](Self::name).
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Torch, Self::Numpy, Self::Jax].into_iter().find(|lib| lib.name() == name)
    }
}

/// An int beyond 64 bits, as hex digits: to and from them an int goes in time that grows with its
/// length, to and from decimal ones with its square. Made by [`Value::int`] only.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BigInt(String);

impl BigInt {
    /// `0x` and the digits, after a `-` where it is negative: `format(x, "#x")` in Python.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The number, where it is a `u64`.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        u64::from_str_radix(self.0.strip_prefix("0x")?, 16).ok()
    }
}

/// A str with at least one lone surrogate. Made by [`Value::str`] only.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SurrogateStr(Vec<u8>);

impl SurrogateStr {
    /// What `str.encode("utf-8", "surrogatepass")` gives.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// How a child hangs on its parent.
enum Place<'a> {
    /// In the parent's own place.
    Same,
    Index(usize),
    Field(&'a str),
    Key(&'a Value),
    /// It is a key or a member of a set: no place.
    Hashed,
}

impl Place<'_> {
    /// For children of a checked value: a key is encoded without another look.
    fn key(&self) -> Option<Key> {
        match self {
            Self::Same | Self::Hashed => None,
            // A Vec has at most isize::MAX items.
            Self::Index(index) => Some(Key::Index(*index as i64)),
            Self::Field(name) => Some(Key::Str((*name).to_owned())),
            Self::Key(key) => Some(encode::key(key)),
        }
    }
}

impl Value {
    /// The int that this text spells: decimal in 64 bits, `-0x1f` beyond. `None` where it is not
    /// the one spelling of its number (`-0`, `007`, `+1`, `0x1`).
    #[must_use]
    pub fn int(text: &str) -> Option<Self> {
        let digits = text.strip_prefix('-').unwrap_or(text);
        if let Some(hex) = digits.strip_prefix("0x") {
            let canonical =
                !hex.starts_with('0') && !hex.is_empty() && hex.bytes().all(is_hex_digit);
            return (canonical && !fits(text.starts_with('-'), hex))
                .then(|| Self::BigInt(BigInt(text.into())));
        }
        let leading_zero = digits.starts_with('0') && text != "0";
        let only_digits = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|_| only_digits && !leading_zero).map(Self::Int)
    }

    /// The float `x`.
    #[must_use]
    pub fn float(x: f64) -> Self {
        Self::Float(x.to_bits())
    }

    /// The str with these bytes of UTF-8 in which surrogates may stand, as
    /// `str.encode("utf-8", "surrogatepass")` gives them; `None` for any other bytes.
    #[must_use]
    pub fn str(bytes: Vec<u8>) -> Option<Self> {
        let bytes = match String::from_utf8(bytes) {
            Ok(text) => return Some(Self::Str(text)),
            Err(error) => error.into_bytes(),
        };
        // A surrogate is ED A0..BF 80..BF, and ED only ever begins a character. With each replaced
        // by a lawful character of three bytes, the rest must be UTF-8.
        let mut lawful = bytes.clone();
        let mut at = 0;
        while let Some([a, b, c]) = lawful.get_mut(at..at + 3) {
            if *a == 0xED && (0xA0..=0xBF).contains(b) && (0x80..=0xBF).contains(c) {
                (*a, *b, *c) = (0xEE, 0x80, 0x80);
            }
            at += 1;
        }
        std::str::from_utf8(&lawful).ok().map(|_| Self::SurrogateStr(SurrogateStr(bytes)))
    }

    /// This value as a key of a dict: a step of a path.
    ///
    /// # Errors
    /// It is too deep, or a tensor is in it.
    pub fn as_key(&self) -> Result<Key, EncodeError> {
        self.check_at(1, true).map_err(Trail::error)?;
        Ok(encode::key(self))
    }

    /// Every tensor with its place, in the order of the tree.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn tensors(&self) -> Result<Vec<(Vec<Key>, &TensorRef)>, EncodeError> {
        self.check()?;
        let mut found = Vec::new();
        self.find_tensors(&mut Vec::new(), &mut found);
        Ok(found)
    }

    fn find_tensors<'a>(&'a self, path: &mut Vec<Key>, found: &mut Vec<(Vec<Key>, &'a TensorRef)>) {
        if let Self::Tensor(tensor) = self {
            found.push((path.clone(), tensor));
        }
        let Ok(()) = self.each_child::<Infallible>(&mut |place, child| {
            // Most children are plain leaves: no key is made for them.
            if matches!(place, Place::Hashed) || child.is_plain() {
                return Ok(());
            }
            let depth = path.len();
            path.extend(place.key());
            child.find_tensors(path, found);
            path.truncate(depth);
            Ok(())
        });
    }

    /// Gives every tensor of the tree to `change`, in no order.
    pub fn for_each_tensor_mut(&mut self, mut change: impl FnMut(&mut TensorRef)) {
        let mut todo = vec![self];
        while let Some(value) = todo.pop() {
            match value {
                Self::Tensor(tensor) => change(tensor),
                Self::List(items) | Self::Tuple(items) | Self::Deque { items, .. } => {
                    todo.extend(items);
                }
                Self::Dict(entries)
                | Self::OrderedDict(entries)
                | Self::Counter(entries)
                | Self::DefaultDict { entries, .. } => {
                    todo.extend(entries.iter_mut().map(|(_, value)| value));
                }
                Self::NamedTuple { fields, .. } | Self::Dataclass { fields, .. } => {
                    todo.extend(fields.iter_mut().map(|(_, value)| value));
                }
                Self::Object(state) => todo.push(state),
                // Sets hold no tensors.
                _ => {}
            }
        }
    }

    /// Looks whether this value can be stored. Encoding does it too; a builder that wants to name
    /// the culprit early calls it itself.
    ///
    /// # Errors
    /// It is deeper than [`VALUE_DEPTH_MAX`], a tensor lies in a key or a set, or a leaf alone is
    /// longer than [`VALUE_BYTES_MAX`].
    pub fn check(&self) -> Result<(), EncodeError> {
        self.check_at(1, false).map_err(Trail::error)
    }

    /// The leaf with the longest text, and about how many bytes of JSON that is.
    fn longest(&self, path: &mut Vec<Key>, found: &mut (u64, Vec<Key>)) {
        let bytes = self.text_bytes();
        if bytes > found.0 {
            *found = (bytes, path.clone());
        }
        let Ok(()) = self.each_child::<Infallible>(&mut |place, child| {
            let depth = path.len();
            path.extend(place.key());
            child.longest(path, found);
            path.truncate(depth);
            Ok(())
        });
    }

    /// About the bytes of JSON of a leaf that may be long; 0 for all else.
    fn text_bytes(&self) -> u64 {
        let bytes = match self {
            Self::BigInt(x) => x.0.len(),
            Self::Str(text) | Self::Path(text) => text.len(),
            Self::SurrogateStr(text) => text.0.len().saturating_mul(2),
            Self::Bytes(bytes) | Self::Pickle(bytes) | Self::NumpyScalar { bytes, .. } => {
                bytes.len().saturating_mul(2)
            }
            _ => 0,
        };
        bytes as u64
    }

    fn check_at(&self, depth: usize, hashed: bool) -> Result<(), Trail> {
        if depth > VALUE_DEPTH_MAX {
            return Err(Trail { keys: Vec::new(), problem: EncodeProblem::TooDeep });
        }
        if hashed && matches!(self, Self::Tensor(_)) {
            return Err(Trail { keys: Vec::new(), problem: EncodeProblem::TensorInKey });
        }
        if self.text_bytes() > VALUE_BYTES_MAX {
            let problem = EncodeProblem::TooLong(self.text_bytes(), VALUE_BYTES_MAX);
            return Err(Trail { keys: Vec::new(), problem });
        }
        self.each_child(&mut |place, child| {
            let hashed = hashed || matches!(place, Place::Hashed);
            child.check_at(depth + 1, hashed).map_err(|mut trail| {
                // A trail inside a key leads nowhere: it ends at the dict or set that has the key.
                if matches!(place, Place::Hashed) {
                    trail.keys.clear();
                }
                trail.keys.extend(place.key());
                trail
            })
        })
    }

    /// One of the leaves that are in every state by the thousand.
    fn is_plain(&self) -> bool {
        matches!(self, Self::None | Self::Bool(_) | Self::Int(_) | Self::Float(_) | Self::Str(_))
    }

    /// Every child, a key before its value; stops at the first error.
    fn each_child<'a, E>(
        &'a self,
        visit: &mut dyn FnMut(Place<'a>, &'a Self) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::List(items) | Self::Tuple(items) | Self::Deque { items, .. } => {
                items.iter().enumerate().try_for_each(|(i, item)| visit(Place::Index(i), item))
            }
            Self::Set(items) | Self::FrozenSet(items) => {
                items.iter().try_for_each(|item| visit(Place::Hashed, item))
            }
            Self::Dict(entries)
            | Self::OrderedDict(entries)
            | Self::Counter(entries)
            | Self::DefaultDict { entries, .. } => entries.iter().try_for_each(|(key, value)| {
                visit(Place::Hashed, key)?;
                visit(Place::Key(key), value)
            }),
            Self::NamedTuple { fields, .. } | Self::Dataclass { fields, .. } => {
                fields.iter().try_for_each(|(name, value)| visit(Place::Field(name), value))
            }
            Self::Object(state) => visit(Place::Same, state),
            Self::None
            | Self::Bool(_)
            | Self::Int(_)
            | Self::BigInt(_)
            | Self::Float(_)
            | Self::Complex(..)
            | Self::Str(_)
            | Self::SurrogateStr(_)
            | Self::Bytes(_)
            | Self::Enum { .. }
            | Self::NumpyScalar { .. }
            | Self::TorchDtype(_)
            | Self::TorchSize(_)
            | Self::TorchDevice(_)
            | Self::Path(_)
            | Self::Tensor(_)
            | Self::Pickle(_) => Ok(()),
        }
    }
}

fn is_hex_digit(b: u8) -> bool {
    b.is_ascii_digit() || (b'a'..=b'f').contains(&b)
}

/// True where the int with these hex digits has 64 bits: it is written in decimal.
fn fits(negative: bool, hex: &str) -> bool {
    let magnitude = u64::from_str_radix(hex, 16).ok().map(i128::from);
    magnitude.is_some_and(|x| i64::try_from(if negative { -x } else { x }).is_ok())
}

/// The way from a problem up to the root, gathered while returning.
struct Trail {
    keys: Vec<Key>,
    problem: EncodeProblem,
}

impl Trail {
    fn error(mut self) -> EncodeError {
        self.keys.reverse();
        EncodeError { path: super::path::join(&self.keys), problem: self.problem }
    }
}
