//! GGUF files: tensors, settings, vocabulary, chat template, and the model that they make.

use super::{templates, tokenizers, try_out};
use crate::{Feed, Input, Target, edit, places};
use burn::tensor::Device;
use locret_models::{
    ChatTemplate, Gguf, GgufWeights, LoadOptions, ModelConfig, Tokenizer, load_model,
};
use std::{
    ops::Range,
    sync::{Arc, LazyLock},
};

pub(crate) const TARGET: Target = Target {
    name: "gguf",
    ready: || {
        LazyLock::force(&SEEDS);
    },
    make,
    read,
};

/// Valid files, with where their fields are.
static SEEDS: LazyLock<Vec<(Vec<u8>, Vec<Range<usize>>)>> = LazyLock::new(|| {
    let names = [
        "gguf/encodings",
        "sentencepiece/vocabulary",
        "llama31/model",
        "qwen3/model",
        "phi3_4k/model",
        "splits/vocabulary",
    ];
    let files = names.map(|name| {
        let bytes = places::golden(&format!("locret-models/tests/golden/{name}.gguf"));
        let fields = fields(&bytes);
        (bytes, fields)
    });
    files.into()
});

fn make(feed: &mut Feed<'_>) -> Input {
    let (seed, fields) = &SEEDS[feed.below(SEEDS.len())];
    let bytes = edit::bytes(seed, fields, feed);
    Input {
        bytes,
        kind: 0,
        rest: feed.take(64).to_vec(),
    }
}

fn read(input: &Input) {
    let path = places::path("file.gguf");
    places::write(&path, &input.bytes);
    let Ok(gguf) = Gguf::open(&path) else {
        return;
    };
    for tensor in gguf.tensors() {
        let _any = gguf.raw(tensor);
        // A row of all types but one is at most 16 times as long in 32 bits.
        if tensor.cols() <= 1 << 16 {
            let _any = gguf.dequantize_rows(tensor, 0..1);
        }
        let _any = gguf.raw_rows(tensor, tensor.rows()..tensor.rows() + 1);
    }
    let _any = ModelConfig::from_gguf(&gguf);
    if let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) {
        tokenizers::try_out(&tokenizer, &input.rest);
    }
    if let Ok(Some(template)) = ChatTemplate::from_gguf(&gguf) {
        templates::try_out(&template, &input.rest);
    }
    let _any = GgufWeights::new(Arc::new(gguf));
    if let Ok(loaded) = load_model(&path, &LoadOptions::new(), &Device::flex()) {
        try_out(&loaded.model);
    }
}

/// Where numbers and names are in a valid file. Of long lists, the first ones.
fn fields(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut walk = Walk {
        bytes,
        at: 4,
        fields: Vec::new(),
    };
    walk.number(4);
    let (tensors, settings) = (walk.number(8), walk.number(8));
    for _ in 0..settings {
        walk.string();
        let kind = walk.number(4);
        walk.value(kind);
    }
    for _ in 0..tensors {
        walk.string();
        for _ in 0..walk.number(4) {
            walk.number(8);
        }
        walk.number(4);
        walk.number(8);
    }
    walk.fields
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    fields: Vec<Range<usize>>,
}

impl Walk<'_> {
    fn number(&mut self, size: usize) -> u64 {
        let field = self.at..self.at + size;
        let mut number = [0; 8];
        number[..size].copy_from_slice(&self.bytes[field.clone()]);
        self.fields.push(field);
        self.at += size;
        u64::from_le_bytes(number)
    }

    fn string(&mut self) {
        let length = self.number(8) as usize;
        self.fields.push(self.at..self.at + length);
        self.at += length;
    }

    fn value(&mut self, kind: u64) {
        match kind {
            0 | 1 | 7 => drop(self.number(1)),
            2 | 3 => drop(self.number(2)),
            4..=6 => drop(self.number(4)),
            8 => self.string(),
            9 => {
                let (of, count) = (self.number(4), self.number(8));
                let known = self.fields.len();
                for i in 0..count {
                    self.value(of);
                    if i >= 4 {
                        self.fields.truncate(known + 8);
                    }
                }
            }
            _ => drop(self.number(8)),
        }
    }
}
