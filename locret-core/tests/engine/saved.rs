//! Files of stores: damaged ones are an error, and nothing else; copies go on as their originals.

use crate::device;
use locret_core::{
    DType, Error, Kernels, KvStore, LayerSpec, Placement, QuantLayout, Quantization,
    QuantizedStore, Result, Rows,
};
use proptest::prelude::*;
use std::io::Read;

const LAYER: LayerSpec = LayerSpec {
    index: 0,
    layers: 1,
    heads: 2,
    kv_heads: 2,
    head_dim: 8,
};

/// Every kind of store, with 50 units of each head.
fn stores() -> Vec<Box<dyn KvStore>> {
    let mut all = Vec::new();
    for kernels in [Kernels::Auto, Kernels::Operations] {
        let compute = kernels.on(&device());
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            all.push(compute.store(&LAYER, dtype).unwrap());
        }
        let dtype = DType::F32;
        let place = Placement { compute, dtype };
        let (rows, kivi) = (QuantLayout::PerToken, QuantLayout::Kivi);
        for (bits, layout, hadamard) in [(4, rows, true), (4, kivi, false), (3, rows, false)] {
            let config = Quantization {
                bits,
                hadamard,
                layout,
                group: 8,
                residual: 3,
                ..Quantization::default()
            };
            all.push(QuantizedStore::boxed(&LAYER, &place, config).unwrap());
        }
    }
    for store in &mut all {
        append(&mut **store, 50);
        store.settle().unwrap();
    }
    all
}

fn content(store: &dyn KvStore) -> Vec<f32> {
    let parts = (0..2).flat_map(|head| [store.keys(head), store.values(head)]);
    parts
        .flat_map(|x| x.unwrap().into_values().unwrap())
        .collect()
}

fn written(store: &dyn KvStore) -> Vec<u8> {
    let mut bytes = Vec::new();
    store.write(&mut bytes).unwrap();
    bytes
}

fn read(store: &mut dyn KvStore, bytes: &[u8]) -> Result<()> {
    let mut from = bytes;
    let from: &mut dyn Read = &mut from;
    store.read(&mut from.take(bytes.len() as u64))
}

fn append(store: &mut dyn KvStore, units: usize) {
    let numbers = (0..units * 16).map(|i| (i * 7 % 13) as f32 - 6.0);
    let rows = Rows::new(numbers.collect(), 16, &device()).unwrap();
    store.append(&rows, &rows).unwrap();
}

#[test]
fn a_damaged_head_or_count_is_an_error_and_changes_nothing() {
    for mut store in stores() {
        let (bytes, before) = (written(&*store), content(&*store));
        // The name, heads and features, and the first head's number of units.
        let name = 4 + 8;
        let counts = name + u64::from_le_bytes(bytes[4..name].try_into().unwrap()) as usize;
        for at in 0..counts + 3 * 8 {
            // A number of units that is off by one may be found out only by what follows the store.
            let changes = if at < counts + 2 * 8 {
                1..=255
            } else {
                255..=255
            };
            for change in changes {
                let mut damaged = bytes.clone();
                damaged[at] ^= change;
                let read = read(&mut *store, &damaged);
                assert!(
                    matches!(read, Err(Error::Snapshot(_))),
                    "{}, byte {at}: {read:?}",
                    store.name()
                );
                assert_eq!(content(&*store), before, "{}, byte {at}", store.name());
            }
        }
    }
}

#[test]
fn any_byte_may_be_wrong_and_nothing_panics() {
    for mut store in stores() {
        let bytes = written(&*store);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] = !damaged[at];
            if read(&mut *store, &damaged).is_ok() {
                let numbers = content(&*store).len();
                assert_eq!(numbers, 4 * store.len(0) * 8, "{}", store.name());
            }
        }
    }
}

#[test]
fn stores_of_other_kinds_and_sizes_are_refused() {
    let mut all = stores();
    let files: Vec<Vec<u8>> = all.iter().map(|store| written(&**store)).collect();
    let mut taken = 0;
    for (i, store) in all.iter_mut().enumerate() {
        for (j, file) in files.iter().enumerate() {
            // The same kind on the other path is the same file.
            let same = i % 6 == j % 6;
            assert_eq!(read(&mut **store, file).is_ok(), same, "{i} {j}");
            taken += usize::from(same);
        }
    }
    assert_eq!(taken, 24);
    let wide = LayerSpec {
        head_dim: 16,
        ..LAYER
    };
    let mut wide = Kernels::Auto
        .on(&device())
        .store(&wide, DType::F32)
        .unwrap();
    assert!(matches!(
        read(&mut *wide, &files[0]),
        Err(Error::Snapshot(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// A fork and a store that was written and read have no reserve. They never take more than the
    /// original (and so no more than was planned for it), and as much once single tokens have come.
    #[test]
    fn copies_grow_to_where_their_original_is(
        before in prop::collection::vec((0usize..8, 1usize..80), 0..12),
        after in prop::collection::vec((0usize..8, 1usize..80), 1..25),
    ) {
        fn apply(store: &mut dyn KvStore, (what, n): (usize, usize)) {
            let len = store.len(0);
            match what {
                // Mostly single tokens, and single ones that go, as while text is generated.
                0..=2 => append(store, 1),
                3 => append(store, n),
                4..=6 if len > 1 => {
                    let gone = (n % len) as u32;
                    let kept: Vec<u32> = (0..len as u32).filter(|unit| *unit != gone).collect();
                    store.retain(&[kept.clone(), kept]).unwrap();
                }
                _ => {
                    let kept: Vec<u32> = (0..len.min(n) as u32).collect();
                    store.retain(&[kept.clone(), kept]).unwrap();
                }
            }
            store.settle().unwrap();
        }
        for mut original in stores() {
            for step in &before {
                apply(&mut *original, *step);
            }
            let (mut fork, mut again) = (original.fork(), original.fork());
            again.retain(&[Vec::new(), Vec::new()]).unwrap();
            read(&mut *again, &written(&*original)).unwrap();
            for step in after.iter().copied().chain([(0, 1); 64]) {
                for store in [&mut original, &mut fork, &mut again] {
                    apply(&mut **store, step);
                }
                let bytes = [&original, &fork, &again].map(|store| store.bytes());
                prop_assert!(
                    bytes[1] <= bytes[0] && bytes[2] <= bytes[0],
                    "{}, after {step:?}: {bytes:?}", original.name()
                );
            }
            prop_assert_eq!(original.bytes(), fork.bytes());
            prop_assert_eq!(original.bytes(), again.bytes());
        }
    }
}
