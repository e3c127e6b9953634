//! ONNX Runtime's C functions for runs over memory that is bound beforehand.
//!
//! ort's `IoBinding` binds a tensor to both sides of a graph only where it is a whole allocation of ONNX Runtime's own, and
//! runs here are over parts of one.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use anyhow::Context;
use ort::AsPointer;
use ort::sys;

use super::session::OrtSession;
use crate::Result;

/// What a session reads and writes in a run.
pub(super) struct Binding(NonNull<sys::OrtIoBinding>);

// SAFETY: ONNX Runtime ties a binding to no thread, and one at a time uses it.
unsafe impl Send for Binding {}

impl Binding {
    pub fn new(session: &OrtSession) -> Result<Self> {
        let mut binding = std::ptr::null_mut();
        // SAFETY: the session is alive; a status is looked at before the result.
        let status = unsafe { (ort::api().CreateIoBinding)(session.session.ptr().cast_mut(), &mut binding) };
        check(status)?;
        Ok(Self(NonNull::new(binding).context("ONNX Runtime gave no binding")?))
    }

    pub fn input(&mut self, name: &CStr, value: &Tensor) -> Result<()> {
        // SAFETY: all three are alive; the name is copied, and the binding takes a share of the value.
        check(unsafe { (ort::api().BindInput)(self.0.as_ptr(), name.as_ptr(), value.0.as_ptr()) })
    }

    pub fn output(&mut self, name: &CStr, value: &Tensor) -> Result<()> {
        // SAFETY: as above
        check(unsafe { (ort::api().BindOutput)(self.0.as_ptr(), name.as_ptr(), value.0.as_ptr()) })
    }

    /// # Safety
    /// What the bound values point at is alive, and nobody else uses it meanwhile.
    pub unsafe fn run(&mut self, session: &mut OrtSession) -> Result<()> {
        let session = session.session.ptr().cast_mut();
        // SAFETY: both are alive; the rest is promised by the caller
        check(unsafe { (ort::api().RunWithBinding)(session, std::ptr::null(), self.0.as_ptr()) })
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // SAFETY: made by CreateIoBinding, and released once
        unsafe { (ort::api().ReleaseIoBinding)(self.0.as_ptr()) }
    }
}

/// A kind of memory, as ONNX Runtime names it.
pub(super) struct Place(NonNull<sys::OrtMemoryInfo>);

// SAFETY: nothing but a name and numbers, which nobody changes.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    /// The processor's.
    pub const CPU: &CStr = c"Cpu";
    /// A GPU's of NVIDIA.
    pub const CUDA: &CStr = c"Cuda";

    /// The memory of this name, of one of several devices.
    ///
    /// # Errors
    /// ONNX Runtime knows none of this name.
    pub fn of(name: &CStr, device: i32) -> Result<Self> {
        let (kind, memory) = (sys::OrtAllocatorType::OrtDeviceAllocator, sys::OrtMemType::OrtMemTypeDefault);
        let mut place = std::ptr::null_mut();
        // SAFETY: the name is copied; a status is looked at before the result
        check(unsafe { (ort::api().CreateMemoryInfo)(name.as_ptr(), kind, device, memory, &mut place) })?;
        Ok(Self(NonNull::new(place).context("ONNX Runtime gave no place")?))
    }

    pub(super) fn ptr(&self) -> *const sys::OrtMemoryInfo {
        self.0.as_ptr()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // SAFETY: made by CreateMemoryInfo, and released once; tensors have a copy
        unsafe { (ort::api().ReleaseMemoryInfo)(self.0.as_ptr()) }
    }
}

/// The types of numbers that tensors hold here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    I32,
    I64,
}

impl Kind {
    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    fn id(self) -> sys::ONNXTensorElementDataType {
        use sys::ONNXTensorElementDataType as Id;
        match self {
            Self::F32 => Id::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
            Self::F16 => Id::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
            Self::I32 => Id::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
            Self::I64 => Id::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
        }
    }
}

/// A tensor of ONNX Runtime's over memory of ours.
pub(super) struct Tensor(NonNull<sys::OrtValue>);

/// The types of numbers that tensors hold here, in Rust.
pub(super) trait Element {
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::F32;
}

impl Element for i32 {
    const KIND: Kind = Kind::I32;
}

impl Element for i64 {
    const KIND: Kind = Kind::I64;
}

impl Tensor {
    /// A tensor over the processor's memory, for an input that runs only read: no graph writes over what it is given,
    /// unless that is bound as an output, too.
    ///
    /// # Safety
    /// The values outlive every run that the tensor is bound to.
    pub unsafe fn of<T: Element>(place: &Place, values: &[T], shape: &[usize]) -> Result<Self> {
        let bytes = NonNull::from(values);
        let bytes = NonNull::slice_from_raw_parts(bytes.cast::<u8>(), size_of_val(values));
        // SAFETY: promised by the caller
        unsafe { Self::over(place, bytes, T::KIND, shape) }
    }

    /// # Safety
    /// The bytes lie in this place, and outlive every run that the tensor is bound to.
    pub unsafe fn over(place: &Place, bytes: NonNull<[u8]>, kind: Kind, shape: &[usize]) -> Result<Self> {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let mut value = std::ptr::null_mut();
        // SAFETY: a status is looked at before the result; the shape is copied, and the place too
        let made = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                place.ptr(),
                bytes.cast::<c_void>().as_ptr(),
                bytes.len(),
                shape.as_ptr(),
                shape.len(),
                kind.id(),
                &mut value,
            )
        };
        check(made)?;
        Ok(Self(NonNull::new(value).context("ONNX Runtime gave no tensor")?))
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: made by CreateTensorWithDataAsOrtValue, and released once; a binding has a share of its own
        unsafe { (ort::api().ReleaseValue)(self.0.as_ptr()) }
    }
}

pub(super) fn check(status: sys::OrtStatusPtr) -> Result<()> {
    // SAFETY: the status comes from ONNX Runtime and is handed on once
    Ok(unsafe { ort::Error::result_from_status(status) }?)
}
