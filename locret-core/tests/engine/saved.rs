//! Damaged files of stores: an error, and nothing else.

use crate::device;
use locret_core::{
    DType, Error, Kernels, KvStore, LayerSpec, Placement, QuantLayout, Quantization,
    QuantizedStore, Rows,
};

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
        for layout in [QuantLayout::PerToken, QuantLayout::Kivi] {
            let config = Quantization {
                layout,
                group: 8,
                residual: 3,
                ..Quantization::default()
            };
            all.push(QuantizedStore::boxed(&LAYER, &place, config).unwrap());
        }
    }
    for store in &mut all {
        let numbers = (0..50 * 16).map(|i| (i % 13) as f32 - 6.0);
        let rows = Rows::new(numbers.collect(), 16, &device()).unwrap();
        store.append(&rows, &rows).unwrap();
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
                let read = store.read(&mut &damaged[..]);
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
            if store.read(&mut &damaged[..]).is_ok() {
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
            let same = i % 5 == j % 5;
            assert_eq!(store.read(&mut &file[..]).is_ok(), same, "{i} {j}");
            taken += usize::from(same);
        }
    }
    assert_eq!(taken, 20);
    let wide = LayerSpec {
        head_dim: 16,
        ..LAYER
    };
    let mut wide = Kernels::Auto
        .on(&device())
        .store(&wide, DType::F32)
        .unwrap();
    assert!(matches!(
        wide.read(&mut &files[0][..]),
        Err(Error::Snapshot(_))
    ));
}
