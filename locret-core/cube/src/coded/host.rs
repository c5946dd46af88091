//! The same units in host memory, and back: for files, and for what the device has no kernels for.

use super::{CodedStore, Head};
use burn_cubecl::tensor::CubeTensor;
use locret_core::{CodedHead, CodedPart, Error, QuantizedStore, Result, Room, waited};

impl CodedStore {
    /// The words of a buffer, in host memory.
    fn words(&self, buffer: &CubeTensor) -> Result<Vec<u32>> {
        let read = || self.place.client.read_one(buffer.handle.clone());
        let bytes = waited(|| read().map_err(|e| Error::Device(format!("{e:?}"))))?;
        Ok(bytemuck::pod_collect_to_vec(&bytes[..]))
    }

    /// The same units in host memory.
    pub(super) fn as_host(&self) -> Result<QuantizedStore> {
        let (d, codes) = (self.layer.head_dim, self.codes);
        let [plain, coded, shared] = [&self.plain, &self.coded, &self.shared];
        let (plain, coded) = (self.words(plain)?, self.words(coded)?);
        let shared = self.words(shared)?;
        let starts = (self.plain_starts().into_iter())
            .zip(self.coded_starts())
            .zip(self.run_starts());
        let heads = self
            .heads
            .iter()
            .zip(starts)
            .map(|(head, ((row, record), run))| {
                let part = |values: bool| {
                    let numbers = |rows: std::ops::Range<usize>| {
                        let rows = plain
                            .chunks_exact(2 * d)
                            .skip(row + rows.start)
                            .take(rows.len());
                        let at = if values { d } else { 0 };
                        rows.flat_map(move |row| &row[at..at + d])
                            .map(|x| f32::from_bits(*x))
                    };
                    let records = coded.chunks_exact(codes.record());
                    let records = records.skip(record).take(head.coded.rows());
                    let (mut bytes, mut pairs) = (Vec::new(), Vec::new());
                    for record in records {
                        let (row, rest) = record[codes.of(values)..].split_at(codes.words());
                        bytes.extend(row.iter().flat_map(|word| word.to_le_bytes()));
                        pairs.extend(
                            rest[..codes.pairs(values)]
                                .iter()
                                .flat_map(|pair| halves(*pair)),
                        );
                    }
                    if codes.run > 0 && !values {
                        for run in shared.chunks_exact(d).skip(run).take(head.runs.len()) {
                            for half in [0, 1] {
                                pairs.extend(run.iter().map(|pair| halves(*pair)[half]));
                            }
                        }
                    }
                    CodedPart {
                        first: numbers(0..head.first).map(half::f16::from_f32).collect(),
                        codes: bytes,
                        scales: pairs,
                        tail: numbers(head.first..head.plain()).collect(),
                    }
                };
                CodedHead {
                    keys: part(false),
                    values: part(true),
                    runs: head.runs.clone(),
                }
            });
        let store = QuantizedStore::on(&self.place.device, &self.layer, self.config)?;
        Ok(store.with_heads(heads.collect()))
    }

    /// Takes the units of a store in host memory instead of these.
    pub(super) fn take_from(&mut self, host: &QuantizedStore) {
        let (d, codes) = (self.layer.head_dim, self.codes);
        let [mut plain, mut coded, mut shared] = [const { Vec::new() }; 3];
        let mut heads = Vec::with_capacity(self.heads.len());
        for CodedHead { keys, values, runs } in host.heads() {
            let parts = [keys, values];
            let rows = |numbers: usize| numbers / d;
            for row in 0..rows(keys.first.len()) {
                for part in parts {
                    let row = &part.first[row * d..(row + 1) * d];
                    plain.extend(row.iter().map(|x| x.to_f32().to_bits()));
                }
            }
            for row in 0..rows(keys.tail.len()) {
                for part in parts {
                    let row = &part.tail[row * d..(row + 1) * d];
                    plain.extend(row.iter().map(|x| x.to_bits()));
                }
            }
            let records = keys.codes.len() / codes.bytes();
            for row in 0..records {
                for (part, of_values) in parts.into_iter().zip([false, true]) {
                    let (bytes, pairs) = (codes.bytes(), codes.pairs(of_values));
                    let row_codes = part.codes[row * bytes..(row + 1) * bytes].chunks_exact(4);
                    coded.extend(row_codes.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
                    let row_pairs =
                        part.scales[2 * row * pairs..2 * (row + 1) * pairs].chunks_exact(2);
                    coded.extend(row_pairs.map(|pair| word(pair[0], pair[1])));
                }
            }
            for (run, _) in runs.iter().enumerate() {
                let of_run = &keys.scales[2 * run * d..2 * (run + 1) * d];
                let (steps, lows) = of_run.split_at(d);
                shared.extend(steps.iter().zip(lows).map(|(step, low)| word(*step, *low)));
            }
            let [first, tail] = [&keys.first.len(), &keys.tail.len()].map(|n| rows(*n));
            heads.push(Head {
                first,
                coded: Room::exact(records),
                tail,
                room: first + tail,
                runs: runs.clone(),
            });
        }
        self.heads = heads;
        [self.plain, self.coded, self.shared] =
            [plain, coded, shared].map(|words| self.place.indices(&words));
        self.describe();
    }
}

/// Step and low of a word.
fn halves(pair: u32) -> [half::f16; 2] {
    [pair as u16, (pair >> 16) as u16].map(half::f16::from_bits)
}

fn word(step: half::f16, low: half::f16) -> u32 {
    u32::from(step.to_bits()) | u32::from(low.to_bits()) << 16
}
