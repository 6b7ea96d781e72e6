//! The device, its stream, graphs and events.

use std::{
    ffi::{CStr, c_char, c_void},
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
};

use crate::{Error, Result, error::check};

#[repr(C)]
struct RawProperties {
    name: [c_char; 256],
    major: i32,
    minor: i32,
    multiprocessors: i32,
    l2_bytes: i32,
    driver: i32,
    runtime: i32,
    built_for: i32,
    reserved: i32,
    total_bytes: i64,
}

unsafe extern "C" {
    fn hm_versions(driver: *mut i32, runtime: *mut i32) -> i32;
    fn hm_device_open(ordinal: i32, out: *mut RawProperties) -> i32;
    fn hm_keep_freed_memory(ordinal: i32) -> i32;
    fn hm_release_freed_memory(ordinal: i32) -> i32;
    fn hm_memory(free: *mut i64, total: *mut i64) -> i32;
    fn hm_synchronize(stream: *mut c_void) -> i32;
    fn hm_stream_create(stream: *mut *mut c_void) -> i32;
    fn hm_stream_destroy(stream: *mut c_void) -> i32;
    fn hm_capture_begin(stream: *mut c_void) -> i32;
    fn hm_capture_end(stream: *mut c_void, graph: *mut *mut c_void) -> i32;
    fn hm_graph_launch(graph: *mut c_void, stream: *mut c_void) -> i32;
    fn hm_graph_free(graph: *mut c_void) -> i32;
    fn hm_event_create(event: *mut *mut c_void) -> i32;
    fn hm_event_free(event: *mut c_void) -> i32;
    fn hm_event_record(event: *mut c_void, stream: *mut c_void) -> i32;
    fn hm_event_milliseconds(out: *mut f32, from: *mut c_void, to: *mut c_void) -> i32;
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// As NVIDIA calls it.
    pub name: String,
    /// Compute capability: (9, 0) is Hopper.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    /// Newest CUDA that the driver can run: 13000 is 13.0.
    pub driver: u32,
    /// CUDA that the program was built with.
    pub runtime: u32,
    /// Bytes of memory.
    pub total_bytes: u64,
}

/// A device that these kernels run on.
#[derive(Clone, Debug)]
pub struct Device {
    ordinal: usize,
    properties: Properties,
}

impl Device {
    /// Opens the device `ordinal` for the calling thread.
    ///
    /// # Errors
    /// `Device` where there is none, where its driver is older than the CUDA of this program, or where the kernels were compiled for another compute
    /// capability; with the numbers, and what to do.
    pub fn open(ordinal: usize) -> Result<Self> {
        let (mut driver, mut runtime) = (0, 0);
        // SAFETY: both are written, and that is all.
        let status = unsafe { hm_versions(&mut driver, &mut runtime) };
        if status != 0 || driver == 0 {
            return Err(Error::Device("no NVIDIA driver was found: use --device cpu, or run where nvidia-smi shows a GPU".into()));
        }
        if driver / 1000 < runtime / 1000 {
            return Err(Error::Device(format!(
                "the NVIDIA driver runs programs up to CUDA {}, this one was built with CUDA {}: update the driver (580 or newer for CUDA 13)",
                Version(driver),
                Version(runtime)
            )));
        }
        // SAFETY: a struct of numbers and bytes may be zero.
        let mut raw: RawProperties = unsafe { std::mem::zeroed() };
        let ordinal_i32 = i32::try_from(ordinal).map_err(|_| Error::Device(format!("there is no GPU {ordinal}")))?;
        // SAFETY: `raw` is written, and that is all.
        let opened = check("opening the device", unsafe { hm_device_open(ordinal_i32, &mut raw) });
        opened.map_err(|error| Error::Device(format!("GPU {ordinal} cannot be used: {error}")))?;
        let properties = Properties::of(&raw);
        let (major, minor) = properties.capability;
        let built_for = raw.built_for as u32;
        if !runs_on(built_for, major * 10 + minor) {
            return Err(Error::Device(format!(
                "GPU {ordinal} ({}) has compute capability {major}.{minor}, the kernels were compiled for {}.{}: build with CUDA_COMPUTE_CAP={major}{minor}",
                properties.name,
                built_for / 10,
                built_for % 10
            )));
        }
        // SAFETY: a call without pointers.
        check("the memory pool", unsafe { hm_keep_freed_memory(ordinal_i32) })?;
        Ok(Self { ordinal, properties })
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Gives freed memory back, so that [`Device::memory`] counts it as free. Waits for the device.
    pub fn release_freed_memory(&self) -> Result<()> {
        let ordinal = i32::try_from(self.ordinal).unwrap_or_default();
        // SAFETY: a call without pointers.
        check("giving memory back", unsafe { hm_release_freed_memory(ordinal) })
    }

    /// (free, all) bytes of its memory.
    pub fn memory(&self) -> Result<(u64, u64)> {
        memory()
    }
}

/// (free, all) bytes of the memory of the current device.
pub(crate) fn memory() -> Result<(u64, u64)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are written, and that is all.
    check("asking for the memory", unsafe { hm_memory(&mut free, &mut total) })?;
    Ok((free as u64, total as u64))
}

/// Code for 9.0 is for that alone (it has instructions of Hopper); other code runs on later minors of its major.
fn runs_on(built_for: u32, found: u32) -> bool {
    if built_for == 90 { found == 90 } else { found / 10 == built_for / 10 && found >= built_for }
}

impl Properties {
    fn of(raw: &RawProperties) -> Self {
        // SAFETY: the name ends with 0: its last byte is never written.
        let name = unsafe { CStr::from_ptr(raw.name.as_ptr()) };
        Self {
            name: name.to_string_lossy().into_owned(),
            capability: (raw.major as u32, raw.minor as u32),
            multiprocessors: raw.multiprocessors as usize,
            l2_bytes: raw.l2_bytes as usize,
            driver: raw.driver as u32,
            runtime: raw.runtime as u32,
            total_bytes: raw.total_bytes as u64,
        }
    }
}

/// 13010 as 13.1.
struct Version(i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Work on a device, in order. A handle: it does not own the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    raw: *mut c_void,
}

// SAFETY: CUDA's calls may come from any thread; that only one thread launches at a time is what `Buffer` and its users see to.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A `cudaStream_t` (which a `CUstream` is).
    ///
    /// # Safety
    /// It is a stream of the current device and lives as long as this handle and all buffers that are made on it.
    pub unsafe fn from_raw(raw: *mut c_void) -> Self {
        Self { raw }
    }

    /// A new stream, which is never destroyed: there is one for each model.
    pub fn create() -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is written, and that is all.
        check("making a stream", unsafe { hm_stream_create(&mut raw) })?;
        Ok(Self { raw })
    }

    /// Destroys it.
    ///
    /// # Safety
    /// Nobody uses it, or a buffer that was made on it, afterwards.
    pub unsafe fn destroy(self) {
        // SAFETY: as the caller says. An error would have nobody to be told to.
        unsafe { hm_stream_destroy(self.raw) };
    }

    /// For calls of CUDA.
    pub fn raw(self) -> *mut c_void {
        self.raw
    }

    /// Waits until everything launched so far has run; its errors come up here.
    pub fn synchronize(self) -> Result<()> {
        // SAFETY: the stream lives.
        check("waiting for the device", unsafe { hm_synchronize(self.raw) })
    }

    /// Records what `launch` launches on this stream, without running it.
    ///
    /// In it nothing may wait, allocate or free. Views of the recorded launches have to live as long as the graph.
    pub fn capture(self, launch: impl FnOnce() -> Result<()>) -> Result<Graph> {
        // SAFETY: the stream lives.
        check("beginning a graph", unsafe { hm_capture_begin(self.raw) })?;
        let launched = catch_unwind(AssertUnwindSafe(launch));
        let mut raw = ptr::null_mut();
        // SAFETY: the stream lives and captures; `raw` is written.
        let ended = check("ending a graph", unsafe { hm_capture_end(self.raw, &mut raw) });
        let graph = (!raw.is_null()).then_some(Graph { raw, not_sync: PhantomData });
        launched.unwrap_or_else(|panic| resume_unwind(panic))?;
        ended?;
        graph.ok_or_else(|| Error::Device("CUDA made no graph of what was captured".into()))
    }
}

/// Launches that were recorded, to be repeated at the price of one.
#[derive(Debug)]
pub struct Graph {
    raw: *mut c_void,
    not_sync: PhantomData<*mut c_void>,
}

// SAFETY: a graph has no tie to a thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Launches everything once more, with what the recorded memory holds then.
    pub fn launch(&self, stream: Stream) -> Result<()> {
        // SAFETY: both live.
        check("launching a graph", unsafe { hm_graph_launch(self.raw, stream.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it is dropped once.
        unsafe { hm_graph_free(self.raw) };
    }
}

/// A moment on a stream.
#[derive(Debug)]
pub struct Event {
    raw: *mut c_void,
    not_sync: PhantomData<*mut c_void>,
}

// SAFETY: an event has no tie to a thread.
unsafe impl Send for Event {}

impl Event {
    /// Of no moment yet.
    pub fn new() -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is written, and that is all.
        check("making an event", unsafe { hm_event_create(&mut raw) })?;
        Ok(Self { raw, not_sync: PhantomData })
    }

    /// Happens when everything launched so far has run.
    pub fn record(&self, stream: Stream) -> Result<()> {
        // SAFETY: both live.
        check("recording an event", unsafe { hm_event_record(self.raw, stream.raw) })
    }

    /// Milliseconds from this event to a later one. Both have happened: the stream was waited for.
    pub fn milliseconds_to(&self, later: &Self) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: both live; the number is written.
        check("reading events", unsafe { hm_event_milliseconds(&mut milliseconds, self.raw, later.raw) })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: it is dropped once.
        unsafe { hm_event_free(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities() {
        assert!(runs_on(90, 90) && runs_on(80, 80) && runs_on(80, 86) && runs_on(80, 89) && runs_on(89, 89));
        assert!(!runs_on(90, 100) && !runs_on(90, 80) && !runs_on(89, 86) && !runs_on(80, 90));
        assert_eq!((Version(13000).to_string(), Version(12080).to_string()), ("13.0".into(), "12.8".into()));
    }
}
