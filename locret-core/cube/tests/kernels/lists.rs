//! Units that are chosen on the device, and the heads that score them.

use crate::{cube, device};
use burn::tensor::Device;
use locret_core::{
    Best, Compute, DType, Kernels, LayerSpec, Perceptron, Rows, UnitLists, Weight,
    conformance::{PlainLists, check_lists, tensors_read},
};
use locret_cube::{Cube, Parts};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

#[test]
fn lists_are_what_plain_loops_keep() {
    let compute: Arc<dyn Compute> = Arc::new(cube());
    check_lists(&compute, 0..48).unwrap();
}

/// Lists of a real size: scores of one magnitude, all of them equal, and few different ones.
#[test]
fn long_lists_are_cut_like_short_ones() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for different in [1, 7, 1 << 24] {
        let (compute, heads, units) = (cube(), 2, 18_432);
        let scores: Vec<f32> = (0..heads * units)
            .map(|_| random.random_range(0..different) as f32 / 1000.0 - 0.003)
            .collect();
        let scores = compute.rows(scores, heads).unwrap();
        let mut lists = compute.unit_lists(heads).unwrap();
        let mut plain = PlainLists::new(heads, &device());
        let best = [(16_384, 0, 2500), (9, 3, 1)].map(|(keep, first, newest)| Best {
            keep,
            first,
            newest,
        });
        lists.append(5, &scores).unwrap();
        plain.append(5, &scores).unwrap();
        let (found, due) = (lists.keep(&best).unwrap(), plain.keep(&best).unwrap());
        assert_eq!(found.read().unwrap(), due.read().unwrap());
        assert_eq!(lists.read().unwrap(), plain.read().unwrap());
    }
}

/// Dense stores are cut by a list that nobody has read.
#[test]
fn stores_are_cut_by_what_lists_keep() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for dtype in [DType::F32, DType::F16] {
        let layer = LayerSpec {
            index: 0,
            layers: 1,
            heads: 3,
            kv_heads: 3,
            head_dim: 16,
        };
        let (compute, width) = (cube(), 3 * 16);
        let mut stores = [(); 2].map(|()| compute.store(&layer, dtype).unwrap());
        let mut lists = compute.unit_lists(3).unwrap();
        let mut seen = 0;
        for (new, keep) in [
            (40, [20, 33, 40]),
            (30, [50, 1, 0]),
            (1, [50, 1, 1]),
            (90, [7, 9, 60]),
        ] {
            let mut rows = |width: usize| {
                let values = (0..new * width).map(|_| random.random_range(-1.0..1.0));
                compute.rows(values.collect(), width).unwrap()
            };
            let (keys, values, scores) = (rows(width), rows(width), rows(3));
            lists.append(seen, &scores).unwrap();
            seen += new;
            let best = keep.map(|keep| Best {
                keep,
                first: keep.min(2),
                newest: 0,
            });
            let kept = lists.keep(&best).unwrap();
            let read = kept.read().unwrap();
            let before = tensors_read();
            for store in &mut stores {
                store.append(&keys, &values).unwrap();
            }
            stores[0].retain_listed(&kept).unwrap();
            assert_eq!(tensors_read(), before);
            stores[1].retain(&read).unwrap();
            assert_eq!(stores[0].bytes(), stores[1].bytes());
            for (head, keep) in keep.into_iter().enumerate() {
                let [a, b] = stores.each_ref().map(|store| {
                    assert_eq!(store.len(head), keep);
                    let part = |rows: Rows| rows.into_values().unwrap();
                    [store.keys(head), store.values(head)].map(|rows| part(rows.unwrap()))
                });
                assert_eq!(a, b, "KV head {head} after {seen} units");
            }
        }
        // What is said on a device by somebody else.
        let mut plain = PlainLists::new(3, &device());
        let scores = compute.rows(vec![1.0; 3 * 7], 3).unwrap();
        plain.append(0, &scores).unwrap();
        let kept = plain
            .keep(
                &[Best {
                    keep: 4,
                    first: 0,
                    newest: 2,
                }; 3],
            )
            .unwrap();
        let mut short = lists
            .keep(
                &[Best {
                    keep: 7,
                    first: 0,
                    newest: 0,
                }; 3],
            )
            .unwrap();
        for kept in [&short, &kept] {
            stores
                .iter_mut()
                .for_each(|store| store.retain_listed(kept).unwrap());
        }
        assert_eq!([0, 1, 2].map(|head| stores[0].len(head)), [4; 3]);
        let again = stores[0].retain_listed(&short).unwrap_err().to_string();
        assert!(again.contains("[7, 7, 7]"), "{again}");
        short = lists
            .keep(
                &[Best {
                    keep: 0,
                    first: 0,
                    newest: 0,
                }; 3],
            )
            .unwrap();
        stores[0].retain_listed(&short).unwrap();
        assert!(stores[0].is_empty());
    }
}

/// Scores of heads with weights of each type, of one part (folded) and of three, as the CPU's: within 1e-7 of the sum of
/// the magnitudes that a score is made of, and where tiles of 16-bit numbers are multiplied within what these round to.
#[test]
fn heads_score_as_the_cpu_does() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let (inner, outputs) = (96, 3);
    for (compute, share) in [
        (cube(), 1e-7),
        (
            cube().with_modelled_matrix_units(Parts::Two),
            3.0 / 65_536.0,
        ),
        (cube().with_modelled_matrix_units(Parts::One), 1.0 / 128.0),
    ] {
        for (dtype, widths) in [
            (DType::F32, vec![72]),
            (DType::F16, vec![64, 8, 8]),
            (DType::BF16, vec![80]),
            (DType::BF16, vec![40, 20, 20]),
        ] {
            let inputs: usize = widths.iter().sum();
            let mut numbers =
                |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0..1.0)).collect() };
            let first = numbers(inner * inputs);
            let bytes = first.iter().flat_map(|x| match dtype {
                DType::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
                DType::BF16 => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
                _ => x.to_le_bytes().to_vec(),
            });
            let weight = Weight {
                dtype,
                rows: inner,
                columns: inputs,
                bytes: bytes.collect::<Vec<u8>>().into(),
            };
            let second = numbers(outputs * inner);
            let host = Kernels::Auto.on(&Device::flex());
            let of = |compute: &dyn Compute| {
                (compute.perceptron(weight.clone(), second.clone())).unwrap()
            };
            let (own, of_host) = (of(&compute), of(&*host));
            assert_eq!(own.shape(), [inputs, inner, outputs]);
            for tokens in [1, 8, 9, 130] {
                let values: Vec<_> = widths.iter().map(|width| numbers(tokens * width)).collect();
                let score = |compute: &dyn Compute, head: &dyn Perceptron| {
                    let rows = values.iter().zip(&widths);
                    let rows = rows.map(|(values, width)| compute.rows(values.clone(), *width));
                    let rows: Vec<Rows> = rows.map(Result::unwrap).collect();
                    let scores = head.apply(&rows.iter().collect::<Vec<_>>()).unwrap();
                    scores.expect("scores", [tokens, outputs]).unwrap();
                    scores.into_values().unwrap()
                };
                let (found, due) = (score(&compute, &*own), score(&*host, &*of_host));
                let mut most = 0.0f32;
                for (at, (found, due)) in found.iter().zip(&due).enumerate() {
                    let (token, output) = (at / outputs, at % outputs);
                    let x = values.iter().zip(&widths);
                    let x = x.flat_map(|(part, width)| &part[token * width..][..*width]);
                    let x: Vec<f32> = x.copied().collect();
                    // The slope of a SiLU is at most 1.1.
                    let inner_size = |row: &[f32]| -> f32 {
                        1.1 * row.iter().zip(&x).map(|(a, b)| (a * b).abs()).sum::<f32>()
                    };
                    let size = first.chunks(inputs).zip(&second[output * inner..]);
                    let size: f32 = size
                        .map(|(row, second)| inner_size(row) * second.abs())
                        .sum();
                    most = most.max((found - due).abs() / size);
                }
                println!("{dtype}, {widths:?}, {tokens} tokens: {most:.1e} of the magnitudes off");
                assert!(
                    most <= share,
                    "{dtype}, {widths:?}, {tokens} tokens: {most}"
                );
            }
        }
    }
}

#[test]
fn heads_of_other_shapes_are_refused() {
    let compute: Cube = cube();
    let first = || Weight::from_f32(&[0.5; 12], 3, 4);
    for second in [vec![], vec![1.0; 4]] {
        assert!(compute.perceptron(first(), second).is_err());
    }
    let head = compute.perceptron(first(), vec![1.0; 6]).unwrap();
    let none = Rows::new(Vec::new(), 4, &device()).unwrap();
    assert_eq!(head.apply(&[&none]).unwrap().shape(), [0, 2]);
    let wide = compute.rows(vec![1.0; 5], 5).unwrap();
    assert!(head.apply(&[&wide]).is_err());
}
