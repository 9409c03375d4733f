//! What LibTorch's C interface does not tell of a GPU: its model and its memory, asked of NVIDIA's driver.
//!
//! The driver's library is opened at run time: it is there wherever CUDA works, and nowhere else. Its numbering is LibTorch's (both
//! follow `CUDA_VISIBLE_DEVICES`).

use std::ffi::{CStr, c_char, c_int, c_void};

const LIBRARY: &CStr = c"libcuda.so.1";
/// `CUDA_SUCCESS`.
const SUCCESS: c_int = 0;
const NAME_BYTES: usize = 256;

type Init = unsafe extern "C" fn(u32) -> c_int;
type Get = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
type GetName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
type TotalMemory = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
type Context = *mut c_void;
type Retain = unsafe extern "C" fn(*mut Context, c_int) -> c_int;
type Release = unsafe extern "C" fn(c_int) -> c_int;
type Push = unsafe extern "C" fn(Context) -> c_int;
type Pop = unsafe extern "C" fn(*mut Context) -> c_int;
type Memory = unsafe extern "C" fn(*mut usize, *mut usize) -> c_int;

/// Such as `NVIDIA H100 80GB HBM3`; `None` if the driver does not say.
#[must_use]
pub fn name(index: usize) -> Option<String> {
    let (driver, device) = device(index)?;
    let mut text: [c_char; NAME_BYTES] = [0; NAME_BYTES];
    // SAFETY: the symbol has this type in every driver; the buffer is as long as stated.
    let status = unsafe {
        let get_name: GetName = std::mem::transmute(symbol(driver, c"cuDeviceGetName")?);
        get_name(text.as_mut_ptr(), NAME_BYTES as c_int, device)
    };
    // SAFETY: on success the driver has written a text that ends within the buffer.
    (status == SUCCESS).then(|| {
        unsafe { CStr::from_ptr(text.as_ptr()) }
            .to_string_lossy()
            .into_owned()
    })
}

/// Bytes of its memory, used or not; `None` if the driver does not say.
#[must_use]
pub fn memory_bytes(index: usize) -> Option<u64> {
    let (driver, device) = device(index)?;
    let mut bytes = 0;
    // SAFETY: the symbol has this type in every driver since CUDA 3.2.
    let status = unsafe {
        let total: TotalMemory = std::mem::transmute(symbol(driver, c"cuDeviceTotalMem_v2")?);
        total(&raw mut bytes, device)
    };
    (status == SUCCESS).then_some(bytes as u64)
}

/// Bytes of its memory that nobody has; `None` if the driver does not say.
///
/// Asked in the context that LibTorch computes in (a device's primary one), which is made if there is none yet.
#[must_use]
pub fn free_bytes(index: usize) -> Option<u64> {
    let (driver, device) = device(index)?;
    let (mut context, mut popped) = (std::ptr::null_mut(), std::ptr::null_mut());
    let (mut free, mut total) = (0, 0);
    // SAFETY: the symbols have these types in every driver since CUDA 7; what is retained is released, what is pushed is popped.
    let status = unsafe {
        let retain: Retain = std::mem::transmute(symbol(driver, c"cuDevicePrimaryCtxRetain")?);
        let release: Release =
            std::mem::transmute(symbol(driver, c"cuDevicePrimaryCtxRelease_v2")?);
        let push: Push = std::mem::transmute(symbol(driver, c"cuCtxPushCurrent_v2")?);
        let pop: Pop = std::mem::transmute(symbol(driver, c"cuCtxPopCurrent_v2")?);
        let memory: Memory = std::mem::transmute(symbol(driver, c"cuMemGetInfo_v2")?);
        if retain(&raw mut context, device) != SUCCESS {
            return None;
        }
        let mut status = push(context);
        if status == SUCCESS {
            status = memory(&raw mut free, &raw mut total);
            pop(&raw mut popped);
        }
        release(device);
        status
    };
    (status == SUCCESS).then_some(free as u64)
}

/// The driver's library and its handle of a device.
fn device(index: usize) -> Option<(*mut c_void, c_int)> {
    // SAFETY: NVIDIA's driver library is made to be opened; it stays open for the life of the process.
    let driver = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW) };
    if driver.is_null() {
        return None;
    }
    let mut device = 0;
    // SAFETY: the symbols have these types in every driver; initialising again is allowed.
    let found = unsafe {
        let init: Init = std::mem::transmute(symbol(driver, c"cuInit")?);
        let get: Get = std::mem::transmute(symbol(driver, c"cuDeviceGet")?);
        init(0) == SUCCESS && get(&raw mut device, index as c_int) == SUCCESS
    };
    found.then_some((driver, device))
}

/// # Safety
/// `library` must come from `dlopen`.
unsafe fn symbol(library: *mut c_void, name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the caller's promise.
    let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
    (!symbol.is_null()).then_some(symbol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_has_no_name() {
        assert_eq!(name(4096), None);
        assert_eq!(memory_bytes(4096), None);
        assert_eq!(free_bytes(4096), None);
    }
}
