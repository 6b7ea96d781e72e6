//! Distillation of next-token distributions as one operation: on the CPU f64 inside, row by row, and no copy of the logits in f64.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::{
    error,
    moe::loss::distill_kl,
    ops::{OnHost, cpu_slice, device, runs_here},
};

/// `weight · KL(teacher ‖ student)`, mean over the rows of the student's logits `[S · T, V]`, of which every T belong to the
/// rows of the teacher's `[T, V]`. Both are f32 and in one place.
pub(super) fn distilled(student: &Tensor, teacher: &Tensor, weight: f64) -> error::Result<Tensor> {
    if !runs_here(student.device()) {
        return Ok(device::divergence(student, teacher, weight)?);
    }
    let teacher = OnHost::here(&teacher.detach())?.tensor().clone();
    OnHost::here(student)?.apply(Distill { teacher, weight })
}

/// `weight · KL(teacher ‖ student)`, mean over the rows of the student's logits `[S · T, V]`, of which every T belong to the
/// rows of the teacher's `[T, V]`. Both are f32 on the CPU.
struct Distill {
    teacher: Tensor,
    weight: f64,
}

impl Distill {
    /// `of_row(student, teacher)` of every row of the student, in order.
    fn rows<R: Send>(&self, student: &[f32], shape: &Shape, of_row: impl Fn(&[f64], &[f64]) -> R + Sync) -> Result<Vec<R>> {
        let ((rows, v), (t, teacher_v)) = (shape.dims2()?, self.teacher.dims2()?);
        if v != teacher_v || t == 0 || !rows.is_multiple_of(t) {
            bail!("distillation: logits {:?} of the teacher for {shape:?} of the student", self.teacher.shape());
        }
        let wide = |row: &[f32]| row.iter().map(|&z| f64::from(z)).collect::<Vec<_>>();
        let all = cpu_slice::<f32, _>(&self.teacher, |teacher| {
            let row = |(index, row): (usize, &[f32])| of_row(&wide(row), &wide(&teacher[index % t * v..][..v]));
            Ok(student.par_chunks(v.max(1)).enumerate().map(row).collect())
        });
        all.map_err(candle_core::Error::msg)
    }
}

impl CustomOp1 for Distill {
    fn name(&self) -> &'static str {
        "distill"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("distillation needs contiguous logits") };
        let v = layout.shape().dims2()?.1;
        let divergence = |student: &[f64], teacher: &[f64]| distill_kl(teacher, student, v, 1.0, &mut vec![0.0; v]);
        let of_rows = self.rows(&storage.as_slice::<f32>()?[start..end], layout.shape(), divergence)?;
        let mean = of_rows.iter().sum::<f64>() / of_rows.len().max(1) as f64;
        Ok((CpuStorage::F32(vec![(self.weight * mean) as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (scale, (rows, v)) = (f64::from(grad.to_scalar::<f32>()?), logits.dims2()?);
        let gradient = |student: &[f64], teacher: &[f64]| {
            let mut d = vec![0.0; v];
            distill_kl(teacher, student, v, 1.0, &mut d);
            d.into_iter().map(|d| (d / rows as f64 * self.weight * scale) as f32).collect::<Vec<_>>()
        };
        let student = logits.detach().contiguous()?;
        let of_rows =
            cpu_slice::<f32, _>(&student, |student| Ok(self.rows(student, logits.shape(), gradient))).map_err(candle_core::Error::msg)?;
        Ok(Some(Tensor::from_vec(of_rows?.concat(), logits.shape(), logits.device())?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::as_on_a_device;

    #[test]
    fn it_is_the_divergence_of_all_rows_at_once() {
        let number = |i: usize| ((i * 37 % 19) as f32 - 9.0) / 4.0;
        let (t, v) = (3, 5);
        let student: Vec<f32> = (0..2 * t * v).map(number).collect();
        let teacher: Vec<f32> = (0..t * v).map(|i| number(i + 7)).collect();
        let wide = |values: &[f32]| values.iter().map(|&z| f64::from(z)).collect::<Vec<_>>();
        let mut wanted = vec![0.0; student.len()];
        let value = 0.7 * distill_kl(&wide(&teacher).repeat(2), &wide(&student), v, 1.0, &mut wanted);

        let var = Var::from_tensor(&Tensor::from_vec(student, (2 * t, v), &Device::Cpu).unwrap()).unwrap();
        let teacher = Tensor::from_vec(teacher, (t, v), &Device::Cpu).unwrap();
        let found = distilled(&var, &teacher, 0.7).unwrap();
        assert_eq!(found.to_scalar::<f32>().unwrap(), value as f32);
        let grads = found.backward().unwrap();
        let gradient = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(gradient.iter().zip(&wanted).all(|(found, wanted)| (f64::from(*found) - 0.7 * wanted).abs() < 1e-7));
        assert!(gradient.iter().any(|d| d.abs() > 1e-3));
        let elsewhere = as_on_a_device(|| distilled(&var, &teacher, 0.7)).unwrap();
        assert!((f64::from(elsewhere.to_scalar::<f32>().unwrap()) - value).abs() < 1e-6);
        let of_device = elsewhere.backward().unwrap().get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(of_device.iter().zip(&gradient).all(|(a, b)| (a - b).abs() < 1e-6), "{of_device:?} {gradient:?}");
        let short = teacher.narrow(1, 0, 4).unwrap().contiguous().unwrap();
        assert!(distilled(&var, &short, 1.0).is_err() && as_on_a_device(|| distilled(&var, &short, 1.0)).is_err(), "another vocabulary");
    }
}
