use super::{Bench, Random, Tolerance, narrow, widen};
use crate::{
    Buffer, Device, Properties, Result, Stream, View, bf16,
    experts::scales_len,
    grouped::{DequantizeExperts, GatherRows, Gemm, Grouped, Path, SiluMul},
    reference::{self, e4m3},
};

/// In rows that no expert has, before and after.
const UNTOUCHED: f32 = -7.0;

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    let properties = Device::open(0)?.properties().clone();
    for case in cases(bench.quick) {
        gemm(bench, &properties, &case)?;
    }
    if properties.capability == (9, 0) {
        paths_agree(bench, &properties)?;
    }
    captured(bench, &properties)?;
    gather(bench)?;
    silu(bench)?;
    dequantize(bench)
}

/// Rows of each expert, and the weights' shape.
struct Case {
    rows: Vec<usize>,
    n: usize,
    k: usize,
    /// Rows that the host allows for and no expert has.
    spare: usize,
}

fn cases(quick: bool) -> Vec<Case> {
    let case = |rows: &[usize], n, k, spare| Case { rows: rows.to_vec(), n, k, spare };
    let every = |experts: usize, rows: fn(usize) -> usize, n, k| Case { rows: (0..experts).map(rows).collect(), n, k, spare: 3 };
    let mut cases = vec![
        case(&[1], 8, 8, 0),
        case(&[0, 0], 16, 16, 4),
        case(&[0, 3, 0, 5, 0], 24, 40, 2),
        case(&[0, 70, 0], 136, 72, 0),
        case(&[33, 1, 0, 32, 31], 128, 64, 9),
        case(&[129, 2, 127, 128], 144, 104, 1),
        case(&[12, 0, 7, 30, 1, 0, 3, 9], 256, 128, 2),
        case(&[5], 264, 328, 250),
        every(40, |expert| expert % 3, 32, 16),
        every(1024, |expert| usize::from(expert % 97 == 96), 8, 8),
    ];
    if !quick {
        cases.extend([
            case(&[300, 1, 0, 700, 257, 64], 1536, 2048, 30),
            every(128, |expert| expert * 7 % 11, 768, 512),
            case(&[2048], 512, 1024, 0),
        ]);
    }
    cases
}

impl Case {
    fn experts(&self) -> usize {
        self.rows.len()
    }

    fn offsets(&self) -> Vec<u32> {
        let sums = self.rows.iter().scan(0, |sum, &rows| {
            *sum += rows as u32;
            Some(*sum)
        });
        std::iter::once(0).chain(sums).collect()
    }

    fn max_rows(&self) -> usize {
        self.rows.iter().sum::<usize>() + self.spare
    }

    fn shape(&self) -> String {
        let Self { rows, n, k, .. } = self;
        let shown: Vec<String> = rows.iter().take(6).map(usize::to_string).collect();
        format!("{} experts with {}{} rows, [{n}, {k}]", rows.len(), shown.join(" "), if rows.len() > 6 { " .." } else { "" })
    }
}

/// A case's numbers, and the device's copies of them.
struct Operands {
    x: Vec<f32>,
    weight: Vec<f32>,
    device_x: Buffer<bf16>,
    device_weight: Buffer<bf16>,
    offsets: Buffer<u32>,
    y: Buffer<bf16>,
}

impl Operands {
    fn new(case: &Case, stream: Stream) -> Result<Self> {
        let mut random = Random::new(11);
        let x = random.bf16s(case.max_rows() * case.k, 1.0);
        let weight = random.bf16s(case.experts() * case.n * case.k, (case.k as f32).powf(-0.5));
        Ok(Self {
            device_x: Buffer::from_slice(stream, &narrow(&x), "x")?,
            device_weight: Buffer::from_slice(stream, &narrow(&weight), "weight")?,
            offsets: Buffer::from_slice(stream, &case.offsets(), "offsets")?,
            y: Buffer::from_slice(stream, &vec![bf16::from_f32(UNTOUCHED); case.max_rows() * case.n], "y")?,
            x,
            weight,
        })
    }

    fn grouped<'a>(&'a self, case: &Case, workspace: View<'a, u8>) -> Grouped<'a> {
        Grouped {
            x: self.device_x.view(),
            weight: self.device_weight.view(),
            y: self.y.view(),
            offsets: self.offsets.view(),
            workspace,
            experts: case.experts(),
            max_rows: case.max_rows(),
            n: case.n,
            k: case.k,
        }
    }

    fn expected(&self, case: &Case) -> Vec<f32> {
        let mut expected = reference::grouped(&self.x, &self.weight, &case.offsets(), case.n, case.k);
        expected.resize(case.max_rows() * case.n, UNTOUCHED);
        expected
    }
}

fn paths(properties: &Properties) -> Vec<Gemm> {
    let hopper = (properties.capability == (9, 0)).then_some(Path::Hopper);
    hopper.into_iter().chain([Path::Tiled]).map(|path| Gemm::with_path(path, properties)).collect()
}

fn name(path: Path) -> &'static str {
    match path {
        Path::Hopper => "grouped, Hopper",
        Path::Tiled => "grouped, tiled",
    }
}

fn gemm(bench: &mut Bench, properties: &Properties, case: &Case) -> Result<()> {
    let stream = bench.stream;
    let operands = Operands::new(case, stream)?;
    let expected = operands.expected(case);
    for gemm in paths(properties) {
        let workspace = Buffer::<u8>::new(stream, gemm.workspace_bytes(case.experts())?, "workspace")?;
        for &tile in gemm.tiles() {
            operands.y.view().write(&vec![bf16::from_f32(UNTOUCHED); case.max_rows() * case.n], stream)?;
            gemm.launch_with(tile, operands.grouped(case, workspace.view()), stream)?;
            let shape = format!("{}, tiles of {}", case.shape(), tile.rows());
            bench.compare(name(gemm.path()), shape, &widen(&operands.y.to_vec()?), &expected, Tolerance::BF16);
        }
    }
    Ok(())
}

/// At the size of a real prefill, where the definition takes too long, two implementations that share nothing.
fn paths_agree(bench: &mut Bench, properties: &Properties) -> Result<()> {
    if bench.quick {
        return Ok(());
    }
    let stream = bench.stream;
    let case = Case { rows: (0..16).map(|expert| 512 + 32 * expert - expert * expert).collect(), n: 2048, k: 2048, spare: 100 };
    let operands = Operands::new(&case, stream)?;
    let mut results = Vec::new();
    for gemm in paths(properties) {
        let workspace = Buffer::<u8>::new(stream, gemm.workspace_bytes(case.experts())?, "workspace")?;
        gemm.launch(operands.grouped(&case, workspace.view()), stream)?;
        results.push(widen(&operands.y.to_vec()?));
    }
    bench.compare("grouped, Hopper against tiled", case.shape(), &results[0], &results[1], Tolerance::BF16);
    Ok(())
}

/// A graph of it reads the offsets that there are when it is launched.
fn captured(bench: &mut Bench, properties: &Properties) -> Result<()> {
    let stream = bench.stream;
    let (first, then) = (Case { rows: vec![6, 0, 0], n: 16, k: 24, spare: 0 }, Case { rows: vec![1, 2, 3], n: 16, k: 24, spare: 0 });
    for gemm in paths(properties) {
        let operands = Operands::new(&first, stream)?;
        let workspace = Buffer::<u8>::new(stream, gemm.workspace_bytes(3)?, "workspace")?;
        let graph = stream.capture(|| gemm.launch(operands.grouped(&first, workspace.view()), stream))?;
        operands.offsets.view().write(&then.offsets(), stream)?;
        graph.launch(stream)?;
        bench.compare(name(gemm.path()), "captured", &widen(&operands.y.to_vec()?), &operands.expected(&then), Tolerance::BF16);
    }
    Ok(())
}

fn gather(bench: &mut Bench) -> Result<()> {
    let stream = bench.stream;
    for (tokens, slots, width, used) in [(1, 1, 8, 1), (5, 2, 264, 7), (9, 3, 128, 27), (3, 2, 16, 0)] {
        let x = Random::new(13).bf16s(tokens * width, 1.0);
        // A permutation, of which some slots are unused.
        let rows: Vec<u32> = (0..tokens * slots).map(|row| ((row * 5 + 2) % (tokens * slots)) as u32).collect();
        let mut expected = reference::gather_rows(&x, &rows[..used], slots, width);
        expected.resize(tokens * slots * width, UNTOUCHED);
        let (x, rows) = (Buffer::from_slice(stream, &narrow(&x), "x")?, Buffer::from_slice(stream, &rows, "rows")?);
        let offsets = Buffer::from_slice(stream, &[0, 0, used as u32], "offsets")?;
        let out = Buffer::from_slice(stream, &vec![bf16::from_f32(UNTOUCHED); tokens * slots * width], "out")?;
        GatherRows { x: x.view(), rows: rows.view(), offsets: offsets.view(), out: out.view(), experts: 2, tokens, slots, width }
            .launch(stream)?;
        bench.same("gather_rows", format!("{used} of [{tokens}, {slots}] slots, width {width}"), &widen(&out.to_vec()?), &expected);
    }
    Ok(())
}

fn silu(bench: &mut Bench) -> Result<()> {
    let stream = bench.stream;
    for (max_rows, used, width) in [(1, 1, 8), (7, 5, 264), (40, 40, 128), (3, 0, 16)] {
        let mut gate_up = Random::new(17).bf16s(max_rows * 2 * width, 3.0);
        // What overflows an exponential, and what is no number.
        gate_up[0] = -200.0;
        gate_up[1] = 200.0;
        gate_up[2] = f32::NAN;
        let mut expected = reference::silu_mul(&gate_up[..used * 2 * width], width);
        expected.resize(max_rows * width, UNTOUCHED);
        let gate_up = Buffer::from_slice(stream, &narrow(&gate_up), "gate_up")?;
        let offsets = Buffer::from_slice(stream, &[0, used as u32], "offsets")?;
        let out = Buffer::from_slice(stream, &vec![bf16::from_f32(UNTOUCHED); max_rows * width], "out")?;
        SiluMul { gate_up: gate_up.view(), offsets: offsets.view(), out: out.view(), experts: 1, max_rows, width }.launch(stream)?;
        bench.compare("silu_mul", format!("{used} of {max_rows} rows, width {width}"), &widen(&out.to_vec()?), &expected, Tolerance::BF16);
    }
    Ok(())
}

fn dequantize(bench: &mut Bench) -> Result<()> {
    let stream = bench.stream;
    for (experts, n, k) in [(1_usize, 16_usize, 16_usize), (3, 136, 264), (2, 256, 128)] {
        let mut random = Random::new(19);
        // Every number comes up; what is none is told by a scale.
        let number = |bits: u8| if bits & 0x7f == 0x7f { 0 } else { bits };
        let weight: Vec<u8> = (0..experts * n * k).map(|at| number((at + at / 256) as u8)).collect();
        let mut scales: Vec<f32> = (0..scales_len(experts, n, k)).map(|_| 0.01 + random.unit()).collect();
        scales[0] = if experts == 2 { f32::NAN } else { scales[0] };
        let all = e4m3::widen(&weight, &scales, n, k);
        // The last expert has no rows.
        let offsets: Vec<u32> = (0..=experts as u32).map(|expert| expert.min(experts as u32 - 1)).collect();
        let mut some = all.clone();
        some[(experts - 1) * n * k..].fill(UNTOUCHED);

        let (weight, scales) = (Buffer::from_slice(stream, &weight, "weight")?, Buffer::from_slice(stream, &scales, "scales")?);
        let offsets = Buffer::from_slice(stream, &offsets, "offsets")?;
        for (offsets, expected) in [(None, &all), (Some(offsets.view()), &some)] {
            let out = Buffer::from_slice(stream, &vec![bf16::from_f32(UNTOUCHED); experts * n * k], "out")?;
            DequantizeExperts { weight: weight.view(), scales: scales.view(), offsets, out: out.view(), experts, n, k }.launch(stream)?;
            let shape = format!("[{experts}, {n}, {k}]{}", if offsets.is_some() { ", one expert without rows" } else { "" });
            bench.compare("dequantize_experts", shape, &widen(&out.to_vec()?), expected, Tolerance { absolute: 0.0, relative: 4e-3 });
        }
    }
    Ok(())
}
