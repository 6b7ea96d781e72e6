//! Weights of the host forward: tensors as they were loaded, or 8-bit blocks made of them.

use std::{ops::Deref, sync::Arc};

use candle_core::{DType, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::{
    error::{Error, Result},
    ops::{
        cpu::{Data, Matrix, Q8_BLOCK, quantize_q8},
        cpu_slice,
    },
};

/// `[rows, k]`; leading dimensions of a tensor are rows. Clones share the memory.
#[derive(Clone, Debug)]
pub(super) struct HostMatrix {
    data: HostData,
    rows: usize,
    k: usize,
}

#[derive(Clone, Debug)]
enum HostData {
    /// f32 or bf16, contiguous, on the CPU.
    Float(Tensor),
    Q8(Arc<Blocks>),
}

#[derive(Debug)]
struct Blocks {
    values: Vec<i8>,
    scales: Vec<bf16>,
}

/// Holds a [`HostMatrix`] for reading.
pub(super) struct Lent<'a, G> {
    source: Source<'a, G>,
    rows: usize,
    k: usize,
}

enum Source<'a, G> {
    Float { storage: G, start: usize },
    Q8(&'a Blocks),
}

impl HostMatrix {
    /// The tensor as it is, or quantised.
    pub(super) fn new(tensor: &Tensor, quantize: bool) -> Result<Self> {
        let Some(&k) = tensor.dims().last() else { return Err(Error::Internal("a matrix without dimensions".into())) };
        let rows = tensor.elem_count() / k.max(1);
        let tensor = tensor.detach().contiguous()?;
        if !tensor.device().is_cpu() || !matches!(tensor.dtype(), DType::F32 | DType::BF16) {
            return Err(Error::Internal(format!(
                "the host forward has no {:?} weights on {:?}",
                tensor.dtype(),
                tensor.device().location()
            )));
        }
        let data = if quantize { HostData::Q8(Arc::new(Blocks::new(&tensor, k)?)) } else { HostData::Float(tensor) };
        Ok(Self { data, rows, k })
    }

    /// Whether its elements are narrower than f32, so that what they multiply is rounded too.
    pub(super) fn is_narrow(&self) -> bool {
        match &self.data {
            HostData::Float(tensor) => tensor.dtype() != DType::F32,
            HostData::Q8(_) => true,
        }
    }

    pub(super) fn lend(&self) -> Lent<'_, impl Deref<Target = Storage>> {
        let source = match &self.data {
            HostData::Q8(blocks) => Source::Q8(blocks),
            HostData::Float(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                Source::Float { storage, start: layout.start_offset() }
            }
        };
        Lent { source, rows: self.rows, k: self.k }
    }
}

impl<G: Deref<Target = Storage>> Lent<'_, G> {
    pub(super) fn matrix(&self) -> Result<Matrix<'_>> {
        let (rows, k) = (self.rows, self.k);
        let data = match &self.source {
            Source::Q8(blocks) => Data::Q8 { values: &blocks.values, scales: &blocks.scales },
            Source::Float { storage, start } => {
                let Storage::Cpu(storage) = &**storage else {
                    return Err(Error::Internal("host weights left the host".into()));
                };
                match storage {
                    candle_core::CpuStorage::F32(values) => Data::F32(&values[*start..start + rows * k]),
                    candle_core::CpuStorage::BF16(values) => Data::Bf16(&values[*start..start + rows * k]),
                    _ => return Err(Error::Internal("host weights of another type".into())),
                }
            }
        };
        Ok(Matrix::new(data, rows, k))
    }
}

impl Blocks {
    fn new(tensor: &Tensor, k: usize) -> Result<Self> {
        let rows = tensor.elem_count() / k.max(1);
        let blocks = k.div_ceil(Q8_BLOCK);
        let (mut values, mut scales) = (vec![0; rows * k], vec![bf16::ZERO; rows * blocks]);
        let chunks = values.par_chunks_mut(k.max(1)).zip(scales.par_chunks_mut(blocks.max(1)));
        match tensor.dtype() {
            DType::F32 => cpu_slice::<f32, _>(tensor, |weights| {
                chunks.zip(weights.par_chunks(k)).for_each(|((values, scales), row)| quantize_q8(row, k, values, scales));
                Ok(())
            })?,
            _ => cpu_slice::<bf16, _>(tensor, |weights| {
                chunks.zip(weights.par_chunks(k)).for_each_init(Vec::new, |wide, ((values, scales), row)| {
                    wide.clear();
                    wide.extend(row.iter().map(|w| w.to_f32()));
                    quantize_q8(wide, k, values, scales);
                });
                Ok(())
            })?,
        }
        Ok(Self { values, scales })
    }
}

/// A small f32 vector: norms and biases.
pub(super) fn vector(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
