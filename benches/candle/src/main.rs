//! `candle-peer MODEL.gguf IDS.json NEW`: reads the ids in chunks of 512 by candle's Llama, generates greedily, and prints
//! rates as `peers.py` wants them.

use candle_core::{Device, IndexOp, Tensor, quantized::gguf_file};
use candle_transformers::models::quantized_llama::ModelWeights;
use std::{env, error::Error, fs::File, io::BufReader, time::Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().collect();
    let [_, model, ids, new] = &args[..] else {
        return Err("candle-peer MODEL.gguf IDS.json NEW".into());
    };
    let ids: Vec<u32> = serde_json::from_reader(BufReader::new(File::open(ids)?))?;
    let new: usize = new.parse()?;
    let mut file = BufReader::new(File::open(model)?);
    let content = gguf_file::Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    let mut step = |ids: &[u32], at: usize| -> candle_core::Result<u32> {
        let x = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        model.forward(&x, at)?.i(0)?.argmax(0)?.to_scalar::<u32>()
    };
    step(&ids[..ids.len().min(64)], 0)?;

    let start = Instant::now();
    let mut token = 0;
    for (i, chunk) in ids.chunks(512).enumerate() {
        token = step(chunk, i * 512)?;
    }
    let prefill = ids.len() as f64 / start.elapsed().as_secs_f64();
    let (start, mut made) = (Instant::now(), vec![token]);
    for at in 1..new {
        token = step(&[token], ids.len() + at - 1)?;
        made.push(token);
    }
    let decode = match new {
        0 | 1 => 0.0,
        new => (new - 1) as f64 / start.elapsed().as_secs_f64(),
    };
    made.truncate(8);
    println!(
        "{}",
        serde_json::json!({ "prefill": prefill, "decode": decode, "tokens": made })
    );
    Ok(())
}
