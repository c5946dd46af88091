//! The policies that requests may ask for.

use crate::{Error, Result};
use locret_core::{Budget, CausalLm, KvCachePolicy};
use locret_policies::{HeadWeights, Method, PolicyConfig, RetainingHeads};
use std::sync::Arc;

/// Units of a budget, or tokens, that are taken for a mistake.
const ABSURD: usize = 1 << 24;

/// The server's policy, and others by name and budget.
#[derive(Debug)]
pub struct Policies {
    config: PolicyConfig,
    own: Arc<dyn KvCachePolicy>,
    /// Locret's heads, which all policies share that have some.
    heads: Option<Arc<RetainingHeads>>,
}

impl Policies {
    /// `config`, for requests that ask for nothing else.
    ///
    /// # Errors
    /// As [`PolicyConfig::build_for`].
    pub fn new(mut config: PolicyConfig, model: &dyn CausalLm) -> Result<Self> {
        let mut heads = None;
        if let (Method::Locret, Some(file)) = (config.policy, config.heads.take()) {
            let weights = HeadWeights::load(&file, model.spec())?;
            let advice = weights.advice().map_err(|e| {
                let message = format!("{}: {e}", file.display());
                Error::invalid(message)
            })?;
            config = config.advised(&advice);
            heads = Some(Arc::new(RetainingHeads::for_model(&weights, model)?));
        }
        let own = build(&config, heads.as_ref(), model)?;
        Ok(Self { config, own, heads })
    }

    /// The server's own.
    pub fn config(&self) -> &PolicyConfig {
        &self.config
    }

    /// A policy by name and budget; what is not given is the server's. A method that is not the server's
    /// has the settings of its paper. `locret` is there only where the server has heads for it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that there is no policy of, and for absurd budgets;
    /// [`Error::Policy`] for impossible ones.
    pub fn choose(
        &self,
        name: Option<&str>,
        budget: Option<Budget>,
        model: &dyn CausalLm,
    ) -> Result<Arc<dyn KvCachePolicy>> {
        let method = match name {
            None => self.config.policy,
            Some(name) => name
                .parse()
                .map_err(|e: locret_policies::PolicyError| Error::field("policy", e.to_string()))?,
        };
        if method == self.config.policy && budget.is_none() {
            return Ok(self.own.clone());
        }
        match budget {
            Some(Budget::Units(units)) if units == 0 || units > ABSURD => {
                let message = format!("expected 1 to {ABSURD} units, found {units}");
                return Err(Error::field("budget", message));
            }
            Some(Budget::Ratio(ratio)) if !(ratio > 0.0 && ratio <= 1.0) => {
                let message = format!("expected more than 0 % and at most 100 %, found {ratio}");
                return Err(Error::field("budget", message));
            }
            _ => {}
        }
        let mut config = match method == self.config.policy {
            true => self.config.clone(),
            false => PolicyConfig::new(method),
        };
        let evicts = method.evicts();
        config.budget = budget.or(self.config.budget.filter(|_| evicts));
        build(&config, self.heads.as_ref(), model)
    }
}

fn build(
    config: &PolicyConfig,
    heads: Option<&Arc<RetainingHeads>>,
    model: &dyn CausalLm,
) -> Result<Arc<dyn KvCachePolicy>> {
    Ok(match (config.policy, heads) {
        (Method::Locret, Some(heads)) => config.build_with_heads(model.spec(), heads.clone())?,
        _ => config.build_for(model)?,
    })
}
