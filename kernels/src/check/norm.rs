use super::{Bench, EPSILON, Random, Tolerance, narrow, widen};
use crate::{
    Buffer, Result, bf16,
    norm::{AddBias, Embed, RmsNorm},
    reference,
};

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    for (rows, width) in [(1, 8), (3, 128), (5, 1000), (2, 4096)] {
        rms_norm(bench, rows, width)?;
        embed(bench, rows, width)?;
        add_bias(bench, rows, width)?;
    }
    Ok(())
}

fn rms_norm(bench: &mut Bench, rows: usize, width: usize) -> Result<()> {
    let stream = bench.stream;
    let mut random = Random::new(3);
    let (x, weight) = (random.normals(rows * 2 * width, 3.0), random.normals(width, 1.0));
    let pick: Vec<u32> = (0..rows as u32).map(|row| 2 * row + 1).collect();
    let picked: Vec<f32> = x.chunks_exact(width).skip(1).step_by(2).flatten().copied().collect();
    let device =
        (Buffer::from_slice(stream, &x, "x")?, Buffer::from_slice(stream, &weight, "weight")?, Buffer::from_slice(stream, &pick, "pick")?);
    let (out, out_f32) = (Buffer::<bf16>::new(stream, rows * width, "out")?, Buffer::new(stream, rows * width, "out")?);
    let all = RmsNorm {
        x: device.0.view(),
        pick: None,
        weight: device.1.view(),
        out: out.view(),
        out_f32: Some(out_f32.view()),
        epsilon: EPSILON,
        rows,
        width,
    };
    let shape = format!("[{rows}, {width}]");
    for (pick, x) in [(None, &x[..rows * width]), (Some(device.2.view()), &picked)] {
        RmsNorm { pick, ..all }.launch(stream)?;
        let found = widen(&out.to_vec()?);
        bench.compare("rms_norm", &shape, &found, &reference::rms_norm(x, &weight, EPSILON), Tolerance::BF16);
        bench.same("rms_norm: widened", &shape, &out_f32.to_vec()?, &found);
    }
    Ok(())
}

fn embed(bench: &mut Bench, rows: usize, width: usize) -> Result<()> {
    let (stream, vocabulary) = (bench.stream, 11);
    let table = Random::new(5).bf16s(vocabulary * width, 1.0);
    let tokens: Vec<u32> = (0..rows as u32).map(|row| row * 7 % 12).collect();
    let of = |&token: &u32| table.get(token as usize * width..(token as usize + 1) * width).map_or(vec![f32::NAN; width], <[f32]>::to_vec);
    let expected: Vec<f32> = tokens.iter().flat_map(of).collect();
    let (table, tokens) = (Buffer::from_slice(stream, &narrow(&table), "table")?, Buffer::from_slice(stream, &tokens, "tokens")?);
    let x = Buffer::new(stream, rows * width, "x")?;
    Embed { table: table.view(), tokens: tokens.view(), x: x.view(), rows, width, vocabulary }.launch(stream)?;
    bench.compare("embed", format!("[{rows}, {width}]"), &x.to_vec()?, &expected, Tolerance { absolute: 0.0, relative: 0.0 });
    Ok(())
}

fn add_bias(bench: &mut Bench, rows: usize, width: usize) -> Result<()> {
    let (stream, mut random) = (bench.stream, Random::new(9));
    let (x, bias) = (random.normals(rows * width, 1.0), random.normals(width, 1.0));
    let expected: Vec<f32> = x.chunks_exact(width).flat_map(|row| row.iter().zip(&bias).map(|(x, bias)| x + bias)).collect();
    let (x, bias) = (Buffer::from_slice(stream, &x, "x")?, Buffer::from_slice(stream, &bias, "bias")?);
    AddBias { x: x.view(), bias: bias.view(), rows, width }.launch(stream)?;
    bench.same("add_bias", format!("[{rows}, {width}]"), &x.to_vec()?, &expected);
    Ok(())
}
