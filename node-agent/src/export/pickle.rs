//! The one pickle that is written: a dict of names to tensors as `torch.save` has it, protocol 2.
//!
//! It names only what `torch.load(weights_only=True)` allows.

use tierkeep::state::dtype::Dtype;

/// A tensor of the dict.
pub(super) struct Entry<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: Dtype,
    pub(super) shape: &'a [u64],
    /// The record that holds its bytes: `archive/data/<storage>`.
    pub(super) storage: usize,
    pub(super) bytes: u64,
}

/// How torch names the bytes of a dtype.
enum Storage {
    /// An old typed storage, whose size counts elements.
    Typed(&'static str),
    /// Plain bytes; the tensor carries its dtype.
    Untyped(&'static str),
}

fn storage(dtype: Dtype) -> Option<Storage> {
    use Storage::{Typed, Untyped};
    Some(match dtype {
        Dtype::BOOL => Typed("BoolStorage"),
        Dtype::U8 => Typed("ByteStorage"),
        Dtype::I8 => Typed("CharStorage"),
        Dtype::I16 => Typed("ShortStorage"),
        Dtype::I32 => Typed("IntStorage"),
        Dtype::I64 => Typed("LongStorage"),
        Dtype::F16 => Typed("HalfStorage"),
        Dtype::BF16 => Typed("BFloat16Storage"),
        Dtype::F32 => Typed("FloatStorage"),
        Dtype::F64 => Typed("DoubleStorage"),
        Dtype::C64 => Typed("ComplexFloatStorage"),
        Dtype::C128 => Typed("ComplexDoubleStorage"),
        Dtype::U16 => Untyped("uint16"),
        Dtype::U32 => Untyped("uint32"),
        Dtype::U64 => Untyped("uint64"),
        Dtype::C32 => Untyped("complex32"),
        Dtype::F8_E4M3 => Untyped("float8_e4m3fn"),
        Dtype::F8_E5M2 => Untyped("float8_e5m2"),
        Dtype::F8_E8M0 => Untyped("float8_e8m0fnu"),
        Dtype::F8_E4M3FNUZ => Untyped("float8_e4m3fnuz"),
        Dtype::F8_E5M2FNUZ => Untyped("float8_e5m2fnuz"),
        Dtype::F4 | Dtype::F6_E2M3 | Dtype::F6_E3M2 => return None,
    })
}

/// Whether torch has this dtype.
pub(super) fn is_known(dtype: Dtype) -> bool {
    storage(dtype).is_some()
}

/// The pickle; tensors of a dtype that torch does not have are left out.
pub(super) fn pickle(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut p = Pickle { bytes: b"\x80\x02}(".to_vec() };
    for entry in entries {
        p.tensor(entry);
    }
    p.bytes.extend_from_slice(b"u.");
    p.bytes
}

struct Pickle {
    bytes: Vec<u8>,
}

impl Pickle {
    fn tensor(&mut self, entry: &Entry<'_>) {
        let Some(storage) = storage(entry.dtype) else { return };
        self.str(entry.name);
        let (rebuild, (module, class), size) = match storage {
            Storage::Typed(class) => {
                let element = u64::from(entry.dtype.bits() / 8).max(1);
                ("_rebuild_tensor_v2", ("torch", class), entry.bytes / element)
            }
            Storage::Untyped(_) => {
                ("_rebuild_tensor_v3", ("torch.storage", "UntypedStorage"), entry.bytes)
            }
        };
        self.global("torch._utils", rebuild);
        self.bytes.extend_from_slice(b"((");
        self.str("storage");
        self.global(module, class);
        self.str(&entry.storage.to_string());
        self.str("cpu");
        self.int(size);
        self.bytes.extend_from_slice(b"tQ"); // The persistent id is the storage.
        self.int(0);
        self.ints(entry.shape);
        self.ints(&strides(entry.shape));
        self.bytes.push(0x89); // requires_grad: False
        self.global("collections", "OrderedDict");
        self.bytes.extend_from_slice(b")R");
        if let Storage::Untyped(dtype) = storage {
            self.global("torch", dtype);
        }
        self.bytes.extend_from_slice(b"tR");
    }

    fn str(&mut self, text: &str) {
        self.bytes.push(b'X');
        // A name comes from a manifest of at most 1 GiB.
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn global(&mut self, module: &str, name: &str) {
        self.bytes.extend_from_slice(format!("c{module}\n{name}\n").as_bytes());
    }

    fn int(&mut self, n: u64) {
        if let Ok(small) = i32::try_from(n) {
            self.bytes.push(b'J');
            self.bytes.extend_from_slice(&small.to_le_bytes());
        } else {
            // Little-endian two's complement: the ninth byte keeps it positive.
            self.bytes.extend_from_slice(&[0x8a, 9]);
            self.bytes.extend_from_slice(&n.to_le_bytes());
            self.bytes.push(0);
        }
    }

    fn ints(&mut self, numbers: &[u64]) {
        self.bytes.push(b'(');
        for n in numbers {
            self.int(*n);
        }
        self.bytes.push(b't');
    }
}

/// Row-major, in elements, as torch counts them where a dimension is 0.
fn strides(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1_u64; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim].saturating_mul(shape[dim].max(1));
    }
    strides
}
