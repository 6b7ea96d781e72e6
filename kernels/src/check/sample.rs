use super::{Bench, Random};
use crate::{
    Buffer, Result, Stream, reference,
    sample::{Choice, NON_FINITE, Sample},
};

/// How near a sum may come to what it is compared with before rounding decides, as a share of all mass: masses are exponentials in f32.
const SLACK: f64 = 1e-5;

const OFF: Choice = Choice { temperature: 1.0, ..Choice::LIKELIEST };

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    let large: &[_] = if bench.quick { &[] } else { &[9000, 50304, 151_936, 262_144] };
    for &vocabulary in [1, 7, 1000, 6000].iter().chain(large) {
        for (kind, spread) in [("normal", 2.5), ("narrow", 0.01), ("wide", 30.0), ("ties", 1.0), ("flat", 0.0)] {
            let mut random = Random::new(11);
            let mut row = random.normals(vocabulary, spread);
            if kind == "ties" {
                row.iter_mut().for_each(|logit| *logit = logit.round());
            }
            filters(bench, kind, &row, &mut random)?;
        }
    }
    proportions(bench)?;
    rows(bench)
}

/// All filters, alone and together, each with some random numbers.
fn filters(bench: &mut Bench, kind: &str, row: &[f32], random: &mut Random) -> Result<()> {
    let some = row.len() as u32 / 3;
    let mut choices = vec![Choice::LIKELIEST, Choice { temperature: 1e-7, ..OFF }, Choice { top_k: 1, ..OFF }];
    for filter in [
        OFF,
        Choice { top_k: 40, ..OFF },
        Choice { top_k: some, ..OFF },
        Choice { top_p: 0.9, ..OFF },
        Choice { top_p: 0.999, temperature: 1.5, ..OFF },
        Choice { top_p: 1e-9, ..OFF },
        Choice { min_p: 0.08, temperature: 0.7, ..OFF },
        Choice { min_p: 0.01, top_k: 20, top_p: 0.8, ..OFF },
        Choice { min_p: 0.001, top_k: some, top_p: 0.5, temperature: 2.0, ..OFF },
        Choice { temperature: 1e38, top_p: 0.3, ..OFF },
    ] {
        for uniform in [0.0, random.unit(), 1.0 - f32::EPSILON / 2.0] {
            choices.push(Choice { uniform, ..filter });
        }
    }
    let logits: Vec<f32> = choices.iter().flat_map(|_| row).copied().collect();
    let found = run(bench.stream, &logits, &choices, &vec![7; choices.len()])?;
    for (choice, token) in choices.iter().zip(found) {
        let right = reference::sample(row, choice, SLACK).contains(&token);
        bench.same("sample", format!("{kind} [{}], {choice:?}", row.len()), &right, &true);
    }
    Ok(())
}

/// Random numbers that are evenly spread draw each token as often as its mass says.
fn proportions(bench: &mut Bench) -> Result<()> {
    const DRAWS: usize = 300;
    let row = [0.5, -1.0, 2.0, 0.0, 1.9, -3.0, 2.0, 1.0];
    for (filter, kept) in [
        (OFF, &[0, 1, 2, 3, 4, 5, 6, 7][..]),
        (Choice { temperature: 0.5, ..OFF }, &[0, 1, 2, 3, 4, 5, 6, 7]),
        (Choice { top_k: 4, ..OFF }, &[2, 4, 6, 7]),
        (Choice { top_p: 0.45, ..OFF }, &[2, 6]),
        (Choice { min_p: 0.3, ..OFF }, &[2, 4, 6, 7]),
    ] {
        let choices: Vec<Choice> = (0..DRAWS).map(|draw| Choice { uniform: (draw as f32 + 0.5) / DRAWS as f32, ..filter }).collect();
        let found = run(bench.stream, &row.repeat(DRAWS), &choices, &[0; DRAWS])?;
        let masses: Vec<f64> =
            (0..8).map(|id| if kept.contains(&id) { f64::from(row[id] / filter.temperature).exp() } else { 0.0 }).collect();
        for (id, mass) in masses.iter().enumerate() {
            let expected = mass / masses.iter().sum::<f64>() * DRAWS as f64;
            let count = found.iter().filter(|&&token| token as usize == id).count();
            // The numbers are evenly spread: an interval has one more or less of them than its length says.
            let near = (count as f64 - expected).abs() <= 1.0 && (*mass > 0.0 || count == 0);
            bench.same("sample: proportions", format!("token {id}, {filter:?}: {count} of {expected:.1}"), &near, &true);
        }
    }
    Ok(())
}

/// Rows that are not finite, or not wanted, among others; and each row as it is alone.
fn rows(bench: &mut Bench) -> Result<()> {
    const ROWS: usize = 9;
    let vocabulary = 5000;
    let mut random = Random::new(13);
    let mut logits = random.normals(ROWS * vocabulary, 2.0);
    for (row, bad) in [(1, f32::NAN), (3, f32::INFINITY), (4, f32::NEG_INFINITY)] {
        logits[row * vocabulary + 4000 + row] = bad;
    }
    let mut choices: Vec<Choice> =
        (0..ROWS).map(|row| Choice { uniform: random.unit(), top_k: 300, top_p: 0.95, temperature: (row % 3) as f32, ..OFF }).collect();
    choices[3].wanted = 0;
    choices[6].wanted = 0;
    let before: Vec<u32> = (0..ROWS as u32).map(|row| 70_000 + row).collect();
    let found = run(bench.stream, &logits, &choices, &before)?;
    let marked: Vec<usize> = (0..ROWS).filter(|&row| found[row] == NON_FINITE).collect();
    bench.same("sample: rows that are not finite", "", &marked, &vec![1, 4]);
    bench.same("sample: rows that are not wanted", "", &[found[3], found[6]], &[before[3], before[6]]);
    for row in 0..ROWS {
        let alone = run(bench.stream, &logits[row * vocabulary..][..vocabulary], &choices[row..=row], &before[row..=row])?;
        bench.same("sample: a row alone", row.to_string(), &alone[0], &found[row]);
    }
    Ok(())
}

fn run(stream: Stream, logits: &[f32], choices: &[Choice], before: &[u32]) -> Result<Vec<u32>> {
    let (rows, vocabulary) = (choices.len(), logits.len() / choices.len());
    let (logits, choices) = (Buffer::from_slice(stream, logits, "logits")?, Buffer::from_slice(stream, choices, "choices")?);
    let tokens = Buffer::from_slice(stream, before, "tokens")?;
    Sample { logits: logits.view(), choices: choices.view(), tokens: tokens.view(), rows, vocabulary }.launch(stream)?;
    tokens.to_vec()
}
