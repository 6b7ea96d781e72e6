//! Fast forms against composed ones: values, gradients, independence of the batch.

use candle_core::{D, DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{as_on_a_device, cpu::AttentionShape, device};

fn random(shape: &[usize], rng: &mut StdRng) -> Var {
    let count = shape.iter().product();
    let values = (0..count).map(|_| rng.random_range(-1.5f32..1.5)).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Value and gradients of `fast` equal those of `composed`, under a random weighting of the output.
fn check(name: &str, vars: &[&Var], fast: impl Fn() -> Tensor, composed: impl Fn() -> Tensor) {
    let (a, b) = (fast(), composed());
    assert!(difference(&a, &b) < 2e-5, "{name}: value differs by {}", difference(&a, &b));
    let weighting = random(a.dims(), &mut StdRng::seed_from_u64(99));
    let grads = |y: &Tensor| (y * weighting.as_detached_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let (a, b) = (grads(&a), grads(&b));
    for (index, var) in vars.iter().enumerate() {
        let (a, b) = (a.get(var).expect("fast form drops a gradient"), b.get(var).unwrap());
        assert!(difference(a, b) < 1e-4, "{name}: gradient {index} differs by {}", difference(a, b));
    }
}

#[test]
fn silu_mul() {
    let x = random(&[3, 5, 14], &mut StdRng::seed_from_u64(1));
    let composed = || (x.narrow(2, 0, 7).unwrap().silu().unwrap() * x.narrow(2, 7, 7).unwrap()).unwrap();
    check("silu_mul", &[&x], || super::silu_mul(&x).unwrap(), composed);
}

#[test]
fn weighted_swiglu() {
    let rng = &mut StdRng::seed_from_u64(2);
    let (x, w) = (random(&[4, 3, 10], rng), random(&[4, 3], rng));
    let composed = || {
        let hidden = (x.narrow(2, 0, 5).unwrap().silu().unwrap() * x.narrow(2, 5, 5).unwrap()).unwrap();
        hidden.broadcast_mul(&w.unsqueeze(D::Minus1).unwrap()).unwrap()
    };
    check("weighted_swiglu", &[&x, &w], || super::weighted_swiglu(&x, &w).unwrap(), composed);
}

#[test]
fn cross_entropy() {
    let logits = random(&[7, 19], &mut StdRng::seed_from_u64(3));
    let targets = [0u32, 18, 3, 3, 7, 11, 2];
    let composed = || candle_nn::loss::cross_entropy(&logits, &Tensor::new(&targets, &Device::Cpu).unwrap()).unwrap();
    check("cross_entropy", &[&logits], || super::cross_entropy(&logits, &targets).unwrap(), composed);
    assert!(super::cross_entropy(&logits, &[0, 1, 2, 3, 4, 5, 19]).is_err(), "a target outside the vocabulary");
    assert!(super::cross_entropy(&logits, &[0]).is_err(), "too few targets");
}

#[test]
fn causal_attention() {
    let rng = &mut StdRng::seed_from_u64(4);
    for (count, s, heads, kv_heads, head_dim, window) in [(2, 9, 4, 2, 6, None), (1, 17, 3, 1, 8, Some(4)), (3, 1, 2, 2, 4, None)] {
        let shape = AttentionShape { heads, kv_heads, head_dim, window };
        let t = count * s;
        let (q, k, v) = (random(&[t, heads, head_dim], rng), random(&[t, kv_heads, head_dim], rng), random(&[t, kv_heads, head_dim], rng));
        let composed = || {
            let split = |x: &Tensor, n: usize| x.reshape((count, s, n, head_dim)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
            let spread = |x: &Tensor| {
                let x = split(x, kv_heads).unsqueeze(2).unwrap();
                x.broadcast_as((count, kv_heads, heads / kv_heads, s, head_dim)).unwrap().reshape((count, heads, s, head_dim)).unwrap()
            };
            let scores = split(&q, heads).matmul(&spread(&k).transpose(2, 3).unwrap()).unwrap();
            let scores = (scores / (head_dim as f64).sqrt()).unwrap();
            let seen = |i: usize, j: usize| j <= i && window.is_none_or(|w| i - j < w);
            let mask: Vec<f32> = (0..s * s).map(|n| if seen(n / s, n % s) { 0.0 } else { f32::NEG_INFINITY }).collect();
            let scores = scores.broadcast_add(&Tensor::from_vec(mask, (s, s), &Device::Cpu).unwrap()).unwrap();
            let y = candle_nn::ops::softmax(&scores, D::Minus1).unwrap().matmul(&spread(&v)).unwrap();
            y.transpose(1, 2).unwrap().reshape((t, heads, head_dim)).unwrap()
        };
        check("causal_attention", &[&q, &k, &v], || super::causal_attention(&q, &k, &v, count, shape).unwrap(), composed);
    }
}

#[test]
fn causal_attention_refuses_what_does_not_fit() {
    let rng = &mut StdRng::seed_from_u64(8);
    let shape = |heads, kv_heads| AttentionShape { heads, kv_heads, head_dim: 4, window: None };
    let mut refused = |q: [usize; 2], k: [usize; 2], v: [usize; 2], count, shape| {
        let [q, k, v] = [q, k, v].map(|[t, heads]| random(&[t, heads, 4], rng));
        super::causal_attention(&q, &k, &v, count, shape).is_err()
    };
    assert!(!refused([6, 4], [6, 2], [6, 2], 2, shape(4, 2)));
    assert!(refused([6, 2], [6, 2], [6, 2], 2, shape(4, 2)), "too few query heads");
    assert!(refused([6, 4], [6, 4], [6, 2], 2, shape(4, 2)), "too many key heads");
    assert!(refused([6, 4], [5, 2], [6, 2], 2, shape(4, 2)), "too few keys");
    assert!(refused([6, 3], [6, 2], [6, 2], 2, shape(3, 2)), "heads that do not share evenly");
    assert!(refused([6, 4], [6, 2], [6, 2], 4, shape(4, 2)), "sequences of unequal length");
    assert!(refused([0, 4], [0, 2], [0, 2], 1, shape(4, 2)), "nothing");
}

#[test]
fn softmax_and_rms_norm_keep_gradients() {
    let rng = &mut StdRng::seed_from_u64(5);
    let (x, w) = (random(&[4, 8], rng), random(&[8], rng));
    let untracked = (x.as_detached_tensor(), w.as_detached_tensor());
    assert!(difference(&super::softmax(&x).unwrap(), &super::softmax(&untracked.0).unwrap()) < 1e-6);
    let normed = super::rms_norm(&x, &w, 1e-5).unwrap();
    assert!(difference(&normed, &super::rms_norm(&untracked.0, &untracked.1, 1e-5).unwrap()) < 1e-6);
    let grads = (normed * super::softmax(&x).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&w).is_some());
}

#[test]
fn linear_equals_matmul_and_does_not_depend_on_the_batch() {
    let rng = &mut StdRng::seed_from_u64(6);
    for (t, k, n) in [(1, 1, 1), (1, 64, 100), (5, 33, 7), (64, 128, 96), (130, 20, 3)] {
        let (x, w) = (random(&[t, k], rng).as_detached_tensor(), random(&[n, k], rng).as_detached_tensor());
        let found = super::linear(&x, &w).unwrap();
        assert!(difference(&found, &x.matmul(&w.t().unwrap()).unwrap()) < 1e-4, "{t} {k} {n}");
        let rows = found.to_vec2::<f32>().unwrap();
        for (i, row) in rows.iter().enumerate() {
            let alone = super::linear(&x.narrow(0, i, 1).unwrap(), &w).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(&alone[0], row, "row {i} of {t} alone has other bits");
        }
        let half = super::linear(&x, &w.to_dtype(DType::BF16).unwrap()).unwrap();
        let rounded = w.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        assert!(difference(&half, &x.matmul(&rounded.t().unwrap()).unwrap()) < 1e-4, "bf16 {t} {k} {n}");
    }
    let x = random(&[2, 4], rng).as_detached_tensor();
    assert!(super::linear(&x, &random(&[3, 5], rng).as_detached_tensor()).is_err(), "shapes that do not fit are an error");
}

#[test]
fn linear_of_tracked_weights_keeps_gradients() {
    let rng = &mut StdRng::seed_from_u64(7);
    let (x, w) = (random(&[3, 4], rng), random(&[5, 4], rng));
    let grads = super::linear(&x, &w).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&w).is_some());
}

/// Rows of three of five groups, in f64: against the composed form and against central differences.
#[test]
fn grouped_linear() {
    let rng = &mut StdRng::seed_from_u64(9);
    let wide = |var: Var| Var::from_tensor(&var.to_dtype(DType::F64).unwrap()).unwrap();
    let (x, w) = (wide(random(&[7, 4], rng)), wide(random(&[5, 3, 4], rng)));
    let weighting = random(&[7, 3], rng).to_dtype(DType::F64).unwrap().detach();
    let offsets = [0, 2, 2, 6, 6, 7];
    let value = |x: &Tensor, w: &Tensor, composed: bool| {
        let y = match composed {
            true => super::device::grouped_linear(x, w, &offsets).unwrap(),
            false => super::grouped_linear(x, w, &offsets).unwrap(),
        };
        (y * &weighting).unwrap().sum_all().unwrap()
    };
    let number = |t: Tensor| t.to_scalar::<f64>().unwrap();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    assert!((number(value(&x, &w, false)) - number(value(&x, &w, true))).abs() < 1e-12);
    let (fast, composed) = (value(&x, &w, false).backward().unwrap(), value(&x, &w, true).backward().unwrap());
    for (var, other, is_x) in [(&x, &w, true), (&w, &x, false)] {
        let found = flat(fast.get(var).expect("a gradient"));
        assert!(flat(composed.get(var).unwrap()).iter().zip(&found).all(|(a, b)| (a - b).abs() < 1e-12));
        let (start, h) = (flat(var), 1e-6);
        for i in 0..start.len() {
            let at = |step: f64| {
                let mut moved = start.clone();
                moved[i] += step;
                let moved = Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap();
                number(if is_x { value(&moved, other, false) } else { value(other, &moved, false) })
            };
            let wanted = (at(h) - at(-h)) / (2.0 * h);
            assert!((found[i] - wanted).abs() < 1e-5 * wanted.abs().max(1.0), "{i}: {} and {wanted}", found[i]);
        }
    }
    let (x, w) = (x.as_detached_tensor(), w.as_detached_tensor());
    for bad in [&[0, 2, 2, 6, 6, 8][..], &[0, 2, 1, 6, 6, 7], &[0, 7], &[1, 2, 2, 6, 6, 7]] {
        assert!(super::grouped_linear(&x, &w, bad).is_err(), "{bad:?}");
    }
    let none = super::grouped_linear(&x.narrow(0, 0, 0).unwrap(), &w, &[0; 6]).unwrap();
    assert_eq!(none.dims(), [0, 3], "nothing is routed");
}

/// A frozen operand gets no gradient, and costs none.
#[test]
fn grouped_linear_leaves_frozen_weights_alone() {
    let rng = &mut StdRng::seed_from_u64(10);
    let (x, w) = (random(&[4, 3], rng), random(&[2, 5, 3], rng));
    let grads = super::grouped_linear(&x, &w.as_detached_tensor(), &[0, 1, 4]).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
}

#[test]
fn a_known_function_has_the_value_and_gradient_it_was_given() {
    let x = random(&[2, 3], &mut StdRng::seed_from_u64(11));
    let gradient = vec![1.0, -2.0, 0.5, 0.0, 4.0, 3.0];
    let y = super::known(&x, 7.5, gradient.clone()).unwrap();
    assert_eq!(y.to_scalar::<f32>().unwrap(), 7.5);
    let grads = (y * 2.0).unwrap().backward().unwrap();
    let doubled: Vec<f32> = gradient.iter().map(|d| 2.0 * *d as f32).collect();
    assert_eq!(grads.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), doubled);
    assert!(super::known(&x, 0.0, vec![1.0]).is_err(), "as many derivatives as elements");
}

/// Gradient of `y` weighted at random with respect to `x`, and how many tensors got one.
fn gradient_of(y: &Tensor, x: &Var) -> (Tensor, usize) {
    let weighting = random(y.dims(), &mut StdRng::seed_from_u64(98)).as_detached_tensor();
    let grads = (y * weighting).unwrap().sum_all().unwrap().backward().unwrap();
    (grads.get(x).expect("a gradient").clone(), grads.get_ids().count())
}

/// With an f32 weight nothing may change but what is stored: not a bit of the value, nor of the gradient that is left.
#[test]
fn a_frozen_linear_layer_has_the_bits_of_a_tracked_one() {
    let rng = &mut StdRng::seed_from_u64(12);
    for (t, k, n) in [(1, 1, 1), (1, 64, 100), (5, 33, 7), (64, 128, 96), (130, 20, 3)] {
        let (x, w) = (random(&[t, k], rng), random(&[n, k], rng));
        let (tracked, frozen) = (super::linear(&x, &w).unwrap(), super::linear(&x, &w.as_detached_tensor()).unwrap());
        assert_eq!(difference(&tracked, &frozen), 0.0, "{t} {k} {n}");
        let ((a, all), (b, fewer)) = (gradient_of(&tracked, &x), gradient_of(&frozen, &x));
        assert_eq!(difference(&a, &b), 0.0, "{t} {k} {n}");
        assert!(fewer < all, "{fewer} gradients instead of {all}");
        let part = w.as_detached_tensor().narrow(0, n / 2, n - n / 2).unwrap();
        let wanted = x.matmul(&part.t().unwrap()).unwrap();
        assert_eq!(difference(&super::linear(&x, &part).unwrap(), &wanted), 0.0, "of a view");
    }
    let x = random(&[2, 4], rng);
    assert!(super::linear(&x, &random(&[3, 5], rng).as_detached_tensor()).is_err(), "shapes that do not fit are an error");
}

/// The weight is rounded to bf16 on both sides.
#[test]
fn frozen_weights_of_bf16_are_read_as_they_are() {
    let rng = &mut StdRng::seed_from_u64(13);
    // Below, at and above a strip of 64 rows, and tasks of several rows.
    for (t, e, n, k) in [(1, 1, 1, 1), (3, 2, 5, 7), (40, 3, 64, 9), (70, 2, 130, 17), (100, 1, 65, 33)] {
        let (x, w) = (random(&[t, e * k], rng), random(&[e, n, k], rng).as_detached_tensor());
        for dtype in [DType::BF16, DType::F32] {
            let narrow = w.to_dtype(dtype).unwrap();
            let wide = narrow.to_dtype(DType::F32).unwrap();
            let hidden = x.reshape((t, e, k)).unwrap();
            let (found, wanted) = (super::experts_down(&hidden, &narrow).unwrap(), {
                let down = wide.transpose(1, 2).unwrap().reshape((e * k, n)).unwrap();
                x.matmul(&down).unwrap()
            });
            assert!(difference(&found, &wanted) < 1e-4, "{dtype:?} {t} {e} {n} {k}: {}", difference(&found, &wanted));
            let ((a, few), (b, _)) = (gradient_of(&found, &x), gradient_of(&wanted, &x));
            assert!(difference(&a, &b) < 1e-4, "{dtype:?} {t} {e} {n} {k}: {}", difference(&a, &b));
            assert!(few <= 5, "nothing for the weight: {few}");
        }
        let (rows, one) = (random(&[t, k], rng), w.narrow(0, 0, 1).unwrap().squeeze(0).unwrap().to_dtype(DType::BF16).unwrap());
        let wanted = rows.matmul(&one.to_dtype(DType::F32).unwrap().t().unwrap()).unwrap();
        let found = super::linear(&rows, &one).unwrap();
        assert!(difference(&found, &wanted) < 1e-4);
        assert!(difference(&gradient_of(&found, &rows).0, &gradient_of(&wanted, &rows).0) < 1e-4);
    }
}

#[test]
fn grouped_linear_of_frozen_bf16_weights() {
    let rng = &mut StdRng::seed_from_u64(14);
    let (x, w) = (random(&[7, 4], rng), random(&[5, 3, 4], rng).to_dtype(DType::BF16).unwrap().detach());
    let offsets = [0, 2, 2, 6, 6, 7];
    let found = super::grouped_linear(&x, &w, &offsets).unwrap();
    let wanted = super::device::grouped_linear(&x, &w.to_dtype(DType::F32).unwrap(), &offsets).unwrap();
    assert!(difference(&found, &wanted) < 1e-5);
    assert!(difference(&gradient_of(&found, &x).0, &gradient_of(&wanted, &x).0) < 1e-5);
}

#[test]
fn experts_of_all_rows_are_two_products() {
    let rng = &mut StdRng::seed_from_u64(15);
    let (x, gate_up, down) = (random(&[6, 4], rng), random(&[3, 10, 4], rng), random(&[3, 4, 5], rng));
    let composed = |x: &Tensor, gate_up: &Tensor, down: &Tensor| {
        let hidden = x.matmul(&gate_up.reshape((30, 4)).unwrap().t().unwrap()).unwrap().reshape((6, 3, 10)).unwrap();
        let hidden = super::silu_mul(&hidden).unwrap().reshape((6, 15)).unwrap();
        hidden.matmul(&down.transpose(1, 2).unwrap().reshape((15, 4)).unwrap()).unwrap()
    };
    let fast = |x: &Tensor, gate_up: &Tensor, down: &Tensor| {
        let hidden = super::silu_mul(&super::experts_in(x, gate_up).unwrap()).unwrap();
        super::experts_down(&hidden, down).unwrap()
    };
    check("experts", &[&x, &gate_up, &down], || fast(&x, &gate_up, &down), || composed(&x, &gate_up, &down));
    let (gate_up, down) = (gate_up.as_detached_tensor(), down.as_detached_tensor());
    check("frozen experts", &[&x], || fast(&x, &gate_up, &down), || composed(&x, &gate_up, &down));
    let narrow = |t: &Tensor| t.to_dtype(DType::BF16).unwrap();
    let rounded = |t: &Tensor| narrow(t).to_dtype(DType::F32).unwrap();
    let (a, b) = (fast(&x, &narrow(&gate_up), &narrow(&down)), composed(&x, &rounded(&gate_up), &rounded(&down)));
    assert!(difference(&a, &b) < 1e-5);
    let untracked = fast(&x.as_detached_tensor(), &narrow(&gate_up), &narrow(&down));
    assert!(difference(&untracked, &b) < 1e-4);
}

/// Value and gradients of `form` on a device, of f32 and of bf16 rows with f32 masters, against those of the CPU.
fn check_device(name: &str, vars: &[&Var], form: impl Fn(DType) -> Tensor) {
    let here = form(DType::F32);
    let weighting = random(here.dims(), &mut StdRng::seed_from_u64(97)).as_detached_tensor();
    let grads = |y: &Tensor| (y * &weighting).unwrap().sum_all().unwrap().backward().unwrap();
    let size = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap().max(1e-3);
    let wanted = grads(&here);
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 3e-2)] {
        let found = as_on_a_device(|| form(dtype));
        assert_eq!(found.dtype(), DType::F32, "{name}");
        assert!(difference(&found, &here) < tolerance * size(&here), "{name} {dtype:?}: {}", difference(&found, &here));
        let found = as_on_a_device(|| grads(&found));
        for (index, var) in vars.iter().enumerate() {
            let (a, b) = (found.get(var).unwrap_or_else(|| panic!("{name} {dtype:?}: no gradient {index}")), wanted.get(var).unwrap());
            assert_eq!(a.dtype(), DType::F32, "{name} {dtype:?}: of the master");
            assert!(difference(a, b) < tolerance * size(b), "{name} {dtype:?}: gradient {index}: {} of {}", difference(a, b), size(b));
        }
    }
}

#[test]
fn every_form_of_a_device_is_that_of_the_cpu() {
    let rng = &mut StdRng::seed_from_u64(16);
    let wide = |y: Tensor| y.to_dtype(DType::F32).unwrap();
    let (x, w) = (random(&[9, 6], rng), random(&[5, 6], rng));
    check_device("linear", &[&x, &w], |dtype| wide(super::linear(&x.to_dtype(dtype).unwrap(), &w).unwrap()));
    let frozen = w.as_detached_tensor();
    check_device("frozen linear", &[&x], |dtype| wide(super::linear(&x.to_dtype(dtype).unwrap(), &frozen).unwrap()));
    check_device("linear of constants", &[&w], |dtype| wide(super::linear(&x.detach().to_dtype(dtype).unwrap(), &w).unwrap()));

    let (hidden, weights) = (random(&[4, 3, 10], rng), random(&[4, 3], rng));
    check_device("silu_mul", &[&hidden], |dtype| wide(super::silu_mul(&hidden.to_dtype(dtype).unwrap()).unwrap()));
    check_device("weighted_swiglu", &[&hidden, &weights], |dtype| {
        wide(super::weighted_swiglu(&hidden.to_dtype(dtype).unwrap(), &weights).unwrap())
    });

    let stack = random(&[5, 7, 6], rng);
    let offsets = [0, 2, 2, 6, 6, 9];
    check_device("grouped", &[&x, &stack], |dtype| wide(super::grouped_linear(&x.to_dtype(dtype).unwrap(), &stack, &offsets).unwrap()));
    let frozen = stack.as_detached_tensor();
    check_device("frozen groups", &[&x], |dtype| wide(super::grouped_linear(&x.to_dtype(dtype).unwrap(), &frozen, &offsets).unwrap()));

    let (gate_up, down) = (random(&[3, 8, 6], rng), random(&[3, 6, 4], rng));
    let all = |dtype: DType, gate_up: &Tensor, down: &Tensor| {
        let hidden = super::silu_mul(&super::experts_in(&x.to_dtype(dtype).unwrap(), gate_up).unwrap()).unwrap();
        wide(super::experts_down(&hidden, down).unwrap())
    };
    check_device("all experts", &[&x, &gate_up, &down], |dtype| all(dtype, &gate_up, &down));
    check_device("frozen experts", &[&x], |dtype| all(dtype, &gate_up.as_detached_tensor(), &down.as_detached_tensor()));

    let (logits, targets) = (random(&[7, 19], rng), [0u32, 18, 3, 3, 7, 11, 2]);
    check_device("cross_entropy", &[&logits], |_| super::cross_entropy(&logits, &targets).unwrap());
    let refused = |targets: &[u32]| as_on_a_device(|| super::cross_entropy(&logits, targets).is_err());
    assert!(refused(&[0, 1, 2, 3, 4, 5, 19]) && refused(&[0]), "what a kernel would read out of bounds");
    check_device("known", &[&x], |_| super::known(&x, 2.5, (0..54).map(f64::from).collect()).unwrap());
}

#[test]
fn attention_of_a_device_is_that_of_the_cpu() {
    let rng = &mut StdRng::seed_from_u64(17);
    for (count, s, heads, kv_heads, head_dim, window) in
        [(2, 9, 4, 2, 6, None), (1, 17, 3, 1, 8, Some(4)), (3, 1, 2, 2, 4, None), (2, 5, 6, 3, 2, Some(1))]
    {
        let shape = AttentionShape { heads, kv_heads, head_dim, window };
        let t = count * s;
        let (q, k, v) = (random(&[t, heads, head_dim], rng), random(&[t, kv_heads, head_dim], rng), random(&[t, kv_heads, head_dim], rng));
        let mask = device::causal_mask(s, 0, window, &Device::Cpu).unwrap();
        let found = || device::attention([&q, &k, &v], &mask, count, shape).unwrap();
        check("attention", &[&q, &k, &v], || super::causal_attention(&q, &k, &v, count, shape).unwrap(), found);
        assert!(device::attention([&q, &k, &v], &mask, count + 1, shape).is_err(), "another number of sequences");
    }
}

/// Rows of a few tokens, one of which has none and one three.
#[test]
fn rows_of_a_device_go_there_and_back() {
    let rng = &mut StdRng::seed_from_u64(18);
    let (tokens, rows) = ([0u32, 2, 3, 2, 3, 3], [vec![0u32], vec![], vec![1, 3], vec![2, 4, 5]]);
    let index = device::RowIndex::new(&tokens, &rows, &Device::Cpu).unwrap();
    let ids = Tensor::new(&tokens, &Device::Cpu).unwrap();
    let (x, y) = (random(&[4, 5], rng), random(&[6, 5], rng));
    check("spread", &[&x], || index.spread(&x, DType::F32).unwrap(), || x.index_select(&ids, 0).unwrap());
    let zeros = Tensor::zeros((4, 5), DType::F32, &Device::Cpu).unwrap();
    check("collect", &[&y], || index.collect(&y, 4).unwrap(), || zeros.index_add(&ids, &y, 0).unwrap());
    // Many small parts: their sum is f32's, not that of the rows.
    let many = device::RowIndex::new(&[0; 300], &[(0..300).collect()], &Device::Cpu).unwrap();
    let ones = Tensor::ones((300, 1), DType::BF16, &Device::Cpu).unwrap();
    assert_eq!(many.collect(&ones, 1).unwrap().to_vec2::<f32>().unwrap(), [[300.0]]);
    let none = device::RowIndex::new(&[], &[vec![], vec![]], &Device::Cpu).unwrap();
    assert_eq!(none.spread(&x, DType::BF16).unwrap().dims(), [0, 5]);
    assert_eq!(none.collect(&y.narrow(0, 0, 0).unwrap(), 2).unwrap().to_vec2::<f32>().unwrap(), [[0.0; 5]; 2]);
}

/// The graph has the inputs and the output, and nothing of what was between.
#[test]
fn what_is_frozen_costs_no_gradient_on_a_device() {
    let rng = &mut StdRng::seed_from_u64(19);
    let (x, w) = (random(&[4, 3], rng), random(&[2, 5, 3], rng).as_detached_tensor());
    as_on_a_device(|| {
        let y = super::grouped_linear(&x, &w, &[0, 1, 4]).unwrap();
        let (_, few) = gradient_of(&super::linear(&y, &w.get(0).unwrap().t().unwrap().contiguous().unwrap()).unwrap(), &x);
        assert!(few <= 5, "x, two products, the weighting, its sum: {few}");
        let alone = super::linear(&x.as_detached_tensor(), &w.get(0).unwrap()).unwrap();
        assert!(!alone.track_op(), "without a variable there is no graph");
    });
}

/// An operation that only the CPU has says so, instead of reading what is not there.
#[test]
fn operations_of_the_cpu_refuse_tensors_of_a_device() {
    let rng = &mut StdRng::seed_from_u64(20);
    let (q, k) = (random(&[4, 2, 4], rng), random(&[4, 2, 4], rng));
    let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 4, window: None };
    let refused = as_on_a_device(|| super::causal_attention(&q, &k, &k, 1, shape).unwrap_err());
    assert!(refused.to_string().contains("an operation of the CPU met"), "{refused}");
    assert!(super::causal_attention(&q, &k, &k, 1, shape).is_ok(), "it was pretended for as long as that took");
}
