//! Memory that is allocated once: zeroed, touched at once, counted, and refused with an error.
//!
//! A [`Buffer`] is an anonymous mapping, so an impossible size is an error and not an abort, and
//! every page is written when it is made, so that the process's resident memory follows the plan
//! from the start. [`Disjoint`] lets tasks of one parallel operation write to parts of a buffer.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

use crate::engine::EngineError;
use crate::quant::bf16;

/// Plain numbers for which all-zero bytes are a value and every bit pattern is allowed.
///
/// # Safety
/// The type has no padding, no invalid bit pattern and an alignment of at most 4096.
#[allow(unsafe_code, reason = "the marker of plain numbers")]
pub unsafe trait Plain: Copy + Send + Sync + 'static {
    /// What poisoned memory is filled with: NaN, where the type has one.
    const POISON: Self;
}

// SAFETY: plain numbers, of alignment 1 to 4.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for u8 {
    const POISON: Self = 0xFF;
}
// SAFETY: as above.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for u16 {
    const POISON: Self = bf16::NAN;
}
// SAFETY: as above.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for u32 {
    const POISON: Self = u32::MAX;
}
// SAFETY: as above.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for f32 {
    const POISON: Self = f32::NAN;
}

/// A fixed number of plain values, page aligned.
pub struct Buffer<T> {
    map: MmapMut,
    len: usize,
    _values: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// `len` zeros, resident from the start; `what` names the memory in the error.
    ///
    /// # Errors
    /// The system refuses the memory, or its size in bytes overflows.
    pub fn zeroed(what: &str, len: usize) -> Result<Self, EngineError> {
        let mut zeros = Self::mapped(what, len, HUGE_PAGE)?;
        zeros.map[..len * size_of::<T>()].fill(0);
        Ok(zeros)
    }

    /// The same, a page resident from when it is first written: by the thread that fills it.
    ///
    /// # Errors
    /// As [`Buffer::zeroed`].
    pub fn to_fill(what: &str, len: usize) -> Result<Self, EngineError> {
        Self::mapped(what, len, 1)
    }

    /// A mapping that nothing was written to; where it takes huge pages, of a multiple of `whole` bytes. Linux has
    /// one of whole huge pages begin with one (since 6.7), and any other anywhere, whose ends are small pages then:
    /// of a buffer of few huge pages, half.
    fn mapped(what: &str, len: usize, whole: usize) -> Result<Self, EngineError> {
        let out_of_memory = |needed: u64| EngineError::OutOfMemory {
            what: what.to_owned(),
            needed,
        };
        let n_bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&n| n <= isize::MAX as usize)
            .ok_or_else(|| out_of_memory(u64::MAX))?;
        if n_bytes as u64 > machine_bytes() {
            return Err(out_of_memory(n_bytes as u64));
        }
        let huge = n_bytes >= HUGE_PAGES_FROM;
        let whole = if huge { whole } else { 1 };
        let map = MmapMut::map_anon(n_bytes.max(1).next_multiple_of(whole))
            .map_err(|_| out_of_memory(n_bytes as u64))?;
        #[cfg(target_os = "linux")]
        if huge {
            // Fewer address misses; a system that does not know the advice does without.
            let _ = map.advise(memmap2::Advice::HugePage);
            super::numa::interleave(&map);
        }
        Ok(Self {
            map,
            len,
            _values: PhantomData,
        })
    }

    /// Bytes held, as planned: the mapping's rounding to pages is not counted.
    pub fn n_bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }

    /// Fills the buffer with NaN (see [`Plain::POISON`]).
    pub fn poison(&mut self) {
        self.fill(T::POISON);
    }
}

/// The machine's memory. A system that overcommits would grant a mapping larger than it, and kill
/// the process when it is touched.
fn machine_bytes() -> u64 {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: `sysconf` only reads a number.
        #[allow(unsafe_code, reason = "see above")]
        let (n_pages, page) = unsafe {
            (
                libc::sysconf(libc::_SC_PHYS_PAGES),
                libc::sysconf(libc::_SC_PAGESIZE),
            )
        };
        if n_pages > 0 && page > 0 {
            return n_pages as u64 * page as u64;
        }
    }
    u64::MAX
}

/// Less has few huge pages, or none.
const HUGE_PAGES_FROM: usize = 4 << 20;

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    #[allow(unsafe_code, reason = "a mapping seen as numbers")]
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping is page aligned, holds at least `len` values, is initialized, and
        // any bit pattern is a value of a `Plain` type.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    #[allow(unsafe_code, reason = "a mapping seen as numbers")]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the mapping is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}

/// The bits of values.
pub fn bits_of(values: &[f32]) -> &[u32] {
    // SAFETY: both types have the same size and alignment, and any bits are a number.
    #[allow(unsafe_code, reason = "see above")]
    unsafe {
        std::slice::from_raw_parts(values.as_ptr().cast(), values.len())
    }
}

/// The same, to be written.
pub fn bits_of_mut(values: &mut [f32]) -> &mut [u32] {
    // SAFETY: as above.
    #[allow(unsafe_code, reason = "see above")]
    unsafe {
        std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len())
    }
}

/// Asks for a line of the cache, to be written: a hint. The library's own would ask for it to be read, since its
/// compiler is not told that there is another instruction; a CPU without that one passes over it.
#[inline(always)]
fn prefetch_to_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it touches no memory and faults at no address.
    #[allow(unsafe_code, reason = "see above")]
    unsafe {
        std::arch::asm!(
            "prefetchw [{}]",
            in(reg) at,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// A mutable slice that tasks of one parallel operation share, each writing parts of its own.
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out slices only through an unsafe method whose caller promises that they do
// not overlap; `T` itself may be used from any thread.
#[allow(unsafe_code, reason = "see above")]
unsafe impl<T: Send + Sync> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "see above")]
unsafe impl<T: Send + Sync> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            _slice: PhantomData,
        }
    }

    /// Has the lines of the cache that `n` values from `start` on lie in brought, to be written: a hint.
    /// Stores wait for their lines one after the other; what is asked for comes at once.
    #[inline(always)]
    pub fn prefetch(&self, start: usize, n: usize) {
        const LINE: usize = 64;
        let at = self.start.wrapping_add(start).cast::<u8>();
        for line in (0..n * size_of::<T>()).step_by(LINE) {
            prefetch_to_write(at.wrapping_add(line));
        }
    }

    /// `n` values from `start` on.
    ///
    /// # Safety
    /// While the slice lives, no other slice from this value overlaps it.
    ///
    /// # Panics
    /// When the range does not lie inside.
    #[allow(
        unsafe_code,
        reason = "the one place where tasks get their part of a buffer"
    )]
    #[allow(clippy::mut_from_ref, reason = "the caller promises disjoint parts")]
    #[inline(always)]
    pub unsafe fn slice_mut(&self, start: usize, n: usize) -> &mut [T] {
        assert!(
            start <= self.len && n <= self.len - start,
            "part {start}+{n} of {}",
            self.len
        );
        // SAFETY: inside the slice by the check above, not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), n) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_size_is_an_error() {
        for len in [usize::MAX / 2, 1 << 60, 1 << 46] {
            let refused = Buffer::<f32>::zeroed("arena", len);
            assert!(matches!(refused, Err(EngineError::OutOfMemory { .. })));
        }
    }

    #[test]
    fn an_empty_buffer_is_no_special_case() {
        let buffer = Buffer::<f32>::zeroed("nothing", 0).expect("nothing is granted");
        assert_eq!((buffer.len(), buffer.n_bytes()), (0, 0));
    }
}
