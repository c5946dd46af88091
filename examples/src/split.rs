//! Which device has which layers, by bytes.

use crate::{
    Result,
    plan::{Planned, Request},
    report::{Table, bytes},
};
use std::ops::Range;

/// What lies on one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Of all devices, which; `None` for the CPU.
    pub device: Option<usize>,
    /// Its layers.
    pub layers: Range<usize>,
    /// Bytes of weights, those of the embedding and of the output among them where they lie here.
    pub weights: usize,
    /// Bytes of retaining heads.
    pub heads: usize,
    /// The most bytes of keys and values at any moment.
    pub kv: usize,
    /// An estimate of the largest intermediate results.
    pub activations: usize,
    /// Bytes that the device has; `None` for the CPU, which is not asked.
    pub memory: Option<usize>,
}

impl Part {
    /// Everything at this device's worst moment.
    pub fn total(&self) -> usize {
        self.weights + self.heads + self.kv + self.activations
    }

    /// Whether the device has room for it.
    pub fn fits(&self) -> bool {
        self.memory.is_none_or(|memory| self.total() <= memory)
    }
}

/// A model on one or several devices, and on the CPU what is left over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// By device, the CPU first where it has something.
    pub parts: Vec<Part>,
    /// Layers of the model.
    pub layers: usize,
}

impl Request {
    /// Lays the layers over devices of so many bytes, in their order, so that the fullest one is as empty as may be.
    /// If that is too much for them, the embedding stays on the CPU, then as few of the first layers as
    /// possible, and then everything: what `--gpu-layers` can say. Nothing is kept free for
    /// drivers and what they reserve: take that off what a card has.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn split(&self, memory: &[usize]) -> Result<Split> {
        let planned = self.planned()?;
        let layers = self.shape.layers;
        if !memory.is_empty() {
            for host in std::iter::once(None).chain((0..=layers).map(Some)) {
                if let Some(parts) = self.laid(&planned, memory, host)? {
                    return Ok(Split { parts, layers });
                }
            }
        }
        let all = self.part(&planned, None, 0..layers, [true, true])?;
        Ok(Split {
            parts: vec![all],
            layers,
        })
    }

    /// The layers on the devices, if all of them have room; without the `host` first ones and the embedding, where the
    /// CPU takes part.
    fn laid(
        &self,
        planned: &Planned,
        memory: &[usize],
        host: Option<usize>,
    ) -> Result<Option<Vec<Part>>> {
        let (layers, last) = (self.shape.layers, memory.len() - 1);
        let part = |device: usize, layers: Range<usize>| -> Result<Part> {
            let has = [host.is_none() && device == 0, device == last];
            let part = self.part(planned, Some(device), layers, has)?;
            Ok(Part {
                memory: Some(memory[device]),
                ..part
            })
        };
        let fill = |part: &Part| part.total() as f64 / part.memory.unwrap_or(0).max(1) as f64;
        // By the number of layers that the devices so far have: the least that the fullest of them has to hold.
        let mut best: Vec<Option<(f64, Vec<Part>)>> = vec![None; layers + 1];
        best[host.unwrap_or(0)] = Some((0.0, Vec::new()));
        for device in 0..memory.len() {
            let mut next: Vec<Option<(f64, Vec<Part>)>> = vec![None; layers + 1];
            for (first, so_far) in best.iter().enumerate() {
                let Some((fullest, parts)) = so_far else {
                    continue;
                };
                for end in first..=layers {
                    if device == last && end < layers {
                        continue;
                    }
                    let own = part(device, first..end)?;
                    if !own.fits() {
                        // With more layers it has room even less.
                        break;
                    }
                    let fullest = fullest.max(fill(&own));
                    if next[end].as_ref().is_none_or(|(least, _)| fullest < *least) {
                        let mut parts = parts.clone();
                        parts.push(own);
                        next[end] = Some((fullest, parts));
                    }
                }
            }
            best = next;
        }
        let Some((_, parts)) = best.pop().flatten() else {
            return Ok(None);
        };
        Ok(Some(match host {
            None => parts,
            Some(host) => {
                let rest = self.part(planned, None, 0..host, [true, false])?;
                [vec![rest], parts].concat()
            }
        }))
    }

    /// What these layers take, with the embedding and the output or without.
    fn part(
        &self,
        planned: &Planned,
        device: Option<usize>,
        layers: Range<usize>,
        [embedding, output]: [bool; 2],
    ) -> Result<Part> {
        let (shape, n) = (&self.shape, layers.len());
        // A tied head is a matrix of its own where the embedding lies elsewhere.
        let tables = match (embedding, output) {
            (true, true) if shape.tied => 1,
            (embedding, output) => usize::from(embedding) + usize::from(output),
        };
        let norm = if output { shape.norm_bytes() } else { 0 };
        let cache = planned.layers(self, layers.clone())?;
        Ok(Part {
            device,
            weights: n * shape.layer_bytes(self.weights)
                + tables * shape.table_bytes(self.weights)
                + norm,
            heads: planned.heads(self) / shape.layers.max(1) * n,
            kv: cache.prefill.bytes.max(cache.bytes),
            activations: match n > 0 || output {
                true => planned.activations(self, n > 0, output),
                false => 0,
            },
            memory: None,
            layers,
        })
    }
}

impl Split {
    /// Layers on devices; the CPU has the others.
    pub fn on_devices(&self) -> usize {
        let parts = self.parts.iter().filter(|part| part.device.is_some());
        parts.map(|part| part.layers.len()).sum()
    }

    /// Whether everything lies on devices.
    pub fn is_whole(&self) -> bool {
        self.parts.iter().all(|part| part.device.is_some())
    }

    /// The flags with which the examples do the same.
    pub fn flags(&self) -> String {
        let on: Vec<&Part> = (self.parts.iter())
            .filter(|part| part.device.is_some())
            .collect();
        let mut flags = Vec::new();
        if on.is_empty() {
            return "--device flex".into();
        }
        if on.len() > 1 {
            let names = (0..on.len()).map(|i| format!("cuda:{i}"));
            let each = on.iter().map(|part| part.layers.len().to_string());
            flags.push(format!("--devices {}", names.collect::<Vec<_>>().join(",")));
            flags.push(format!(
                "--layers-each {}",
                each.collect::<Vec<_>>().join(",")
            ));
        } else {
            flags.push("--device cuda".into());
        }
        if !self.is_whole() {
            flags.push(format!("--gpu-layers {}", self.on_devices() + 1));
        }
        flags.join(" ")
    }

    /// A row for each device.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&[
            "where",
            "layers",
            ">weights",
            ">heads",
            ">keys and values",
            ">activations",
            ">together",
            ">of",
        ]);
        for part in &self.parts {
            table.row([
                match part.device {
                    Some(device) => format!("device {device}"),
                    None => "CPU".into(),
                },
                match part.layers.len() {
                    0 => "none".into(),
                    n => format!("{n} ({} to {})", part.layers.start, part.layers.end - 1),
                },
                bytes(part.weights),
                bytes(part.heads),
                bytes(part.kv),
                bytes(part.activations),
                bytes(part.total()),
                part.memory.map_or_else(String::new, bytes),
            ]);
        }
        table
    }
}
