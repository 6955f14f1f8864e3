//! What the tensor copies of sm_90 are told of a matrix in memory.

#![allow(unsafe_code, reason = "asks the driver")]

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use super::device::check;
use super::error::CudaError;
use super::pack;

/// The driver's `CUtensorMap`, as kernels take it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Default)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// Of bf16 rows `x` [`n_rows`, `n_k`], copied as tiles of `columns` rows and 64 k, their
    /// 16-byte chunks swizzled; what is behind the last row or k becomes zeros.
    ///
    /// # Errors
    /// The driver refuses: `x` and a row's bytes must be multiples of 16.
    pub fn of_rows(x: u64, n_rows: usize, n_k: usize, columns: usize) -> Result<Self, CudaError> {
        let mut map = Self::default();
        let dims = [n_k as u64, n_rows as u64];
        let row_bytes = [2 * n_k as u64];
        let tile = [pack::GROUP_K as u32, columns as u32];
        // SAFETY: the map has the size and alignment of the driver's, arrays are as long as the
        // rank says; the driver writes the map and reads no device memory.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                x as *mut c_void,
                dims.as_ptr(),
                row_bytes.as_ptr(),
                tile.as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(result, "describing a matrix to the tensor copies")?;
        Ok(map)
    }
}
