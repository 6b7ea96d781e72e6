//! Handwritten digits, each in four rotations: the class is to be told whatever the rotation, the natural expert is the rotation.
//!
//! That rotations are the best routing is plausible and not proven. Train and test rows are of different images.

use super::{Batch, Targets, Task};
use crate::{
    compare::{data::DIGITS, random::Random},
    error::{Error, Result},
};

const SIDE: usize = 8;
const PIXELS: usize = SIDE * SIDE;
const CLASSES: usize = 10;
const ROTATIONS: usize = 4;
/// Largest pixel value of the file.
const WHITE: f64 = 16.0;

/// The task.
#[derive(Clone, Debug)]
pub struct Digits {
    seed: u64,
    train: Vec<Image>,
    test: Batch,
    trivial: f64,
}

#[derive(Clone, Debug)]
struct Image {
    pixels: [f64; PIXELS],
    class: usize,
}

impl Digits {
    /// Splits the images by `seed`: four fifths to train, one fifth to test, every test image in all rotations.
    pub fn new(seed: u64) -> Result<Self> {
        let images = DIGITS.lines().enumerate().map(|(i, line)| image(line).ok_or_else(|| broken(i + 1))).collect::<Result<Vec<_>>>()?;
        let order = Random::new(seed, "digits").permutation(images.len());
        let (test, train) = order.split_at(images.len() / 5);
        let pick = |chosen: &[usize]| chosen.iter().filter_map(|&i| images.get(i).cloned()).collect::<Vec<_>>();
        let test: Vec<Image> = pick(test);
        let test = rows(test.iter().flat_map(|image| (0..ROTATIONS).map(move |rotation| (image, rotation))));
        let trivial = entropy_of_classes(&test);
        Ok(Self { seed, train: pick(train), test, trivial })
    }
}

impl Task for Digits {
    fn features(&self) -> usize {
        PIXELS + 1
    }

    fn outputs(&self) -> usize {
        CLASSES
    }

    fn hidden(&self) -> usize {
        16
    }

    fn batch(&self, step: usize, rows_: usize) -> Batch {
        let mut random = Random::of_step(self.seed, "rows", step);
        let drawn: Vec<(usize, usize)> = (0..rows_).map(|_| (random.below(self.train.len()), random.below(ROTATIONS))).collect();
        rows(drawn.iter().filter_map(|&(i, rotation)| Some((self.train.get(i)?, rotation))))
    }

    fn test(&self) -> &Batch {
        &self.test
    }

    fn validation(&self) -> Option<&Batch> {
        None
    }

    fn handicap(&self) -> Vec<f64> {
        vec![0.0; ROTATIONS]
    }

    fn optimal_router(&self) -> Option<Vec<f64>> {
        None
    }

    fn trivial(&self) -> f64 {
        self.trivial
    }
}

fn rows<'a>(images: impl Iterator<Item = (&'a Image, usize)>) -> Batch {
    let (mut x, mut classes, mut region) = (Vec::new(), Vec::new(), Vec::new());
    for (image, rotation) in images {
        x.extend((0..PIXELS).map(|at| image.pixels[source(at, rotation)]));
        x.push(1.0);
        classes.push(image.class);
        region.push(rotation);
    }
    Batch { features: PIXELS + 1, outputs: CLASSES, x, targets: Targets::Classes(classes), region }
}

/// The pixel that stands at `at` after so many quarter turns.
fn source(at: usize, quarter_turns: usize) -> usize {
    let (mut row, mut column) = (at / SIDE, at % SIDE);
    for _ in 0..quarter_turns {
        (row, column) = (column, SIDE - 1 - row);
    }
    row * SIDE + column
}

fn image(line: &str) -> Option<Image> {
    let mut values = line.split(',').map(|text| text.trim().parse::<u8>());
    let mut pixels = [0.0; PIXELS];
    for pixel in &mut pixels {
        *pixel = f64::from(values.next()?.ok()?) / WHITE;
    }
    let class = usize::from(values.next()?.ok()?);
    (class < CLASSES && values.next().is_none()).then_some(Image { pixels, class })
}

fn broken(line: usize) -> Error {
    Error::Internal(format!("digits.csv, line {line} is not 64 pixels and a class"))
}

fn entropy_of_classes(batch: &Batch) -> f64 {
    let Targets::Classes(classes) = &batch.targets else { return f64::NAN };
    let share = |c: usize| classes.iter().filter(|&&class| class == c).count() as f64 / classes.len().max(1) as f64;
    (0..CLASSES).map(share).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn all_images_are_read_and_none_is_in_both_parts() {
        let task = Digits::new(1).expect("the file is sound");
        assert_eq!(task.train.len() + task.test.rows() / ROTATIONS, 1797);
        let key = |pixels: &[f64]| pixels.iter().map(|x| (x * WHITE) as u8).collect::<Vec<_>>();
        let train: HashSet<_> = task.train.iter().map(|image| key(&image.pixels)).collect();
        let upright = task.test.x.chunks_exact(PIXELS + 1).step_by(ROTATIONS);
        assert_eq!(upright.filter(|row| train.contains(&key(&row[..PIXELS]))).count(), 0);
        assert!((task.trivial() - 10_f64.ln()).abs() < 0.05);
    }

    #[test]
    fn four_quarter_turns_are_none_and_one_turns_the_corner() {
        assert!((0..PIXELS).all(|at| source(at, 4) == at));
        // Counter-clockwise: what was top right is top left.
        assert_eq!(source(0, 1), SIDE - 1);
        assert_eq!(source(0, 2), PIXELS - 1);
    }
}
