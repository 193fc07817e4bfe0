//! The element types that safetensors and torch share, by the names of the safetensors format.

use std::fmt;

/// An element type. `C128` and `C32` do not exist in safetensors: they lie in the payload as `F64`
/// and `F16` with a last dimension of 2, and the manifest keeps the true type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Dtype {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C32,
    C64,
    F64,
    I64,
    U64,
    C128,
}

const ALL: [(Dtype, &str, u32); 24] = [
    (Dtype::BOOL, "BOOL", 8),
    (Dtype::F4, "F4", 4),
    (Dtype::F6_E2M3, "F6_E2M3", 6),
    (Dtype::F6_E3M2, "F6_E3M2", 6),
    (Dtype::U8, "U8", 8),
    (Dtype::I8, "I8", 8),
    (Dtype::F8_E5M2, "F8_E5M2", 8),
    (Dtype::F8_E4M3, "F8_E4M3", 8),
    (Dtype::F8_E8M0, "F8_E8M0", 8),
    (Dtype::F8_E4M3FNUZ, "F8_E4M3FNUZ", 8),
    (Dtype::F8_E5M2FNUZ, "F8_E5M2FNUZ", 8),
    (Dtype::I16, "I16", 16),
    (Dtype::U16, "U16", 16),
    (Dtype::F16, "F16", 16),
    (Dtype::BF16, "BF16", 16),
    (Dtype::I32, "I32", 32),
    (Dtype::U32, "U32", 32),
    (Dtype::F32, "F32", 32),
    (Dtype::C32, "C32", 32),
    (Dtype::C64, "C64", 64),
    (Dtype::F64, "F64", 64),
    (Dtype::I64, "I64", 64),
    (Dtype::U64, "U64", 64),
    (Dtype::C128, "C128", 128),
];

impl Dtype {
    /// Every element type.
    pub fn all() -> impl Iterator<Item = Self> {
        ALL.iter().map(|(dtype, ..)| *dtype)
    }

    /// The name in manifests and, but for `C32` and `C128`, in safetensors headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        ALL[self as usize].1
    }

    /// The inverse of [`name`](Self::name).
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        ALL.iter().find(|(_, n, _)| *n == name).map(|(dtype, ..)| *dtype)
    }

    /// Bits of one element.
    #[must_use]
    pub fn bits(self) -> u32 {
        ALL[self as usize].2
    }

    /// Bytes of a tensor of `shape`; `None` on overflow or where it is not a whole number of bytes.
    #[must_use]
    pub fn bytes_of(self, shape: &[u64]) -> Option<u64> {
        let elements = shape.iter().try_fold(1_u64, |n, d| n.checked_mul(*d))?;
        let bits = elements.checked_mul(u64::from(self.bits()))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// How it lies in the payload: the safetensors type, and the extra last dimension it takes.
    #[must_use]
    pub fn stored(self) -> (Self, Option<u64>) {
        match self {
            Self::C32 => (Self::F16, Some(2)),
            Self::C128 => (Self::F64, Some(2)),
            other => (other, None),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, (dtype, name, _)) in ALL.iter().enumerate() {
            assert_eq!(*dtype as usize, i);
            assert_eq!(Dtype::parse(name), Some(*dtype));
        }
    }
}
