//! A copy past the cache, with the checksum taken of the source on the way.
//!
//! x86-64 with AVX2 has stores that do not read the line they replace; elsewhere `available` says
//! no.

use crc32fast::Hasher;

pub(super) use kernel::{available, copy};

#[cfg(target_arch = "x86_64")]
mod kernel {
    use std::arch::x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256,
    };

    use super::{super::BLOCK_BYTES, Hasher};

    /// Hardware prefetch stops at each 4 KiB page; this reaches over the edge. From 1 to 4 KiB it
    /// makes no difference.
    const AHEAD_BYTES: usize = 1 << 10;

    const STEP_BYTES: usize = 128;

    pub(crate) fn available() -> bool {
        is_x86_feature_detected!("avx2")
    }

    /// Copies, and takes the bytes at `from` into the checksum from the cache that the copy filled.
    /// First copy, then checksum: the other way round took a tenth longer.
    ///
    /// # Safety
    ///
    /// As [`std::ptr::copy_nonoverlapping`], and [`available`] has said yes.
    pub(crate) unsafe fn copy(
        from: *const u8,
        to: *mut u8,
        n: usize,
        mut checksum: Option<&mut Hasher>,
    ) {
        for done in (0..n).step_by(BLOCK_BYTES) {
            let m = BLOCK_BYTES.min(n - done);
            // SAFETY: [done, done + m) is inside both, and the processor has AVX2.
            unsafe {
                block(from.add(done), to.add(done), m);
                if let Some(hasher) = &mut checksum {
                    hasher.update(std::slice::from_raw_parts(from.add(done), m));
                }
            }
        }
        // Such stores are not ordered by the locks and atomics that later tell another thread about
        // them; the fence does that.
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_sfence() };
    }

    /// # Safety
    ///
    /// As [`std::ptr::copy_nonoverlapping`], on a processor with AVX2.
    #[target_feature(enable = "avx2")]
    unsafe fn block(from: *const u8, to: *mut u8, n: usize) {
        let head = to.align_offset(size_of::<__m256i>()).min(n);
        let whole = (n - head) / STEP_BYTES * STEP_BYTES;
        // SAFETY: head, the steps and the tail together are [0, n); stores of the steps are
        // aligned; a prefetch is a hint and may point anywhere.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, head);
            for at in (head..head + whole).step_by(STEP_BYTES) {
                let (from, to) = (from.add(at), to.add(at));
                let ahead = from.wrapping_add(AHEAD_BYTES);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64).cast());
                let (from, to) = (from.cast::<__m256i>(), to.cast::<__m256i>());
                let a = _mm256_loadu_si256(from);
                let b = _mm256_loadu_si256(from.add(1));
                let c = _mm256_loadu_si256(from.add(2));
                let d = _mm256_loadu_si256(from.add(3));
                _mm256_stream_si256(to, a);
                _mm256_stream_si256(to.add(1), b);
                _mm256_stream_si256(to.add(2), c);
                _mm256_stream_si256(to.add(3), d);
            }
            let tail = head + whole;
            std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), n - tail);
        }
    }
}

/// Elsewhere through the cache: `available` is false, so `copy` is not called.
#[cfg(not(target_arch = "x86_64"))]
mod kernel {
    use super::Hasher;

    pub(crate) fn available() -> bool {
        false
    }

    /// # Safety
    ///
    /// As [`std::ptr::copy_nonoverlapping`].
    pub(crate) unsafe fn copy(
        from: *const u8,
        to: *mut u8,
        n: usize,
        checksum: Option<&mut Hasher>,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, n);
            if let Some(hasher) = checksum {
                hasher.update(std::slice::from_raw_parts(to, n));
            }
        }
    }
}
