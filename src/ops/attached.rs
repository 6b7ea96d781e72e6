//! Functions with a backward of their own, on any device: what their value is computed with stays out of the graph.
//!
//! candle's graph keeps every tensor between an input and the output, and takes the gradient of every factor, also of one that nobody
//! trains. Here value and backward are ordinary operations on detached tensors; the graph has one node, whose forward hands out the value.

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor,
    backend::{BackendDevice, BackendStorage},
    bail,
};

/// What the backward of a function is given, besides the gradient of its value.
pub(crate) struct Inputs<const N: usize> {
    /// Detached.
    pub(crate) values: [Tensor; N],
    /// Which of them want a gradient; the others would keep one that nobody reads.
    pub(crate) wanted: [bool; N],
}

/// `value` as a function of `inputs` with this `backward`, which returns the gradients that are wanted, each in the element type of its
/// input. Not tracked where no input is.
pub(crate) fn attach1<B>(x: &Tensor, value: Tensor, backward: B) -> Result<Tensor>
where
    B: Fn(&Inputs<1>, &Tensor) -> Result<[Option<Tensor>; 1]> + Send + Sync + 'static,
{
    if !x.track_op() {
        return Ok(value);
    }
    x.apply_op1(Attached::new(value, backward))
}

/// [`attach1`] of two inputs.
pub(crate) fn attach2<B>([x, y]: [&Tensor; 2], value: Tensor, backward: B) -> Result<Tensor>
where
    B: Fn(&Inputs<2>, &Tensor) -> Result<[Option<Tensor>; 2]> + Send + Sync + 'static,
{
    if !x.track_op() && !y.track_op() {
        return Ok(value);
    }
    x.apply_op2(y, Attached::new(value, backward))
}

/// [`attach1`] of three inputs.
pub(crate) fn attach3<B>([x, y, z]: [&Tensor; 3], value: Tensor, backward: B) -> Result<Tensor>
where
    B: Fn(&Inputs<3>, &Tensor) -> Result<[Option<Tensor>; 3]> + Send + Sync + 'static,
{
    if !x.track_op() && !y.track_op() && !z.track_op() {
        return Ok(value);
    }
    x.apply_op3(y, z, Attached::new(value, backward))
}

struct Attached<B> {
    /// Until the forward, which runs once, at once.
    value: Mutex<Option<Tensor>>,
    backward: B,
}

impl<B> Attached<B> {
    fn new(value: Tensor, backward: B) -> Self {
        Self { value: Mutex::new(Some(value.detach())), backward }
    }

    /// Takes the value, of which candle wants a storage that is nobody else's.
    fn value(&self) -> Result<Tensor> {
        match self.value.lock().map(|mut value| value.take()) {
            Ok(Some(value)) => Ok(value),
            _ => bail!("attached: a forward that ran twice"),
        }
    }

    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        let value = self.value()?;
        let (storage, layout) = value.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("attached: the value is not where the inputs are") };
        Ok((packed(storage, layout)?, layout.shape().clone()))
    }

    fn on_cuda(&self) -> Result<(CudaStorage, Shape)> {
        let value = self.value()?;
        let (storage, layout) = value.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("attached: the value is not where the inputs are") };
        Ok((packed(storage, layout)?, layout.shape().clone()))
    }
}

impl<B> Attached<B> {
    fn gradients<const N: usize>(&self, inputs: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]>
    where
        B: Fn(&Inputs<N>, &Tensor) -> Result<[Option<Tensor>; N]>,
    {
        let inputs = Inputs { values: inputs.map(Tensor::detach), wanted: inputs.map(Tensor::track_op) };
        (self.backward)(&inputs, &grad.detach())
    }
}

/// What `layout` shows of `storage`, in order and alone.
fn packed<S>(storage: &S, layout: &Layout) -> Result<S>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    // SAFETY: the copy writes all of it.
    let mut packed = unsafe { storage.device().alloc_uninit(layout.shape(), storage.dtype())? };
    storage.copy_strided_src(&mut packed, 0, layout)?;
    Ok(packed)
}

impl<B> CustomOp1 for Attached<B>
where
    B: Fn(&Inputs<1>, &Tensor) -> Result<[Option<Tensor>; 1]>,
{
    fn name(&self) -> &'static str {
        "attached"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [d_x] = self.gradients([x], grad)?;
        Ok(d_x)
    }
}

impl<B> CustomOp2 for Attached<B>
where
    B: Fn(&Inputs<2>, &Tensor) -> Result<[Option<Tensor>; 2]>,
{
    fn name(&self) -> &'static str {
        "attached"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [d_x, d_y] = self.gradients([x, y], grad)?;
        Ok((d_x, d_y))
    }
}

type Gradients3 = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl<B> CustomOp3 for Attached<B>
where
    B: Fn(&Inputs<3>, &Tensor) -> Result<[Option<Tensor>; 3]>,
{
    fn name(&self) -> &'static str {
        "attached"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, z: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Gradients3> {
        let [d_x, d_y, d_z] = self.gradients([x, y, z], grad)?;
        Ok((d_x, d_y, d_z))
    }
}
