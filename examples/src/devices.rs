//! Where a model's layers lie, as command lines say it.

use crate::{
    Error, Result,
    args::ModelArgs,
    runtime::{compute, device},
};
use locret_core::{Compute, DeviceMap};
use locret_models::LoadOptions;
use std::sync::Arc;

/// What computes a model of `layers` layers: one device, or a map of several.
///
/// # Errors
/// [`Error::Usage`] for a device that is not there or not usable, and for shares that are not the model's layers.
pub fn computes(args: &ModelArgs, layers: usize) -> Result<Arc<dyn Compute>> {
    let options = args.options();
    if !args.is_mapped() {
        return compute(&device(&args.device)?, &options);
    }
    let names = match &args.devices[..] {
        [] => std::slice::from_ref(&args.device),
        several => several,
    };
    let on = names.iter().map(|name| compute(&device(name)?, &options));
    let on = on.collect::<Result<Vec<_>>>()?;
    let map = match args.gpu_layers {
        None => {
            let shares = shares(args, layers, on.len())?;
            DeviceMap::of(on.into_iter().zip(shares))?
        }
        Some(wanted) => {
            let (host, last) = (host(&options)?, on[on.len() - 1].clone());
            let there = last_layers(wanted, layers);
            let shares = shares(args, there, on.len())?;
            let rest = std::iter::once((host.clone(), layers - there));
            let map = DeviceMap::of(rest.chain(on.into_iter().zip(shares)))?;
            let output = if wanted > 0 { last } else { host.clone() };
            map.with_input(host)?.with_output(output)?
        }
    };
    Ok(Arc::new(map))
}

/// Of llama.cpp's `--gpu-layers N` (read in its sources of 2026): the output counts as the last of them, so that
/// `N - 1` layers, the last ones, are on the device, and the embedding never is.
pub fn last_layers(wanted: usize, layers: usize) -> usize {
    wanted.saturating_sub(1).min(layers)
}

/// How many layers each device has: what `--layers-each` says, or as equal shares as there are.
fn shares(args: &ModelArgs, layers: usize, devices: usize) -> Result<Vec<usize>> {
    let given = &args.layers_each;
    if given.is_empty() {
        return Ok(equal(layers, devices));
    }
    match given.len() == devices && given.iter().sum::<usize>() == layers {
        true => Ok(given.clone()),
        false => Err(Error::Usage(format!(
            "--layers-each {given:?} is not {layers} layers on {devices} devices"
        ))),
    }
}

/// `layers` in `devices` parts of which the first ones have one more, if it does not come out even.
pub fn equal(layers: usize, devices: usize) -> Vec<usize> {
    let more = |i| usize::from(i < layers % devices);
    (0..devices).map(|i| layers / devices + more(i)).collect()
}

/// The CPU.
fn host(options: &LoadOptions) -> Result<Arc<dyn Compute>> {
    compute(&device("flex")?, options)
}

/// A line for each device: which layers it has.
pub fn described(compute: &dyn Compute) -> String {
    let Some(map) = compute.map() else {
        return String::new();
    };
    let runs = map.runs();
    let lines = runs.iter().map(|(layers, on)| {
        let (first, last) = (layers.start, layers.end - 1);
        format!(
            "layers {first} to {last} on {:?}, {}\n",
            on.device(),
            on.name()
        )
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_lie_where_the_command_line_says() {
        let mut args = ModelArgs {
            devices: vec!["flex".into(), "flex".into()],
            ..ModelArgs::default()
        };
        let map = computes(&args, 5).unwrap();
        let runs: Vec<_> = map.map().unwrap().runs();
        let runs: Vec<_> = runs.into_iter().map(|(layers, _)| layers).collect();
        assert_eq!(runs, [0..3, 3..5]);
        args.layers_each = vec![1, 4];
        let map = computes(&args, 5).unwrap();
        assert_eq!(map.map().unwrap().runs()[0].0, 0..1);
        args.layers_each = vec![1, 3];
        let wrong = computes(&args, 5).unwrap_err().to_string();
        assert!(wrong.contains("not 5 layers on 2 devices"), "{wrong}");
        // One device is no map.
        assert!(computes(&ModelArgs::default(), 5).unwrap().map().is_none());
    }

    #[test]
    fn the_last_layers_are_on_the_device_and_the_output_counts() {
        // The CPU a second time stands for the device.
        for (wanted, there) in [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (99, 3)] {
            assert_eq!(last_layers(wanted, 3), there);
            let args = ModelArgs {
                gpu_layers: Some(wanted),
                ..ModelArgs::default()
            };
            let compute = computes(&args, 3).unwrap();
            let map = compute.map().unwrap();
            let on_device = |compute: &Arc<dyn Compute>| !Arc::ptr_eq(compute, map.input());
            let layers: Vec<bool> = (0..3).map(|i| on_device(map.layer(i))).collect();
            let expected: Vec<bool> = (0..3).map(|i| i >= 3 - there).collect();
            assert_eq!(layers, expected, "{wanted}");
            assert_eq!(on_device(map.output()), wanted > 0, "{wanted}");
        }
    }
}
