//! A pass key hidden in an essay: which caches still know it, and what they took.

use crate::{
    Result,
    args::ModelArgs,
    progress::{Progress, Unit},
    report::{self, Table},
    runtime, shipped_heads,
};
use locret_core::{Budget, Generate, Prefill, Session};
use locret_eval::tasks::{Kind, Recipe};
use locret_policies::{Method, PolicyConfig};

/// Tokens of the text.
pub const TOKENS: usize = 4200;
/// With a full cache this small model finds the pass key for six of the seeds 1 to 10; where it
/// does not, there would be nothing for a bounded cache to lose.
const SEED: u64 = 4;
const BUDGET: usize = 512;
const CHUNK: usize = 256;

/// The example, with a text of about `tokens` tokens.
///
/// # Errors
/// Those of its parts.
pub fn run(model: &ModelArgs, tokens: usize) -> Result<()> {
    let essays = runtime::essays(&model.fetch())?;
    let runtime = model.load()?;
    let recipe = Recipe {
        kinds: vec![Kind::EssayPasskey],
        tokens,
        samples: 1,
        seed: SEED,
    };
    let tasks = recipe.generate(&runtime.frame(None)?, &essays, &|t| runtime.count(t))?;
    let question = &tasks[0].queries[0];
    let context = runtime.encode(&tasks[0].context)?;
    let query = runtime.encode(&question.query)?;
    let prompt = [context.as_slice(), &query].concat();
    println!(
        "{} tokens of essays with a pass key in them ({}); bounded caches keep {BUDGET} units a \
         head.\n",
        report::grouped(prompt.len()),
        question.answer
    );

    runtime.note_length(prompt.len());

    let bounded = |method| PolicyConfig::new(method).budget(Budget::Units(BUDGET));
    let mut policies = vec![
        PolicyConfig::new(Method::Full),
        bounded(Method::Window),
        bounded(Method::SirLlm),
    ];
    if let Some(heads) = shipped_heads(&runtime) {
        let mut locret = bounded(Method::Locret);
        locret.heads = Some(heads);
        policies.push(locret);
    }

    let mut table = Table::new(&[
        "policy",
        "answer",
        "",
        ">peak KV",
        ">smaller",
        ">prefill tok/s",
        ">decode tok/s",
    ]);
    for config in policies {
        let model = runtime.model();
        let policy = config.build_for(&*model)?;
        let name = policy.name();
        let mut session = Session::new(model, policy)?;
        let mut bar = Progress::new(
            format!("reading: {name}"),
            Some(prompt.len() as u64),
            Unit::Tokens,
        );
        // The question is never evicted, nor are the last words before it.
        let prefill = Prefill::new(CHUNK, query.len() + 32);
        session.prefill_with(&prompt, &prefill, &mut |chunk| {
            bar.set(chunk.done as u64);
            Ok(())
        })?;
        bar.label(format!("answering: {name}"));
        let generate = Generate::greedy(16).stop_at(runtime.end_of_turn()?);
        let ids = session
            .generate(generate)?
            .collect::<Result<Vec<u32>, _>>()?;
        bar.finish();
        let answer = runtime.tokenizer()?.decode(&ids, true);
        let report = session.report();
        table.row([
            name,
            report::shorten(&answer, 24),
            if answer.trim().starts_with(&question.answer) {
                "right"
            } else {
                "wrong"
            }
            .into(),
            report::bytes(report.peak.bytes),
            format!("{:.1} x", report.compression()),
            report::rate(report.prefill_rate()),
            report::rate(report.decode_rate()),
        ]);
    }
    println!("{table}");
    Ok(())
}
