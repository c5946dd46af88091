//! A model that is ready to run, on a device that is there.

use crate::{Error, Result, args::ModelArgs, devices, progress, report};
use burn::tensor::Device;
use locret_core::{CausalLm, Compute, usable};
#[cfg(feature = "cube")]
use locret_core::{Kernels, is_host_device};
use locret_eval::{
    corpus::Essays,
    evaluate::Tokeniser,
    files::file_sha256,
    tasks::{Frame, Kind, Texts},
};
use locret_models::{
    Date, FetchOptions, LoadOptions, LoadedModel, Message, ModelFiles, SpecialTokens, Tokenizer,
    load_model_with, resolve,
};
use std::{
    cell::{Cell, OnceCell},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

/// A loaded model and what belongs to it.
#[derive(Debug)]
pub struct Runtime {
    /// What it was asked for by.
    pub name: String,
    /// Its file or folder.
    pub path: PathBuf,
    /// The model, and what its files say.
    pub loaded: LoadedModel,
    /// Where it runs; its output does, where layers lie on several devices.
    pub device: Device,
    /// Made when it is first needed: token ids need none.
    tokenizer: OnceCell<Tokenizer>,
    /// It was said that a text is longer than the model was made for.
    told: Cell<bool>,
}

impl Runtime {
    /// Fetches a model if need be, loads it, and says how long that took.
    ///
    /// # Errors
    /// [`Error::Usage`] for a device that is not there, [`Error::Model`].
    pub fn load(args: &ModelArgs) -> Result<Self> {
        // Before anything is fetched for a device that is not there.
        let one = match args.is_mapped() {
            true => None,
            false => Some(devices::computes(args, 0)?),
        };
        let shown = progress::Fetching::new();
        let path = resolve(&args.model, &args.fetch(), &|p| shown.show(p))?;
        drop(shown);
        let started = Instant::now();
        let compute = match one {
            Some(one) => one,
            None => devices::computes(args, ModelFiles::open(&path)?.config()?.layers)?,
        };
        let loaded = load_model_with(&path, &args.options(), &compute)?;
        eprint!(
            "loaded {} in {}\n{}",
            args.model,
            report::duration(started.elapsed().as_secs_f64()),
            devices::described(&*compute)
        );
        Ok(Self {
            name: args.model.clone(),
            path,
            device: compute.device().clone(),
            loaded,
            tokenizer: OnceCell::new(),
            told: Cell::new(false),
        })
    }

    /// The model.
    pub fn model(&self) -> Arc<dyn CausalLm> {
        self.loaded.model.clone()
    }

    /// Says, once, that a text of `tokens` tokens is longer than the model was made for, if it is.
    pub fn note_length(&self, tokens: usize) {
        if let Some(past) = self.loaded.model.spec().past_context(tokens)
            && !self.told.replace(true)
        {
            eprintln!("note: {past}");
        }
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// [`Error::Model`] if its files have none, or a damaged one.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        if let Some(made) = self.tokenizer.get() {
            return Ok(made);
        }
        let made = self.loaded.files.tokenizer()?;
        Ok(self.tokenizer.get_or_init(|| made))
    }

    /// Tokens of a part of a text: control tokens in it are control tokens, nothing is added.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self
            .tokenizer()?
            .encode_part(text, SpecialTokens::Interpret)?)
    }

    /// How many tokens [`encode`](Self::encode) gives.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub fn count(&self, text: &str) -> Result<usize> {
        Ok(self.encode(text)?.len())
    }

    /// Tokens of a prompt: what the tokenizer puts around a text is there. With `chat` it is a
    /// user's turn; names of control tokens in it mean nothing unless `control` asks for it.
    ///
    /// # Errors
    /// [`Error::Model`]; [`Error::Usage`] if a chat is asked for and there is no template for it.
    pub fn prompt(&self, text: &str, chat: bool, control: bool) -> Result<Vec<u32>> {
        self.prompt_on(Date::today(), text, chat, control)
    }

    /// The same on a certain day, which a chat template may print.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub fn prompt_on(&self, date: Date, text: &str, chat: bool, control: bool) -> Result<Vec<u32>> {
        if chat {
            let template = self.loaded.files.chat_template()?;
            let template = template.ok_or_else(no_template)?.with_date(date);
            let turn = [Message::new("user", text)];
            if control {
                return self.encode(&template.render(&turn, true)?);
            }
            return Ok(template.encode(self.tokenizer()?, &turn, true)?);
        }
        let special = if control {
            SpecialTokens::Interpret
        } else {
            SpecialTokens::Plain
        };
        Ok(self.tokenizer()?.encode(text, special)?)
    }

    /// The text of each token; of a character of several tokens the last one has it.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub fn pieces(&self, ids: &[u32]) -> Result<Vec<String>> {
        let mut stream = self.tokenizer()?.decode_stream(false);
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
        if let Some(last) = pieces.last_mut() {
            *last += &stream.finish();
        }
        Ok(pieces)
    }

    /// Tokens that end a turn.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub fn end_of_turn(&self) -> Result<Vec<u32>> {
        Ok(self.tokenizer()?.end_of_turn(&self.loaded.config.eos))
    }

    /// How contexts and questions are put: as turns of the model's chat template, or as plain
    /// text. `chat` asks for one of them; `None` takes the chat wherever there is a template.
    ///
    /// # Errors
    /// [`Error::Model`]; [`Error::Usage`] if a chat is asked for and there is no template for it.
    pub fn frame(&self, chat: Option<bool>) -> Result<Frame> {
        if chat == Some(false) {
            return Ok(Frame::plain(&self.begin()?));
        }
        let template = self.loaded.files.chat_template()?;
        let framed = match &template {
            None => None,
            Some(template) => Frame::chat(&self.begin()?, |turns| {
                let turns = turns.iter().map(|(role, text)| Message::new(*role, *text));
                template.render(&turns.collect::<Vec<_>>(), true)
            })?,
        };
        match (framed, chat) {
            (Some(frame), _) => Ok(frame),
            (None, None) => Ok(Frame::plain(&self.begin()?)),
            (None, Some(_)) => Err(no_template()),
        }
    }

    /// The beginning-of-text token's name where texts begin with it.
    fn begin(&self) -> Result<String> {
        let tokenizer = self.tokenizer()?;
        let bos = tokenizer.bos();
        let first = tokenizer
            .encode("a", SpecialTokens::Plain)?
            .first()
            .copied();
        let named = bos
            .filter(|_| first == bos)
            .and_then(|id| tokenizer.id_to_token(id));
        Ok(named.unwrap_or_default())
    }

    /// SHA-256 of the model's file; `None` for a folder.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn sha256(&self) -> Result<Option<String>> {
        if !self.path.is_file() {
            return Ok(None);
        }
        file_sha256(&self.path).map(Some)
    }
}

/// The essays that tasks are made of, fetched if need be.
///
/// # Errors
/// As [`Essays::for_evaluation`].
pub fn essays(options: &FetchOptions) -> Result<Essays> {
    let shown = progress::Fetching::new();
    Essays::for_evaluation(options, &|p| shown.show(p))
}

/// What tasks of these kinds are made of, fetched if need be.
///
/// # Errors
/// As [`Texts::fetch`].
pub fn texts(kinds: &[Kind], options: &FetchOptions) -> Result<Texts> {
    let shown = progress::Fetching::new();
    Texts::fetch(kinds, options, &|p| shown.show(p))
}

impl Tokeniser for Runtime {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Self::encode(self, text)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(self.pieces(ids)?.concat())
    }

    fn ends(&self) -> Result<Vec<u32>> {
        self.end_of_turn()
    }
}

fn no_template() -> Error {
    Error::Usage("the model has no chat template".into())
}

/// A device by name, and how that of a number is made.
type NamedDevice = (&'static str, fn(Option<usize>) -> Device);

/// Devices beside the CPU that this program was built with.
const ACCELERATORS: &[NamedDevice] = &[
    #[cfg(feature = "cuda")]
    ("cuda", |number| {
        use burn::tensor::DeviceIndex::{Default, Specified};
        Device::cuda(number.map_or(Default, Specified))
    }),
    #[cfg(feature = "vulkan")]
    ("vulkan", |number| Device::vulkan(kind(number))),
    #[cfg(feature = "metal")]
    ("metal", |number| Device::metal(kind(number))),
    #[cfg(feature = "wgpu")]
    ("wgpu", |number| Device::wgpu(kind(number))),
];

/// The card of that number, or the best there is.
#[cfg(any(feature = "vulkan", feature = "metal", feature = "wgpu"))]
fn kind(number: Option<usize>) -> burn::tensor::DeviceKind {
    use burn::tensor::DeviceKind::{DefaultDevice, DiscreteGpu};
    number.map_or(DefaultDevice, DiscreteGpu)
}

/// The device called `name`, or the card of a number: `cuda:1`.
///
/// # Errors
/// [`Error::Usage`] for a name that is unknown or that this program was built without, and for a
/// device that is not there or cannot compute.
pub fn device(name: &str) -> Result<Device> {
    #[cfg(feature = "flex")]
    if name == "flex" {
        return Ok(Device::flex());
    }
    let (kind, number) = match name.split_once(':') {
        Some((kind, number)) => (kind, Some(number)),
        None => (name, None),
    };
    let known = ["cuda", "vulkan", "metal", "wgpu"].contains(&kind);
    if !known && name != "flex" {
        return Err(Error::Usage(format!(
            "unknown device {name:?}: there are flex, cuda, vulkan, metal, wgpu"
        )));
    }
    let number = number.map(str::parse).transpose();
    let number = number.map_err(|_| {
        Error::Usage(format!(
            "unknown device {name:?}: a card is {kind}:0, {kind}:1 and so on"
        ))
    })?;
    let Some((_, make)) = ACCELERATORS.iter().find(|d| d.0 == kind) else {
        return Err(Error::Usage(format!(
            "this program was built without {kind}: build it with --features {kind}"
        )));
    };
    usable(|| make(number)).map_err(|e| {
        let what = report::shorten(&e.to_string(), 240);
        Error::Usage(format!("the device {name} is not usable here: {what}"))
    })
}

/// What computes on a device: kernels of this repository where there are some for it, and otherwise what `options` ask
/// for.
///
/// # Errors
/// [`Error::Core`] for a device that the kernels do not know.
pub fn compute(device: &Device, options: &LoadOptions) -> Result<Arc<dyn Compute>> {
    #[cfg(feature = "cube")]
    if options.kernels == Kernels::Auto && !is_host_device(device) {
        return Ok(Arc::new(locret_cube::Cube::new(device)?));
    }
    Ok(options.kernels.with(device, options.activations))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_are_not_there_are_errors() {
        assert!(device("flex").is_ok());
        let unknown = device("abacus").unwrap_err().to_string();
        assert!(
            unknown.contains("flex, cuda, vulkan, metal, wgpu"),
            "{unknown}"
        );
        for wrong in ["flex:1", "cuda:", "cuda:x", "wgpu:-1"] {
            assert!(device(wrong).is_err(), "{wrong}");
        }
        #[cfg(not(feature = "metal"))]
        assert!(
            device("metal")
                .unwrap_err()
                .to_string()
                .contains("--features metal")
        );
    }
}
